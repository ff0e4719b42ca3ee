"""Pictures for people: rows of images under captions."""

from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from d_emo.common.files import written_whole

# Images smaller than this are enlarged, by whole factors, so that a person sees them.
MIN_SIDE = 48
CAPTION_HEIGHT = 16


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


def save_image(image: PIL.Image.Image, path: Path) -> None:
    """Write a PNG, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        image.save(partial, format="PNG")
