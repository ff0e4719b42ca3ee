"""What is found out when images are opened, before anything is learned from them or scored."""

import numpy as np
import PIL.Image
import pytest
from diffusers import AutoencoderKL
from helpers.damage import DAMAGES
from helpers.data import photo

from d_emo.eval.fid.image_sets import open_set
from d_emo.images import shards
from d_emo.images.autoencoders import open_vae
from d_emo.images.folders import folder_source
from d_emo.images.shards import tar_source
from d_emo.images.tables import source_name
from d_emo.train.data.options import DataOptions
from d_emo.train.data.sources import load_source

datasets = pytest.importorskip("datasets")


def class_folders(root, names=("ant", "bee"), count=2):
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(count):
            photo(index).save(root / name / f"{index}.png")
    return root


@pytest.mark.parametrize("target", [".", "..", "../..", "/", "{root}", "link"])
def test_a_class_folder_that_leads_to_a_folder_around_it_is_no_class(tmp_path, target):
    root = class_folders(tmp_path / "around" / "root")
    if target == "link":  # a link to such a link
        (tmp_path / "outside").symlink_to(root)
        target = tmp_path / "outside"
    (root / "loop").symlink_to(str(target).format(root=root))
    source = folder_source(root, unconditional=False)
    assert list(source.id2label.values()) == ["ant", "bee"] and source.size == 4
    assert source.note == "left out: 1 links to a folder around them"


@pytest.mark.parametrize("values", [[None, None], [b"", b""], [b"no picture"] * 3])
def test_a_table_without_a_readable_picture_is_named_with_its_option(tmp_path, values):
    path = tmp_path / "t.parquet"
    rows = {"image": [{"bytes": value, "path": None} if value is not None else None for value in values]}
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict({**rows, "label": [0] * len(values)}, features=features).cast_column(
        "image", datasets.Image()
    ).to_parquet(path)
    with pytest.raises(ValueError, match=r"--dataset .*t\.parquet: no image of the data set can be read; the first"):
        load_source(DataOptions(dataset=str(path)))


def wide(kind, value=3):
    return PIL.Image.fromarray(np.full((8, 8), value, dtype=kind))


@pytest.mark.parametrize("suffix", [".tif", ".TIFF"])
def test_pictures_without_a_defined_white_are_refused_at_opening_unless_they_are_skipped(tmp_path, suffix):
    root = class_folders(tmp_path / "root")
    for name in ("2", "3"):
        wide(np.int32).save(root / "ant" / f"{name}{suffix}", format="TIFF")
    wide(np.uint16).save(root / "ant" / f"4{suffix}", format="TIFF")
    wide(np.float32, 0.5).save(root / "ant" / f"5{suffix}", format="TIFF")
    message = rf"2\{suffix} cannot be read \(.*white is not defined.*\), and 1 more"
    with pytest.raises(ValueError, match=rf"--train-data-dir .*{message}.*--on-bad-image skip"):
        load_source(DataOptions(train_data_dir=str(root)))
    with pytest.raises(ValueError, match=message):
        open_set(str(root), size=(8, 8))
    assert load_source(DataOptions(train_data_dir=str(root), on_bad_image="skip")).size == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("names.txt", b"ant\nb\xe9e\n", r"line 2 is not in UTF-8"),
        ("names.txt", b"", r"there is nothing in it"),
        ("names.txt", b"ant\n\nbee", r"line 2 is empty"),
        ("names.txt", b"ant\nbee\n ant", r"line 3 repeats 'ant' of line 1"),
        ("names.json", b'["ant", "ant"]', r"id 1 repeats 'ant' of id 0"),
        ("names.json", b'{"0": "ant", "2": "bee"}', r"there is no '1'"),
        ("names.json", b"\xff{}", r"line 1 is not in UTF-8"),
    ],
)
def test_files_of_class_names_are_refused_by_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"--class-names .*{name}: .*{message}"):
        load_source(DataOptions(dataset=str(tmp_path / "a.tar"), class_names=str(tmp_path / name)))


@pytest.fixture
def shard(tmp_path, monkeypatch):
    import io
    import tarfile

    monkeypatch.setenv("D_EMO_CACHE", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for number in range(4):
            picture = io.BytesIO()
            photo(number).save(picture, "PNG")
            for suffix, content in (("png", picture.getvalue()), ("cls", str(number % 2).encode())):
                info = tarfile.TarInfo(f"{number}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return tmp_path / "a.tar"


def other_index(path):
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **{**arrays, "labels": arrays["labels"] + 7})


def short_index(path):
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **{**arrays, "offsets": arrays["offsets"][:2]})


def objects(path):
    with np.load(path) as stored:
        arrays = dict(stored)
    np.savez(path, **{**arrays, "names": np.array(["a", {}], dtype=object)})


@pytest.mark.parametrize("damage", [*DAMAGES.values(), other_index, short_index, objects])
def test_a_damaged_list_of_a_shard_is_made_again(shard, tmp_path, damage):
    expected = tar_source(str(shard))
    (kept,) = (tmp_path / "cache" / "tar-index").iterdir()
    damage(kept)
    for _ in range(2):
        found = tar_source(str(shard))
        assert found.labels.tolist() == expected.labels.tolist() == [0, 1, 0, 1]
        assert all(found.read(i).tobytes() == expected.read(i).tobytes() for i in range(4))
    assert kept.is_file() and not kept.is_symlink()


def test_shards_are_read_where_their_list_cannot_be_kept(shard, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert tar_source(str(shard)).size == 4


def test_ranges_of_shards_beyond_any_data_set_are_refused_at_once():
    with pytest.raises(ValueError, match="more than 1,000,000 files"):
        shards.expand_braces("train-{0..99999999999}.tar")


def test_a_label_that_is_no_text_is_named_with_its_member(tmp_path, shard):
    content = bytearray(shard.read_bytes())
    place = content.index(b"1.cls")
    content[place + 512] = 0xFF
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.tar .*1\.cls is no text in UTF-8"):
        tar_source(str(shard))


@pytest.mark.parametrize("damage", ["cut short", "empty", "overwritten", "deleted"])
@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_damaged_vae_is_named_and_nothing_is_fetched_in_its_place(tmp_path, offline, name, damage):
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(tmp_path)
    DAMAGES[damage](tmp_path / name)
    with pytest.raises(ValueError, match="its VAE does not load") as error:
        open_vae(str(tmp_path))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_a_data_set_is_called_by_its_id_or_its_own_name(tmp_path, monkeypatch):
    (tmp_path / "my pictures").mkdir()
    assert source_name("someone/cats") == "someone--cats"
    assert source_name("pictures/train.parquet") == "train"
    assert source_name(str(tmp_path / "my pictures")) == "my pictures"
    monkeypatch.chdir(tmp_path / "my pictures")
    assert source_name(".") == "my pictures"
