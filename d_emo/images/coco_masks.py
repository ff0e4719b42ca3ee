"""COCO's two ways to write a mask, decoded without native code: outlines, and runs of zeros and ones.

Source of both forms: the COCO API's `maskApi.c` (github:cocodataset/cocoapi), whose pixels these are. Its own decoder
trusts the lengths that it reads; here what does not add up is refused.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

# Outlines are walked on a grid this much finer than the pixels.
FINER = 5
MIDDLE = 2  # of a pixel on that grid
# Columns that an outline's edges may cross, and bits that a run may take.
MOST_CROSSINGS = 20_000_000
MOST_BITS = 40
FEWEST_NUMBERS = 6  # of an outline: three corners


def pack(shape: Any, sides: tuple[int, int]) -> bytes | None:
    """What is kept of an annotation's `segmentation`, checked; None where it is no mask.

    Args:
        shape: a list of outlines, each x, y, x, y, ...; or runs, {"size": [height, width], "counts": list or text}.
        sides: width and height of the picture; zeros where they are unknown.

    Raises:
        ValueError: it is something else, or damaged; the message is the end of a sentence.
    """
    if isinstance(shape, dict):
        height, width = _size(shape.get("size"))
        if min(sides) > 0 and (width, height) != tuple(sides):
            raise ValueError(f"its mask is of {width} x {height} pixels, the picture of {sides[0]} x {sides[1]}")
        runs(shape.get("counts"), height * width)
        return json.dumps(shape).encode()
    if shape is None or shape == []:
        return None
    if not isinstance(shape, list):
        raise ValueError("its segmentation is neither a list of outlines nor runs")
    if isinstance(shape[0], int | float):  # one outline that is not in a list
        shape = [shape]
    kept = []
    for outline in shape:
        if not isinstance(outline, list) or len(outline) % 2:
            raise ValueError("an outline of its segmentation is no list of x, y, x, y, ...")
        if not all(type(value) in (int, float) and abs(value) < 1e6 for value in outline):
            raise ValueError("an outline of its segmentation holds what is no place in a picture")
        if len(outline) >= FEWEST_NUMBERS:
            kept.append(outline)
    return json.dumps(kept).encode() if kept else None


def unpack(packed: bytes, height: int, width: int) -> np.ndarray:
    """The mask (height, width) bool of what `pack` kept.

    Raises:
        ValueError: the picture has another size, or an outline's edges cross too many columns.
    """
    shape = json.loads(packed)
    if isinstance(shape, dict):
        if _size(shape["size"]) != (height, width):
            raise ValueError(f"a mask is of {shape['size'][1]} x {shape['size'][0]} pixels, not {width} x {height}")
        return mask_of_runs(runs(shape["counts"], height * width), height, width)
    mask = np.zeros((height, width), dtype=bool)
    for outline in shape:
        mask |= mask_of_outline(outline, height, width)
    return mask


def _size(size: Any) -> tuple[int, int]:
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise ValueError("its mask has no size [height, width]")
    return size[0], size[1]


def runs(counts: Any, pixels: int) -> list[int]:
    """Lengths of runs, zeros first, down the columns; compressed or not.

    Raises:
        ValueError: they are not of so many pixels in all.
    """
    if isinstance(counts, str):
        counts = _uncompressed(counts, pixels)
    if not isinstance(counts, list) or not all(type(count) is int and 0 <= count <= pixels for count in counts):
        raise ValueError("its mask's counts are no lengths of runs")
    if sum(counts) != pixels:
        raise ValueError(f"its mask's counts are {sum(counts):,} pixels, not {pixels:,}")
    return counts


def _uncompressed(text: str, pixels: int) -> list[int]:
    """COCO's text: 5 bits a character, the lowest first, the sixth says that more follow; from the fourth number on
    differences to the last but one.
    """
    counts: list[int] = []
    value = bits = 0
    for character in text:
        part = ord(character) - 48
        if not 0 <= part < 64 or bits > MOST_BITS or len(counts) > pixels + 1:
            raise ValueError("its mask's counts are damaged")
        value |= (part & 31) << bits
        bits += 5
        if part & 32:
            continue
        if part & 16:
            value -= 1 << bits
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        value = bits = 0
    if bits:
        raise ValueError("its mask's counts are cut short")
    return counts


def mask_of_runs(counts: Sequence[int], height: int, width: int) -> np.ndarray:
    """Runs of zeros and ones down the columns -> (height, width) bool."""
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def mask_of_outline(outline: Sequence[float], height: int, width: int) -> np.ndarray:
    """An outline x, y, x, y, ... in pixels -> (height, width) bool, filled by the even-odd rule, COCO's pixels.

    COCO walks the edges on a finer grid; where they cross the middle of a column of pixels, the column changes from
    out to in or back. Here the crossings alone are computed, so that corners far outside cost nothing.

    Raises:
        ValueError: its edges cross too many columns.
    """
    corners = np.trunc(FINER * np.array(outline, dtype=np.float64).reshape(-1, 2) + 0.5).astype(np.int64)  # (E, 2)
    following = np.roll(corners, -1, axis=0)
    reach = np.abs(following - corners)  # (E, 2)
    level = reach[:, 0] >= reach[:, 1]  # goes along x
    back = np.where(level, corners[:, 0] > following[:, 0], corners[:, 1] > following[:, 1])
    first, last = (np.where(back[:, None], a, b) for a, b in ((following, corners), (corners, following)))
    rise = np.where(level, last[:, 1] - first[:, 1], last[:, 0] - first[:, 0]) / np.maximum(reach.max(axis=1), 1)
    # Column c is crossed between the places 5 c + 2 and 5 c + 3 of the grid, at most once by an edge.
    left, right = np.minimum(first[:, 0], last[:, 0]), np.maximum(first[:, 0], last[:, 0])
    start = np.maximum(-((MIDDLE - left) // FINER), 0)
    count = np.maximum(np.minimum((right - MIDDLE - 1) // FINER, width - 1) - start + 1, 0)  # (E,)
    if (total := int(count.sum())) > MOST_CROSSINGS:
        raise ValueError(f"the edges of an outline cross columns {total:,} times; at most {MOST_CROSSINGS:,} are drawn")
    edge = np.repeat(np.arange(len(count)), count)  # (C,)
    column = start[edge] + np.arange(total) - np.repeat(np.cumsum(count) - count, count)
    middle = FINER * column + MIDDLE
    y = np.where(
        level[edge],
        _height_of_level(first[edge], rise[edge], middle),
        _height_of_steep(first[edge], rise[edge], middle),
    )
    row = np.ceil(np.clip((y + 0.5) / FINER - 0.5, 0, height))
    changes = (column * height + row).astype(np.int64)
    inside = np.bincount(changes, minlength=height * width + 1)[: height * width].cumsum() % 2 == 1
    return inside.reshape(width, height).T


def _height_of_level(first: np.ndarray, rise: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """The lesser y of an edge along x at `middle` and one further."""
    steps = middle - first[:, 0]
    return np.minimum(*(np.trunc(first[:, 1] + rise * place + 0.5) for place in (steps, steps + 1)))


def _height_of_steep(first: np.ndarray, rise: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """The last y of an edge along y before its rounded x goes from `middle` to one further, or back."""

    def before(steps: np.ndarray) -> np.ndarray:
        x = np.trunc(first[:, 0] + rise * steps + 0.5)
        return np.where(rise > 0, x <= middle, x > middle)

    steps = np.floor((middle + 0.5 - first[:, 0]) / np.where(rise == 0, 1, rise))
    steps -= ~before(steps)
    steps += before(steps + 1)
    return first[:, 1] + steps
