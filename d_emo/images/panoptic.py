"""COCO's panoptic files as pictures with a class at every pixel: things against stuff, or all categories."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np

from d_emo.common.messages import printable
from d_emo.images.coco_lists import CocoList, existing, whole
from d_emo.images.mask_files import IGNORED, decode_colors
from d_emo.images.mask_pairs import find_folders
from d_emo.images.objects import distinct_names
from d_emo.images.pixels import MaskOptions, PixelSource, StoredPair, pixel_source

PanopticClasses = Literal["things", "categories"]
THINGS = ("stuff", "things")


def panoptic_pixels(
    annotations: Path, images: Path, masks: Path | None = None, classes: PanopticClasses = "categories"
) -> PixelSource:
    """Pictures and semantic classes of a panoptic JSON file and its PNG files.

    Pixels of segments, crowds among them, have their category's class; others are ignored. Pictures that have no
    annotation are left out.

    Args:
        annotations: the JSON file.
        images: folder of the pictures, or one that also holds the PNG files.
        masks: folder of the PNG files; None for the one beside the file that is called like it, or else one in or
            beside `images`, by a name such as "panoptic".
        classes: "things" for two (stuff, things), "categories" for all of the file's, in the order of their ids.

    Raises:
        ValueError: the file is none of that kind, or names files, categories or segments that are not there.
    """
    beside = annotations.with_suffix("")
    images, masks = find_folders(images, beside if masks is None and beside.is_dir() else masks)
    try:
        listed = CocoList(annotations)
        if not listed.panoptic:
            raise ValueError("its annotations have no list segments_info; pass COCO's panoptic JSON.")
        if classes == "things":
            names, ids = list(THINGS), {number: int(number not in listed.stuff) for number in listed.names}
        else:
            names = [*distinct_names(listed.names).values()]
            ids = {number: label for label, number in enumerate(listed.names)}
        pictures = listed.panoptic_pictures()
        if not pictures:
            raise ValueError("none of its annotations is of an image that it lists.")
        classes_of = [
            {whole(part, "id", "a segment"): ids[listed.category(part, "a segment")] for part in segments}
            for _, segments in pictures.values()
        ]
        image_files = existing(images, [listed.files[place] for place in pictures])
        mask_files = existing(masks, [file for file, _ in pictures.values()])
    except ValueError as error:
        raise ValueError(f"{printable(str(annotations))}: {error}") from error

    def stored(index: int) -> StoredPair:
        image, mask = image_files[index], mask_files[index]
        return StoredPair(image, str(image), lambda: _semantic(mask, classes_of[index]), str(mask))

    name = printable(annotations.resolve().parent.name)
    options = MaskOptions(class_names=names, ignore_index=IGNORED)
    return pixel_source(name, [image.name for image in image_files], stored, options, listed.note("annotations"))


def _semantic(file: Path, segments: Mapping[int, int]) -> np.ndarray:
    """(H, W) int32, the class of every pixel's segment, 255 where there is none."""
    numbers, places = np.unique(decode_colors(file, str(file)), return_inverse=True)
    return np.array([segments.get(int(n), IGNORED) for n in numbers], dtype=np.int32)[places].reshape(places.shape)
