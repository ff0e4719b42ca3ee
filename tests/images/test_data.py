"""Image sources and preprocessing."""

import numpy as np
import PIL.Image
import pytest
import torch

from d_emo.images.decode import UnreadableImageError, center_crop, to_tensor
from d_emo.images.digits import digits_source
from d_emo.train.data.batches import Pixels, TrainingImages, collate
from d_emo.train.data.options import DataOptions
from d_emo.train.data.sources import load_source
from d_emo.train.diffusion.config import parse_config


def write_images(root, classes=("cat", "dog"), count=3, size=(20, 16)):
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            PIL.Image.new("RGB", size, (number * 100, index * 50, 7)).save(root / name / f"{index}.png")
    return root


def test_digits_are_the_default_and_are_not_mirrored():
    source = load_source(DataOptions())
    assert (source.size, source.channels, source.flip, source.resolution) == (1797, 1, False, 16)
    assert source.id2label[3] == "three"
    scan = np.asarray(source.read(0))
    assert scan.shape == (8, 8) and scan.max() == 239 and scan.min() == 0  # 15 of 16 grey levels, scaled to 255


def test_class_folders_give_names_in_order(tmp_path):
    source = load_source(DataOptions(train_data_dir=str(write_images(tmp_path / "pets"))))
    assert source.id2label == {0: "cat", 1: "dog"}
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.read(4).getpixel((0, 0)) == (100, 50, 7)
    assert source.name == "pets"


def test_the_identity_of_images_is_that_which_older_runs_remember(tmp_path):
    assert digits_source().identity() == {
        "data": "digits", "data_size": 1797, "data_fingerprint": "85581a193ab166d2"
    }  # fmt: skip
    pets = load_source(DataOptions(train_data_dir=str(write_images(tmp_path / "pets", ("cat", "dog", "n02099601")))))
    assert pets.identity() == {"data": "pets", "data_size": 9, "data_fingerprint": "0b66f24d7f0e68a8"}


def test_folders_named_by_wordnet_ids_get_english_names(tmp_path):
    source = load_source(DataOptions(train_data_dir=str(write_images(tmp_path, ("n02099601", "n01440764")))))
    assert source.id2label == {0: "tench", 1: "golden retriever"}


def test_images_below_class_folders_belong_to_the_class(tmp_path):
    write_images(tmp_path / "cat", ("tabby", "siamese"))
    write_images(tmp_path / "dog", ("pug",))
    source = load_source(DataOptions(train_data_dir=str(tmp_path)))
    assert source.labels.tolist() == [0] * 6 + [1] * 3


def test_unconditional_folder_may_be_flat(tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    source = load_source(DataOptions(train_data_dir=str(tmp_path), unconditional=True))
    assert (source.size, source.id2label, source.labels.tolist()) == (1, {}, [0])


def parquet(tmp_path, labels, features=None, images=None):
    datasets = pytest.importorskip("datasets")
    pictures = images or [PIL.Image.new("RGB", (40, 33), (index, 0, 0)) for index in range(len(labels))]
    table = datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)
    path = tmp_path / "pictures.parquet"
    table.to_parquet(path)
    return str(path)


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_parquet_with_class_names(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["n02099601", "own"])})
    source = load_source(DataOptions(dataset=parquet(tmp_path, [1, 0, 1], features)))
    assert source.id2label == {0: "golden retriever", 1: "own"}
    assert source.labels.tolist() == [1, 0, 1]
    assert source.read(2).getpixel((0, 0)) == (2, 0, 0)
    assert (source.name, source.resolution) == ("pictures", 32)


@pytest.mark.parametrize(("labels", "names"), [(["b", "a", "b"], ["a", "b"]), ([7, 3, 7], ["3", "7"])])
def test_parquet_with_plain_labels(tmp_path, labels, names):
    source = load_source(DataOptions(dataset=parquet(tmp_path, labels)))
    assert list(source.id2label.values()) == names
    assert source.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "photo"}, "no column 'photo' among image, label; set --image-column"),
        ({"label_column": "fine"}, "no column 'fine'.*--label-column"),
    ],
)
def test_missing_columns_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        load_source(DataOptions(dataset=parquet(tmp_path, [0, 1]), **options))


