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
        (lambda c: c["images"][0].update(file_name="two.jpg"), r"names .*two\.jpg, which is not there"),
        (lambda c: c["images"][0].update(file_name="../one.jpg"), "no name of a file in its folder"),
        (lambda c: c["annotations"][0].update(image_id=6), "image 6, which is not among its images"),
        (lambda c: c["annotations"][0]["segments_info"][0].update(category_id=1), "category 1, which is none"),
        (lambda c: c["categories"][0].pop("id"), "no whole number as its id"),
        (lambda c: c["categories"][1].update(id=7), "the same id"),
        (lambda c: c["categories"][1].update(name="sky"), "the same name"),
        (lambda c: c.update(annotations=[]), "no list of annotations"),
        (lambda c: c.update(categories={}), "no list of categories"),
        (lambda c: c["annotations"][0].pop("segments_info"), "no 'segments_info'"),
    ],
)  # fmt: skip
def test_files_that_do_not_go_together(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        panoptic_pixels(write_panoptic(tmp_path, change), tmp_path)


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
