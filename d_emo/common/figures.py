"""Pictures for people: rows of images under captions, or beside them."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import PIL.PngImagePlugin

from d_emo.common.files import written_whole

# Images smaller than this are enlarged, by whole factors, so that a person sees them.
MIN_SIDE = 48
CAPTION_HEIGHT = 16
# Of captions beside rows: no wider than this many pixels, and so far from what is around them.
CAPTION_WIDTH, MARGIN, GAP = 160, 6, 2


def caption_grid(rows: Sequence[Sequence[PIL.Image.Image]], captions: Sequence[str]) -> PIL.Image.Image:
    """Lay rows of equal images out as one picture, each row under its caption."""
    width, height = rows[0][0].size
    zoom = max(1, -(-MIN_SIDE // max(width, height)))
    width, height, gap = width * zoom, height * zoom, 2
    columns = max(len(row) for row in rows)
    grid = PIL.Image.new("RGB", (columns * (width + gap), len(rows) * (height + CAPTION_HEIGHT + gap)), "white")
    draw = PIL.ImageDraw.Draw(grid)
    font = PIL.ImageFont.load_default(size=12)
    for row_index, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = row_index * (height + CAPTION_HEIGHT + gap)
        draw.text((2, top), caption, fill="black", font=font)
        for column, image in enumerate(row):
            enlarged = image.convert("RGB").resize((width, height), PIL.Image.Resampling.NEAREST)
            grid.paste(enlarged, (column * (width + gap), top + CAPTION_HEIGHT))
    return grid


def beside_grid(rows: Sequence[Sequence[PIL.Image.Image]], captions: Sequence[str]) -> PIL.Image.Image:
    """Lay rows of equal images out as one picture, each row to the right of its caption; captions may be empty."""
    width, height = rows[0][0].size
    font = PIL.ImageFont.load_default(size=12)
    shown = [_cut(caption, font) for caption in captions]
    grid = PIL.Image.new("RGB", beside_grid_size(len(rows), max(map(len, rows)), (width, height), captions), "white")
    left, (width, height) = _left(captions), _enlarged((width, height))
    draw = PIL.ImageDraw.Draw(grid)
    for index, (row, caption) in enumerate(zip(rows, shown, strict=True)):
        top = index * (height + GAP)
        draw.text((left - MARGIN, top + height // 2), caption, fill="black", font=font, anchor="rm")
        for column, image in enumerate(row):
            enlarged = image.convert("RGB").resize((width, height), PIL.Image.Resampling.NEAREST)
            grid.paste(enlarged, (left + column * (width + GAP), top))
    return grid


def beside_grid_size(rows: int, columns: int, size: tuple[int, int], captions: Sequence[str]) -> tuple[int, int]:
    """Width and height of such a picture, for what has to be known before there are images; `size` is an image's."""
    width, height = _enlarged(size)
    return _left(captions) + columns * (width + GAP) - GAP, rows * (height + GAP) - GAP


def _enlarged(size: tuple[int, int]) -> tuple[int, int]:
    zoom = max(1, -(-MIN_SIDE // max(size)))
    return size[0] * zoom, size[1] * zoom


def _left(captions: Sequence[str]) -> int:
    """Pixels to the left of the images."""
    font = PIL.ImageFont.load_default(size=12)
    widest = max(math.ceil(font.getlength(_cut(caption, font))) for caption in captions)
    return widest + 2 * MARGIN if widest else 0


def _cut(caption: str, font: Any) -> str:
    """A caption that is not wider than `CAPTION_WIDTH`."""
    whole = caption
    while font.getlength(caption) > CAPTION_WIDTH:
        whole = whole[:-1]
        caption = whole.rstrip() + "..."
    return caption


def save_image(image: PIL.Image.Image, path: Path, kind: str = "PNG", texts: Mapping[str, str] | None = None) -> None:
    """Write a picture, whole.

    Args:
        image: it.
        path: its file.
        kind: Pillow's name of the format.
        texts: what a PNG says of itself, by keyword.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {}
    if texts and kind == "PNG":
        options["pnginfo"] = PIL.PngImagePlugin.PngInfo()
        for keyword, text in texts.items():
            options["pnginfo"].add_text(keyword, text)
    with written_whole(path) as partial:
        image.save(partial, format=kind, **options)
