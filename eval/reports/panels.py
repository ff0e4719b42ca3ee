"""Pictures beside each other under captions, frames in a strip, legends, and the colours of classes."""

import functools
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from d_emo.common.messages import printable

Colour = tuple[int, int, int]

# Colours of classes: as many as bytes have values besides the one that says that there is no label. Neither greys nor
# dark ones, which a photo has itself.
NUM_COLOURS = 255
LEVELS = (0, 36, 73, 109, 146, 182, 219, 255)
LEAST_SATURATION, LEAST_VALUE = 73, 146
# How much the eye sees of a difference in red, green and blue, about.
SEEN = (0.55, 0.77, 0.33)
TEXT = 13
LINE = TEXT + 5
GAP = 6
# What is drawn lies on white, whatever the page's colour.
GROUND, INK = (255, 255, 255), (32, 32, 32)
# A legend names so many classes at most.
LONGEST_LEGEND = 24


def class_colour(label: int) -> Colour:
    """The colour of a class id, the same in every report: RGB. After 255 classes they begin anew."""
    red, green, blue = palette()[label % NUM_COLOURS]
    return int(red), int(green), int(blue)


@functools.cache
def palette() -> np.ndarray:
    """(255, 3) RGB: red first, then always the colour that is farthest from all before it."""
    grid = np.array(list(itertools.product(LEVELS, repeat=3)))  # (512, 3)
    vivid = np.ptp(grid, axis=1) >= LEAST_SATURATION
    candidates = grid[vivid & (grid.max(axis=1) >= LEAST_VALUE)]
    seen = candidates * np.array(SEEN)
    chosen = [int(np.flatnonzero((candidates == (255, 36, 36)).all(axis=1))[0])]
    distances = np.full(len(candidates), np.inf)
    while len(chosen) < NUM_COLOURS:
        distances = np.minimum(distances, np.linalg.norm(seen - seen[chosen[-1]], axis=1))
        chosen.append(int(distances.argmax()))
    return candidates[chosen]


def readable_on(colour: Colour) -> Colour:
    """Black or white: what a text on this colour is written in."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def font(size: int = TEXT) -> PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont:
    """The font of everything that is written into pictures."""
    return PIL.ImageFont.load_default(size=size)


def scale_to(size: tuple[int, int], side: int) -> float:
    """What a picture of this (width, height) is multiplied by so that its longer side is `side` pixels."""
    return side / max(size)


def scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A (width, height) of the same proportions whose longer side is `side`."""
    factor = scale_to(size, side)
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def fitted(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """A picture with a longer side of `side` pixels: smaller ones are enlarged with visible pixels."""
    picture = picture.convert("RGB")
    larger = side > max(picture.size)
    resampling = PIL.Image.Resampling.NEAREST if larger else PIL.Image.Resampling.LANCZOS
    return picture.resize(scaled(picture.size, side), resampling)


def beside(panels: Sequence[PIL.Image.Image], captions: Sequence[str]) -> PIL.Image.Image:
    """Pictures in a row, each under its caption; at least one."""
    width = sum(panel.width for panel in panels) + GAP * (len(panels) - 1)
    row = PIL.Image.new("RGB", (width, LINE + max(panel.height for panel in panels)), GROUND)
    draw = PIL.ImageDraw.Draw(row)
    left = 0
    for panel, caption in zip(panels, captions, strict=True):
        draw.text((left + 2, 1), clipped(caption, panel.width), fill=INK, font=font())
        row.paste(panel.convert("RGB"), (left, LINE))
        left += panel.width + GAP
    return row


def above(pictures: Sequence[PIL.Image.Image]) -> PIL.Image.Image:
    """Pictures above each other, at the left; at least one."""
    height = sum(picture.height for picture in pictures) + GAP * (len(pictures) - 1)
    column = PIL.Image.new("RGB", (max(picture.width for picture in pictures), height), GROUND)
    top = 0
    for picture in pictures:
        column.paste(picture.convert("RGB"), (0, top))
        top += picture.height + GAP
    return column


def strip(frames: Sequence[PIL.Image.Image | np.ndarray], side: int = 160) -> PIL.Image.Image:
    """A clip's frames in a row, in their order.

    Args:
        frames: pictures, or arrays (H, W, 3) of uint8; at least one.
        side: the longer side of each, in pixels.
    """
    pictures = [PIL.Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame for frame in frames]
    return beside([fitted(picture, side) for picture in pictures], [str(number + 1) for number in range(len(frames))])


def legend(entries: Sequence[tuple[str, Colour]], width: int) -> PIL.Image.Image:
    """Names beside their colours, in lines of `width` pixels; of many, the first are named and the others counted."""
    shown = list(entries[:LONGEST_LEGEND])
    more = len(entries) - len(shown)
    texts = [(clipped(name, width - LINE - GAP), colour) for name, colour in shown]
    if more:
        texts.append((f"and {more} more", GROUND))
    places, left, top = [], 0, 0
    for text, colour in texts:
        length = LINE + round(font().getlength(text)) + 2 * GAP
        if left and left + length > width:
            left, top = 0, top + LINE
        places.append((left, top, text, colour))
        left += length
    picture = PIL.Image.new("RGB", (width, top + LINE), GROUND)
    draw = PIL.ImageDraw.Draw(picture)
    for left, top, text, colour in places:
        draw.rectangle((left + 2, top + 2, left + LINE - 4, top + LINE - 4), fill=colour)
        draw.text((left + LINE, top + 1), text, fill=INK, font=font())
    return picture


def clipped(text: str, width: int) -> str:
    """A text that is at most `width` pixels wide, as the font writes it; a longer one ends with dots."""
    text = printable(text)
    written = font()
    if written.getlength(text) <= width:
        return text
    while text and written.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def class_names(labels: Sequence[int], names: Mapping[int, str]) -> list[tuple[str, Colour]]:
    """Entries of a legend: each id's name, or the id where it has none, with its colour."""
    return [(names.get(label, str(label)), class_colour(label)) for label in labels]
