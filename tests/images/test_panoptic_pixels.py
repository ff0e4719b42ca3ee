"""COCO's panoptic files as classes at every pixel."""

import json

import numpy as np
import pytest
from helpers.masks import blocks, write_panoptic

from d_emo.images.panoptic import panoptic_pixels


def test_categories_and_things_against_stuff(tmp_path):
    file, labels = write_panoptic(tmp_path), blocks()
    source = panoptic_pixels(file, tmp_path)
    assert source.id2label == {0: "dog", 1: "sky"}  # in the order of their ids
    assert np.array_equal(source.read(0).labels, np.array([1, 0, 255])[labels])
    source = panoptic_pixels(file, tmp_path / "images", tmp_path / "panoptic", "things")
    assert source.id2label == {0: "stuff", 1: "things"}
    assert np.array_equal(source.read(0).labels, np.array([0, 1, 255])[labels])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].update(file_name="two.jpg"), r"panoptic\.json: it names two\.jpg, which is not in"),
        (lambda c: c["images"][0].update(file_name="../two.jpg"), "leads out of"),
        (lambda c: c["annotations"][0].update(image_id=6), "none of its annotations is of an image"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(category_id=1), "segment has the category 1, which"),
        (lambda c: c["categories"][0].pop("id"), "the id None, which is no whole number"),
        (lambda c: c["categories"][1].update(id=7), "the same id"),
        (lambda c: c.update(annotations=[]), "its list 'annotations' is empty"),
        (lambda c: c.update(categories={}), "it has no list 'categories'"),
        (lambda c: c["annotations"][0].pop("segments_info"), "no list segments_info; pass COCO's panoptic JSON"),
    ],
)  # fmt: skip
def test_files_that_do_not_go_together(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        panoptic_pixels(write_panoptic(tmp_path, change), tmp_path)


def test_names_twice_stuff_that_does_not_say_so_and_annotations_of_no_image(tmp_path):
    def change(content):
        content["categories"][1].update(name="sky")
        del content["categories"][0]["isthing"]
        content["annotations"].append({**content["annotations"][0], "image_id": 6})

    file = write_panoptic(tmp_path, change)
    source = panoptic_pixels(file, tmp_path)
    assert source.id2label == {0: "sky (3)", 1: "sky (7)"}
    assert source.describe_size() == "1 image (left out: 1 annotations of images that are not listed)"
    things = panoptic_pixels(file, tmp_path, classes="things")
    assert np.array_equal(things.read(0).labels, np.array([0, 1, 255])[blocks()])


def test_the_pictures_lie_as_coco_has_them(tmp_path):
    """val2017/*.jpg, annotations/panoptic_val2017.json and annotations/panoptic_val2017/*.png."""
    write_panoptic(tmp_path)
    (tmp_path / "images").rename(tmp_path / "val2017")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "panoptic").rename(tmp_path / "annotations" / "panoptic_val2017")
    file = (tmp_path / "panoptic.json").rename(tmp_path / "annotations" / "panoptic_val2017.json")
    assert np.array_equal(panoptic_pixels(file, tmp_path / "val2017").read(0).labels, np.array([1, 0, 255])[blocks()])


def test_cocos_own_pictures(shared):
    folder = shared / "data" / "dense" / "coco" / "val"
    source = panoptic_pixels(folder / "panoptic.json", folder, classes="things")
    assert source.size == 27
    content = json.loads((folder / "panoptic.json").read_text())
    categories = {entry["id"]: entry["isthing"] for entry in content["categories"]}
    # Areas that COCO counted itself.
    for index in (0, 5):
        expected = [0, 0]
        for segment in content["annotations"][index]["segments_info"]:
            expected[categories[segment["category_id"]]] += segment["area"]
        counts = np.bincount(source.read(index).labels.ravel(), minlength=256)
        assert counts[:2].tolist() == expected