def test_unlabelled_split_is_refused(tmp_path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    with pytest.raises(ValueError, match="without a label"):
        load_source(DataOptions(dataset=parquet(tmp_path, [-1, -1], features)))


def test_missing_sources_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        load_source(DataOptions(train_data_dir=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError, match=r"no class folders with images in it; expected .*/CLASS/IMAGE\.jpg"):
        load_source(DataOptions(train_data_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"nowhere\.parquet: cannot be opened"):
        load_source(DataOptions(dataset=str(tmp_path / "nowhere.parquet")))


@pytest.mark.parametrize(
    "name", ["train_data_dir", "dataset", "latents", "class_names", "label_column", "dataset_split"]
)
def test_an_empty_name_is_refused_and_is_not_the_digits(name, capsys):
    with pytest.raises(SystemExit):
        parse_config([f"--{name.replace('_', '-')}", ""])
    assert "is empty; name what is meant, or leave it out" in capsys.readouterr().err


def test_a_folder_of_images_without_classes_is_told_how_to_be_used(tmp_path):
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"no class folders .*1 beside the class folders.*without classes: --uncond"):
        load_source(DataOptions(train_data_dir=str(tmp_path)))


def test_empty_class_folders_are_named(tmp_path):
    write_images(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="class folders without images: empty"):
        load_source(DataOptions(train_data_dir=str(tmp_path)))


def test_a_broken_image_is_named_and_replaced_by_the_next(tmp_path):
    write_images(tmp_path)
    broken = tmp_path / "cat" / "1.png"
    broken.write_bytes(broken.read_bytes()[:40])
    source = load_source(DataOptions(train_data_dir=str(tmp_path)))
    with pytest.raises(UnreadableImageError, match=r"cat/1\.png cannot be read"):
        source.read(1)
    batch = collate([TrainingImages(source, Pixels(3, 16, False, 0))[(0, index)] for index in range(3)])
    assert len(batch.bad_images) == 1 and "cat/1.png" in batch.bad_images[0]
    assert torch.equal(batch.images[1], batch.images[2])


def test_a_broken_first_row_of_a_dataset_is_left_to_training(tmp_path):
    import datasets

    good = write_images(tmp_path / "pets", ("cat",)) / "cat" / "0.png"
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": b"no image"}, {"bytes": good.read_bytes()}], "label": [0, 0]}
    )
    table.to_parquet(tmp_path / "broken.parquet")
    source = load_source(DataOptions(dataset=str(tmp_path / "broken.parquet")))
    assert source.resolution == 16
    with pytest.raises(UnreadableImageError, match="row 0 cannot be read"):
        source.read(0)


def test_nothing_readable_is_an_error(tmp_path):
    write_images(tmp_path, ("cat",), 1)
    (tmp_path / "cat" / "0.png").write_bytes(b"no image")
    source = load_source(DataOptions(train_data_dir=str(tmp_path)))
    with pytest.raises(UnreadableImageError, match="none of the"):
        TrainingImages(source, Pixels(3, 16, False, 0))[(0, 0)]


def adm_crop(image, size):
    """ADM's centre crop, restated in its own order of operations."""
    while min(*image.size) >= 2 * size:
        image = image.resize(tuple(x // 2 for x in image.size), resample=PIL.Image.BOX)
    scale = size / min(*image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=PIL.Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("size", [(500, 375), (64, 64), (33, 200), (20, 31)])
def test_center_crop_equals_adms(size):
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = PIL.Image.fromarray(pixels)
    np.testing.assert_array_equal(np.asarray(center_crop(image, 32)), adm_crop(image, 32))


def test_tensors_span_minus_one_to_one():
    pixels = np.array([[0, 255], [128, 64]], dtype=np.uint8)
    tensor = to_tensor(PIL.Image.fromarray(pixels), 1, 2)
    torch.testing.assert_close(tensor, torch.tensor([[[-1, 1], [128 / 127.5 - 1, 64 / 127.5 - 1]]]))
    assert to_tensor(PIL.Image.new("RGBA", (5, 4)), 3, 4).shape == (3, 4, 4)


def test_flips_depend_on_the_position_only():
    images = TrainingImages(digits_source(), Pixels(1, 16, True, 0))
    plain = TrainingImages(digits_source(), Pixels(1, 16, False, 0))
    flipped = [torch.equal(images[(p, 9)][0], plain[(p, 9)][0].flip(-1)) for p in range(40)]
    assert 8 < sum(flipped) < 32
    assert torch.equal(images[(3, 9)][0], images[(3, 9)][0])


@pytest.mark.parametrize("name", ["cifar10-test.parquet", "imagenet-one-per-class-256.parquet"])
def test_real_parquet_files_load(shared, name):
    source = load_source(DataOptions(dataset=str(shared / "data" / name)))
    assert len(source.id2label) in (10, 1000)
    assert to_tensor(source.read(5), 3, 32).shape == (3, 32, 32)
    if len(source.id2label) == 1000:
        assert source.id2label[207] == "golden retriever"


@pytest.mark.parametrize("name", ["attention_spanning", "dit_diffusion", "sit_transport"])
def test_golden_copies_are_the_shared_ones(shared, name):
    from helpers.paths import GOLDEN

    assert (GOLDEN / f"{name}.json").read_text() == (shared / "golden" / f"{name}.json").read_text()
