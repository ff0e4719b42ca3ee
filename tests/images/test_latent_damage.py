"""Folders of latents as disks leave them: every file has a checksum, and what is not as it was written is refused."""

import json
import pickle
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from helpers.damage import DAMAGES, flip_bit

from d_emo.images import latent_cache
from d_emo.images.autoencoders import LatentSpace
from d_emo.images.latent_cache import LatentCache, blocks, latents_source, write_latents
from d_emo.images.latent_manifest import CacheManifest, LatentCacheError, claim_latents, shard_folder
from d_emo.images.latent_statistics import moments_of, statistics_from, write_statistics

COUNT, SHARD = 10, 4
LABELS = np.arange(COUNT) % 3
SPACE = LatentSpace(autoencoder="AutoencoderKL", channels=4, factor=8, std=(2.0,))
FILES = ["manifest.json", "labels.npy", "latents-000000004.npy", "checksums-000000004.json", "replaced-000000004.json",
         "statistics.json"]  # fmt: skip


def manifest_of(**changes) -> CacheManifest:
    values = {
        "source": "made up", "fingerprint": "f", "count": COUNT, "id2label": {"0": "a", "1": "b", "2": "c"},
        "resolution": 16, "shape": (4, 2, 2), "flips": 2, "dtype": "float32", "vae": "none", "vae_digest": "v",
        "latent_space": SPACE, "shard_size": SHARD,
    }  # fmt: skip
    return CacheManifest(**{**values, **changes})


def values_of(index: int, manifest: CacheManifest) -> np.ndarray:
    return (
        np.random.RandomState(index)
        .standard_normal((manifest.flips, manifest.latent_space.parts, *manifest.shape))
        .astype(manifest.dtype)
    )


def write_folder(folder, **changes):
    """A whole folder, in which image 6 stands for image 5."""
    manifest = manifest_of(**changes)
    claim_latents(folder, manifest, np.arange(manifest.count) % 3)
    files = shard_folder(folder, manifest)
    for shard in files.ranges:
        moments = np.stack([values_of(index, manifest) for index in shard])
        write_latents(files.path(shard), moments, {5: 6} if 5 in shard else {})
    every = moments_of(block for shard in files.ranges for block in blocks(folder, manifest, shard))
    write_statistics(folder, statistics_from(every, manifest))
    return folder


