"""Objects drawn on their pictures: boxes and masks with names and scores, truth beside what was found."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageDraw

from d_emo.eval.reports.panels import TEXT, beside, class_colour, clipped, fitted, font, readable_on, scale_to

MASK_OPACITY = 0.45
WIDTH = 2


@dataclass(frozen=True)
class Objects:
    """What lies in a picture.

    Attributes:
        boxes: (N, 4) x1, y1, x2, y2 in pixels.
        labels: (N,) class ids.
        scores: (N,) in [0, 1]; None for the truth.
        masks: (N, H, W), true or over one half where the object is; None for boxes alone.
        crowd: (N,) whether it stands for many objects; None for no such.
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    masks: np.ndarray | None = None
    crowd: np.ndarray | None = None


def draw_objects(
    picture: PIL.Image.Image, objects: Objects, names: Mapping[int, str], *, side: int = 560
) -> PIL.Image.Image:
    """A picture with its objects, each in its class's colour; the likeliest on top.

    Args:
        picture: of any size.
        objects: with boxes and masks in the picture's pixels.
        names: of all classes.
        side: the longer side of what is drawn, in pixels.
    """
    drawn = fitted(picture, side)
    factor = scale_to(picture.size, side)
    order = list(range(len(objects.boxes)))
    if objects.scores is not None:
        order = [int(index) for index in np.argsort(objects.scores, kind="stable")]
    if objects.masks is not None:
        drawn = _with_masks(drawn, objects, order)
    draw = PIL.ImageDraw.Draw(drawn)
    for index in order:
        _draw_box(draw, drawn.size, objects.boxes[index] * factor, class_colour(int(objects.labels[index])))
    for index in order:
        box, colour = objects.boxes[index] * factor, class_colour(int(objects.labels[index]))
        _draw_name(draw, drawn.size, box, colour, _name(objects, index, names))
    return drawn


def compare_objects(
    picture: PIL.Image.Image, truth: Objects, found: Objects, names: Mapping[int, str], *, side: int = 560
) -> PIL.Image.Image:
    """The truth beside what was found; see `draw_objects`."""
    return beside(
        [draw_objects(picture, objects, names, side=side) for objects in (truth, found)],
        [f"truth ({len(truth.boxes)})", f"found ({len(found.boxes)})"],
    )


def _with_masks(drawn: PIL.Image.Image, objects: Objects, order: list[int]) -> PIL.Image.Image:
    assert objects.masks is not None
    for index in order:
        mask = np.asarray(objects.masks[index])
        shape = PIL.Image.fromarray(np.where(mask > 0.5, round(255 * MASK_OPACITY), 0).astype(np.uint8))
        colour = PIL.Image.new("RGB", drawn.size, class_colour(int(objects.labels[index])))
        drawn = PIL.Image.composite(colour, drawn, shape.resize(drawn.size, PIL.Image.Resampling.NEAREST))
    return drawn


def _name(objects: Objects, index: int, names: Mapping[int, str]) -> str:
    label = int(objects.labels[index])
    name = names.get(label, str(label))
    if objects.crowd is not None and objects.crowd[index]:
        name = f"{name} (crowd)"
    return name if objects.scores is None else f"{name} {float(objects.scores[index]):.2f}"


def _draw_box(
    draw: PIL.ImageDraw.ImageDraw, size: tuple[int, int], box: np.ndarray, colour: tuple[int, int, int]
) -> None:
    """A box, cut to the picture: PIL refuses one whose right edge is left of its left one."""
    left, top, right, bottom = _within(box, size)
    draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=WIDTH)


def _draw_name(
    draw: PIL.ImageDraw.ImageDraw, size: tuple[int, int], box: np.ndarray, colour: tuple[int, int, int], name: str
) -> None:
    """A name over the box's upper left corner, or within the box where there is no room above."""
    left, top, *_ = _within(box, size)
    text = clipped(name, size[0] - 4)
    width, height = round(font().getlength(text)) + 4, TEXT + 3
    left, top = min(left, size[0] - width), top - height if top >= height else top
    draw.rectangle((left, top, left + width, top + height), fill=colour)
    draw.text((left + 2, top), text, fill=readable_on(colour), font=font())


def _within(box: np.ndarray, size: tuple[int, int]) -> list[int]:
    limits = (size[0] - 1, size[1] - 1) * 2
    return [int(np.clip(np.nan_to_num(value), 0, limit)) for value, limit in zip(box, limits, strict=True)]
