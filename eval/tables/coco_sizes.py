"""The sizes in which a detector of the paper sees COCO's pictures, from the file of annotations alone.

mmdet counts multiply-adds as the mean over the first 100 images of the validation set, in the file's order (not that of
their ids), each as its test pipeline gives it: resized so that the longer side is 1333 at most and the shorter one 800
at most, keeping the ratio, and padded to multiples of 32. Source: mmdet 3, tools/analysis_tools/get_flops.py, and the
authors' configurations of RetinaNet and Mask R-CNN.
"""

from pathlib import Path
from typing import Any

from d_emo.common.checks import whole
from d_emo.common.files import read_json

COUNTED = 100  # images of which mmdet takes the mean
LONGER, SHORTER = 1333, 800
MULTIPLE = 32
LARGEST_SIDE = 1_000_000
REMEDY = "give COCO's instances_val2017.json"


def resized(width: int, height: int) -> tuple[int, int]:
    """(width, height) as mmdet resizes it: scaled by the smaller of both ratios, halves rounded up."""
    scale = min(LONGER / max(width, height), SHORTER / min(width, height))
    return int(width * scale + 0.5), int(height * scale + 0.5)


def padded(side: int) -> int:
    """The next multiple of 32."""
    return -(-side // MULTIPLE) * MULTIPLE


def read_sizes(path: Path) -> list[tuple[int, int]]:
    """(height, width) of the first 100 images as a detector sees them, or of all where there are fewer.

    Raises:
        ValueError: the file is none of COCO's, or an image has no size, or one that resizing leaves nothing of.
        OSError: it cannot be read.
    """
    images = read_json(path, REMEDY).get("images")
    if not isinstance(images, list) or not images:
        raise ValueError(f"{path} has no list of images; {REMEDY}.")
    return [_as_seen(image, f"{path}, image {number}") for number, image in enumerate(images[:COUNTED], 1)]


def _as_seen(image: Any, place: str) -> tuple[int, int]:
    if not isinstance(image, dict):
        raise ValueError(f"{place} is no table; {REMEDY}.")
    width, height = (
        whole(image.get(side), f"{place}: {side}", most=LARGEST_SIDE, hint=REMEDY) for side in ("width", "height")
    )
    new = resized(width, height)
    if not all(new):
        raise ValueError(f"{place}: nothing is left of {width} x {height} in {LONGER} x {SHORTER}; {REMEDY}.")
    return padded(new[1]), padded(new[0])
