"""Folders of equal files: which items each holds, what is missing, and what two manifests say differently."""

import pytest

from d_emo.common.shards import MANIFEST, ShardFolder, differences, read_manifest, write_manifest


@pytest.mark.parametrize(("count", "size"), [(10, 4), (8, 4), (1, 4), (0, 4), (5, 1)])
def test_every_item_is_in_one_file(tmp_path, count, size):
    files = ShardFolder(tmp_path, "part-{:06d}.npy", count, size)
    assert [item for shard in files.ranges for item in shard] == list(range(count))
    assert all(len(shard) == size for shard in files.ranges[:-1])
    assert len({files.path(shard) for shard in files.ranges}) == len(files.ranges)


def test_what_is_missing_is_what_has_no_file(tmp_path):
    files = ShardFolder(tmp_path, "part-{:06d}.npy", 10, 4)
    assert files.missing() == files.ranges
    (tmp_path / "part-000004.npy").touch()
    (tmp_path / ".partial-part-000008.npy").touch()
    assert files.missing() == [range(0, 4), range(8, 10)]


def test_manifests_are_compared_as_json_keeps_them(tmp_path):
    written = {"shape": (4, 8), "inner": {"a": 1, "b": 2.5}, "vae": "x"}
    write_manifest(tmp_path, written)
    stored = read_manifest(tmp_path, "make it again")
    assert differences(stored, written) == []
    wanted = {"shape": (4, 9), "inner": {"a": 1, "c": None}, "vae": "y"}
    changes = ["inner.b 2.5 -> None", "shape [4, 8] -> [4, 9]"]  # None and nothing are the same
    assert differences(stored, wanted, free=("vae",)) == changes


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"3", b"null", b"\xff\xfe"])
def test_a_damaged_manifest_is_named_with_the_remedy(tmp_path, content):
    assert read_manifest(tmp_path, "make it again") is None
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest\.json is damaged .*; make it again\."):
        read_manifest(tmp_path, "make it again")
