"""What public functions of `d_emo.images` are given that they cannot use: one line that names it, whatever it is."""

import numpy as np
import PIL.Image
import pytest

from d_emo.images import decode, folders, labels, latent_cache, listing, shards, source, stored_labels, tables
from d_emo.images.digits import digits_source
from d_emo.images.open_source import open_source

PICTURE = PIL.Image.new("RGB", (20, 10))
NO_NUMBERS = [None, 0, -1, 1.5, float("nan"), float("inf"), 10**12, "", "x", b"x", [], {}, True, np.zeros(2), range(2)]
NO_NAMES = [None, 0, 1.5, float("nan"), "", "\0", "a\0b", b"x", [], {}, True, np.zeros(2), range(2)]
NO_NUMBERED = {
    "width": lambda value: decode.center_crop(PICTURE, value),
    "height": lambda value: decode.center_crop(PICTURE, 4, 0 if value is None else value),
    "side": lambda value: decode.to_tensor(PICTURE, 3, value),
    "channels": lambda value: decode.to_pixels(PICTURE, value),
    "channels ": lambda value: decode.to_tensor(PICTURE, value, 4),
    "share": lambda value: source.held_out(digits_source(), value),
}
NAMED = {
    "--class-names": labels.read_class_names,
    "pattern": shards.tar_source,
    "dataset": tables.datasets_source,
    "folder": lambda value: open_source([] if value is None else value, None),
    "dataset ": lambda value: open_source(None, [] if value is None else value),
}
PATHS = {
    "root": lambda value: folders.folder_source(value, False),
    "root ": listing.list_classes,
    "root  ": listing.list_all,
    "folder": latent_cache.latents_source,
}


def refused(call, value, name):
    with pytest.raises(ValueError) as error:
        call(value)
    message = str(error.value)
    assert "\n" not in message and name.strip() in message and len(message) < 300
    for raw in ("NoneType'", "not supported between", "ambiguous", "has no attribute", "cannot convert"):
        assert raw not in message


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", NO_NUMBERED)
def test_what_is_no_number_is_refused_by_name(name, value):
    refused(NO_NUMBERED[name], value, {"side": "width"}.get(name, name))


@pytest.mark.parametrize("value", NO_NAMES, ids=repr)
@pytest.mark.parametrize("name", NAMED)
def test_what_is_no_name_is_refused_by_name(name, value):
    refused(NAMED[name], value, name)


@pytest.mark.parametrize("value", [value for value in NO_NAMES if not isinstance(value, str) or value], ids=repr)
@pytest.mark.parametrize("name", PATHS)
def test_what_is_no_path_is_refused_by_name(name, value):
    refused(PATHS[name], value, name)


@pytest.mark.parametrize("value", [None, 0, 1.5, "words", b"x", True, [1], range(2)], ids=repr)
def test_what_is_no_list_of_class_names_is_refused(value):
    refused(stored_labels.ClassNames, value, "class_names")


@pytest.mark.parametrize("value", [None, 0, "words", [], np.zeros(2), range(2)], ids=repr)
def test_what_is_no_table_of_names_is_refused(value):
    refused(lambda table: labels.LabelResolver(table, 3), value, "id2label")
    refused(lambda table: labels.normalize_id2label(table, 3), value, "id2label")


@pytest.mark.parametrize("value", [None, 3, [0.5], [-1], [1797], [[0]], ["a"], [True]], ids=repr)
def test_images_that_are_not_there_are_refused(value):
    refused(lambda indices: source.subset(digits_source(), indices), value, "indices")


@pytest.mark.parametrize("value", [None, 0, "picture.png", np.zeros((4, 4, 3), np.uint8)], ids=str)
def test_what_is_no_picture_is_refused(value):
    refused(lambda image: decode.center_crop(image, 4), value, "image")