def without_checksums(folder):
    """As folders of before there were checksums are."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("sha256", "labels_digest"):
        del manifest[name]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for path in folder.glob("checksums-*"):
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("latents") / "whole")


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "latents")
    return tmp_path / "latents"


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("flips", [1, 2])
def test_what_was_written_is_read(tmp_path, dtype, flips, deterministic):
    space = replace(SPACE, deterministic=deterministic)
    cache = LatentCache(write_folder(tmp_path / "latents", dtype=dtype, flips=flips, latent_space=space))
    assert cache.read(0, False).shape == (1 if deterministic else 2, 4, 2, 2)
    for copy in (cache, pickle.loads(pickle.dumps(cache))):  # as loader processes get it that are not forked
        for index in range(COUNT):
            for flipped in range(flips):
                expected = torch.from_numpy(values_of(index, cache.manifest)[flipped]).float()
                torch.testing.assert_close(copy.read(index, bool(flipped)), expected, atol=0, rtol=0)
    expected = LABELS.copy()
    expected[5] = LABELS[6]
    np.testing.assert_array_equal(cache.labels, expected)
    assert latents_source(tmp_path / "latents").note == ""


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_by_name(folder, name, damage):
    if (name, damage) == ("statistics.json", "deleted"):
        pytest.skip("a folder need not have statistics")
    DAMAGES[damage](folder / name)
    with pytest.raises(LatentCacheError) as refused:
        LatentCache(folder)
    message = str(refused.value)
    assert "\n" not in message and name.split("-")[-1].split(".")[0].lstrip("0") in message and "encode" in message


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_refused(folder, name):
    path, random = folder / name, np.random.RandomState(0)
    content = path.read_bytes()
    for bit in random.choice(8 * len(content), 60, replace=False):
        flip_bit(path, int(bit))
        with pytest.raises(LatentCacheError):
            LatentCache(folder)
        path.write_bytes(content)
    LatentCache(folder)


def test_a_file_of_another_folder_is_refused(folder, tmp_path):
    other = write_folder(tmp_path / "other", vae_digest="w")
    for start in (0, 8):
        shutil.copy(other / f"latents-{start:09d}.npy", folder / "latents-000000004.npy")
        with pytest.raises(LatentCacheError, match=r"latents-000000004\.npy"):
            LatentCache(folder)


def test_large_folders_are_checked_where_they_are_read(folder, monkeypatch):
    monkeypatch.setattr(latent_cache, "FULL_CHECK_BYTES", 0)
    flip_bit(folder / "latents-000000004.npy", 8 * 200)
    cache = LatentCache(folder)
    for index in (0, 3, 8, 9):
        cache.read(index, True)
    for index in (4, 7):
        with pytest.raises(LatentCacheError, match=r"latents-000000004\.npy is damaged"):
            cache.read(index, False)


def test_a_file_that_is_cut_short_later_is_an_error_and_not_the_end_of_the_process(folder):
    cache = LatentCache(folder)
    path = folder / "latents-000000008.npy"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(LatentCacheError, match=r"latents-000000008\.npy was cut short"):
        cache.read(9, True)


def test_more_files_than_a_process_may_open_are_read(tmp_path):
    resource = pytest.importorskip("resource")
    manifest = manifest_of(count=300, shard_size=1, id2label={})
    claim_latents(tmp_path, manifest, np.zeros(300, dtype=np.int64))
    for shard in shard_folder(tmp_path, manifest).ranges:
        path = shard_folder(tmp_path, manifest).path(shard)
        write_latents(path, values_of(shard.start, manifest)[None], {})
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (250, before[1]))
    try:
        cache = LatentCache(tmp_path)
        for index in range(300):
            assert cache.read(index, False).numpy().tobytes() == values_of(index, manifest)[0].tobytes()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_folders_without_checksums_are_read_and_say_so(folder):
    source = latents_source(without_checksums(folder))
    assert "checksums" in source.note and "checksums" in source.describe_size()
    assert torch.equal(source.latents.read(9, True), torch.from_numpy(values_of(9, manifest_of())[1]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 1, "has label 3, the classes are 0 to 2"),
        (LABELS - 1, "has label -1, the classes are 0 to 2"),
        (LABELS.astype(float), "holds float64"),
        (LABELS[:, None], r"holds int64 \(10, 1\)"),
        (LABELS[:5], r"holds int64 \(5,\)"),
        (LABELS.astype(object), "is damaged"),
        (LABELS.astype(str), "holds <U21"),
    ],
)
def test_wrong_labels_are_refused(folder, labels, message):
    without_checksums(folder)
    with (folder / "labels.npy").open("wb") as file:
        np.save(file, labels, allow_pickle=True)
    with pytest.raises(LatentCacheError, match=message):
        LatentCache(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: np.full_like(a, np.nan), "image 9 are NaN or infinite"),
        (lambda a: a * np.float32(np.inf), "image 9 are NaN or infinite"),
        (lambda a: a.astype(np.float64), "holds float64"),
        (lambda a: a.astype(np.int32), "holds int32"),
        (lambda a: a[:, :1], r"holds float32 \(2, 1"),
        (lambda a: a.astype(object), "holds object"),
        (lambda a: a.T.copy().T, "holds float32"),  # its order is another
    ],
)
def test_wrong_latents_are_refused(folder, change, message):
    without_checksums(folder)
    changed = change(np.load(folder / "latents-000000008.npy"))
    with (folder / "latents-000000008.npy").open("wb") as file:
        np.save(file, changed, allow_pickle=True)
    with pytest.raises(LatentCacheError, match=message):
        LatentCache(folder).read(9, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count=0 is not"), ({"count": "10"}, "count='10' is not"),
        ({"shard_size": -4}, "shard_size=-4"),
        ({"shape": (4, 2)}, "shape="), ({"shape": (4, -2, 2)}, "shape=.*-2"), ({"flips": 3}, "flips=3 is not one of 1"),
        ({"dtype": "int8"}, "dtype='int8'"), ({"shape": (8, 2, 2)}, "shape=.* is not that of latents of Auto"),
        ({"resolution": 32}, "shape=.* is not that of latents of Auto"),
        ({"id2label": {"1": "b"}}, "id2label="), ({"resolution": 1.5}, "resolution=1.5"),
    ],
)  # fmt: skip
def test_manifests_with_senseless_values_are_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        manifest_of(**changes)
    without_checksums(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(LatentCacheError, match=rf"manifest\.json is damaged \({message}"):
        LatentCache(folder)


def describe_as_before(folder, **changes):
    """A manifest as it was before there were descriptions of latents."""
    manifest = json.loads((without_checksums(folder) / "manifest.json").read_text())
    del manifest["latent_space"]
    (folder / "manifest.json").write_text(
        json.dumps({**manifest, "scaling_factor": 0.5, "shift_factor": 0.1, **changes})
    )


def test_folders_of_before_there_were_descriptions_are_read(folder):
    describe_as_before(folder)
    cache = LatentCache(folder)
    assert cache.manifest.latent_space == replace(SPACE, mean=(0.1,))
    assert torch.equal(cache.read(9, True), torch.from_numpy(values_of(9, manifest_of())[1]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling_factor": float("nan")}, "scaling_factor=nan is not"),
        ({"scaling_factor": 0}, "scaling_factor=0 is not"), ({"shift_factor": "0"}, "shift_factor='0' is not"),
        ({"latent_space": {"autoencoder": "VQModel"}}, "VQModel"), ({"latent_space": [1]}, "describes no latents"),
        ({"latent_space": {**asdict(SPACE), "std": [float("nan")]}}, "std="),
        ({"latent_space": {**asdict(SPACE), "scale": 1}}, "scale"),
    ],
)  # fmt: skip
def test_senseless_descriptions_are_refused(folder, changes, message):
    describe_as_before(folder, **changes)
    with pytest.raises(LatentCacheError, match=rf"manifest\.json is damaged \(.*{message}"):
        LatentCache(folder)


def test_statistics_of_other_latents_are_refused(folder, tmp_path):
    for changes in ({"vae_digest": "w"}, {"fingerprint": "g"}, {"count": 9}, {"flips": 1},
                    {"latent_space": replace(SPACE, autoencoder="AutoencoderKLFlux2")}):  # fmt: skip
        other = write_folder(tmp_path / "-".join(changes), **changes)
        shutil.copy(other / "statistics.json", folder)
        with pytest.raises(LatentCacheError, match=r"statistics\.json was measured on other latents"):
            LatentCache(folder)


@pytest.mark.parametrize(("index", "flipped"), [(-1, False), (COUNT, True), (0, True)])
def test_images_that_are_not_there_are_refused(tmp_path, index, flipped):
    cache = LatentCache(write_folder(tmp_path / "latents", flips=1))
    with pytest.raises(LatentCacheError, match=r"no (mirror )?image"):
        cache.read(index, flipped)
