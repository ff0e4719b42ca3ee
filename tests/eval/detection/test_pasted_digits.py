"""The pasted digits: boxes and masks are exact, parts have nothing in common, a seed always writes the same."""

import json

import numpy as np
import PIL.Image
import pytest
from helpers.data import source
from helpers.pasted_digits import LARGEST, SMALLEST, main, parts_of, paste, runs_of, write_pasted_digits
from pycocotools import mask as rle

from d_emo.images.coco import coco_objects
from d_emo.images.digits import DIGIT_NAMES

PHOTOS = source(["photo"], [0] * 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """40 pictures to train on and 20 to test on."""
    return write_pasted_digits(tmp_path_factory.mktemp("digits"), PHOTOS, {"train": 40, "test": 20}, side=96)


def test_the_house_reads_what_was_written(folders):
    for name, size in (("train", 40), ("test", 20)):
        objects = coco_objects(folders[name], folders[name] / "instances.json")
        assert objects.size == size and objects.has_masks and list(objects.id2label.values()) == list(DIGIT_NAMES)
        assert (objects.counts[9::10] == 0).all() and objects.counts.max() > 3
        for index in range(size):
            scene = objects.read(index)
            assert scene.image.size == (96, 96) and not scene.crowd.any()
            assert (scene.masks.sum(axis=0) <= 1).all()  # none over another
            for box, mask, area in zip(scene.boxes, scene.masks, scene.areas, strict=True):
                rows, columns = np.nonzero(mask)
                assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert area == mask.sum() > 10
                assert (box[2:] - box[:2]).max() <= LARGEST and (box[2:] - box[:2]).max() > SMALLEST / 2
    labels = np.concatenate([objects.read(index).labels for index in range(size)])
    assert len(np.unique(labels)) > 5


def test_a_mask_has_the_pixels_that_were_changed():
    random = np.random.default_rng(0)
    scans, photos = parts_of(PHOTOS)["train"]
    for index in range(20):
        before = np.array(photos.read(0).resize((80, 80)))
        pixels, taken = before.copy(), np.zeros((80, 80), dtype=bool)
        mask = paste(pixels, taken, scans.read(index), random)
        changed = (pixels != before).any(axis=2)
        assert not (changed & ~mask).any() and changed.sum() > 0.97 * mask.sum()
        assert (taken & mask).sum() == mask.sum()
    full = np.ones((80, 80), dtype=bool)
    assert paste(pixels, full, scans.read(0), random) is None


def test_runs_are_cocos():
    random = np.random.default_rng(0)
    for mask in (random.uniform(size=(7, 5)) < 0.5, np.ones((3, 4), bool), np.zeros((3, 4), bool)):
        height, width = mask.shape
        packed = rle.frPyObjects({"size": [height, width], "counts": runs_of(mask)}, height, width)
        assert (np.asarray(rle.decode([packed])[..., 0]) == mask).all()


def test_test_has_other_digits_and_other_photos():
    parts = parts_of(PHOTOS)
    pictures, digits = (
        {name: [part[place].read(index).tobytes() for index in range(part[place].size)] for name, part in parts.items()}
        for place in (1, 0)
    )
    assert [len(pictures[name]) for name in ("train", "test")] == [10, 2]
    assert not {*pictures["train"]} & {*pictures["test"]}
    assert [len(digits[name]) for name in ("train", "test")] == [1437, 360]
    assert len({*digits["train"]} & {*digits["test"]}) <= 1  # two of the 1,797 scans are alike


def test_a_seed_always_writes_the_same(folders, tmp_path):
    again = write_pasted_digits(tmp_path / "a", PHOTOS, {"train": 40, "test": 20}, side=96)
    other = write_pasted_digits(tmp_path / "b", PHOTOS, {"train": 2, "test": 2}, side=96, seed=1)
    for name, folder in folders.items():
        for path in sorted(folder.iterdir()):
            assert path.read_bytes() == (again[name] / path.name).read_bytes()
        assert (folder / "000000.png").read_bytes() != (other[name] / "000000.png").read_bytes()


def test_the_command_takes_a_folder_of_photos_and_refuses_too_few(tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(5):
        PHOTOS.read(index).save(tmp_path / "photos" / f"{index}.png")
    main(["--photos", str(tmp_path / "photos"), "--output-dir", str(tmp_path / "out"), "--side", "64",
          "--train-images", "3", "--test-images", "2"])  # fmt: skip
    listed = json.loads((tmp_path / "out" / "train" / "instances.json").read_text())
    assert len(listed["images"]) == 3 and len(listed["categories"]) == 10
    assert PIL.Image.open(tmp_path / "out" / "test" / "000001.png").size == (64, 64)
    (tmp_path / "photos" / "0.png").unlink()
    with pytest.raises(ValueError, match="photos has 4 photos; 5 or more"):
        main(["--photos", str(tmp_path / "photos"), "--output-dir", str(tmp_path / "other")])
    assert not (tmp_path / "other").exists()
