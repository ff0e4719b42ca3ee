"""What is downloaded: an archive with the pictures, the way of the first, the settings and the code."""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image


def write_archive(
    path: Path, images: list[PIL.Image.Image], way: PIL.Image.Image, settings: Mapping[str, Any], code: str
) -> Path:
    """A zip of everything about a drawing: `0.png` and so on, `way.png`, `settings.json`, `draw.py`."""
    width = len(str(len(images) - 1))
    with zipfile.ZipFile(path, "w") as archive:
        for index, image in enumerate(images):
            archive.writestr(f"{index:0{width}d}.png", png(image))
        archive.writestr("way.png", png(way))
        archive.writestr("settings.json", json.dumps(settings, indent=2, default=str))
        archive.writestr("draw.py", code)
    return path


def png(image: PIL.Image.Image) -> bytes:
    """A picture as a file's content."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
