"""Files of class ids: a mask's pixels are numbers that say what is seen, and are read as they are stored.

Palette pictures count by their index, grey ones by their value (8 or 16 bits), 1-bit ones as 0 and 1; colours count
only by a palette file that says which colour is which class, and then whichever way a picture stores them: programs
that make PNG smaller turn colours into a palette of their own, or into grey.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from d_emo.common.messages import describe_os_error, printable
from d_emo.images.decode import decode_as
from d_emo.images.labels import class_name

# The id of pixels of which nothing is known, everywhere in this package.
IGNORED = 255
# A colour of a palette file that has this name stands for it.
IGNORED_NAME = "ignored"
# Their compression makes other numbers of them around every edge.
LOSSY_FORMATS = ("JPEG", "MPO", "JPEG2000", "AVIF")
# Lines of palette files, and the words of one that titles their columns.
_RGB = r"(?P<red>\d{1,3})[\s,]+(?P<green>\d{1,3})[\s,]+(?P<blue>\d{1,3})"
NAME_BEHIND = re.compile(rf"\s*{_RGB}(?:[\s,]+(?P<name>\S.*?))?\s*", re.ASCII)
NAME_IN_FRONT = re.compile(rf"\s*(?P<name>\S.*?)[\s,:]+{_RGB}\s*(?::.*)?", re.ASCII)
TITLES = {"name", "names", "class", "label", "r", "g", "b", "red", "green", "blue"}
# Red, green, blue.
Color = tuple[int, ...]
# Modes of pictures of 8 bits a colour or less, which all have an RGB.
COLORED = ("1", "L", "P", "LA", "PA", "RGB", "RGBA")


@dataclass(frozen=True)
class Palette:
    """Which colour is which class.

    Attributes:
        colors: (N,) int64, 65536 R + 256 G + B, ascending.
        ids: (N,) int32, the class of each, or 255.
        names: of the classes, in the order of their ids; empty where the file has none.
        file: where it comes from.
    """

    colors: np.ndarray
    ids: np.ndarray
    names: Sequence[str]
    file: str


def read_palette(path: Path) -> Palette:
    """A text file with a line a class, in the order of the ids: R G B, and, if wanted, a name behind or in front.

    So are the files of CamVid ("64 128 64 Animal"), of tables ("Animal,64,128,64" below a line of titles) and of CVAT
    ("Animal:64,128,64::"). A colour named "ignored" is no class; the others count on without it. Empty lines and
    comments (#) are passed over.

    Raises:
        ValueError: there is no such file, or a line is none of that kind, or a colour or a name comes twice.
    """
    if not path.is_file():
        raise ValueError(f"--palette {path}: there is no such file.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"--palette {describe_os_error(error)}.") from error
    except UnicodeDecodeError:
        raise ValueError(f"--palette {path}: it is no text in UTF-8; write a line R G B NAME for each class.") from None
    ids: dict[int, int] = {}
    names: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        if not ids and {*re.split(r"[\s,;:]+", line.strip().casefold())} <= TITLES:
            continue
        found = NAME_BEHIND.fullmatch(line) or NAME_IN_FRONT.fullmatch(line)
        if found is None or any(int(found[part]) > 255 for part in ("red", "green", "blue")):
            raise ValueError(
                f"--palette {path}: line {number} is {printable(line)!a}; write R G B NAME, each up to 255."
            )
        red, green, blue = (int(found[part]) for part in ("red", "green", "blue"))
        color, name = _number(red, green, blue), class_name(found["name"] or "")
        if color in ids:
            raise ValueError(f"--palette {path}: line {number} repeats the colour {red} {green} {blue}; remove one.")
        if name.casefold() == IGNORED_NAME:
            ids[color] = IGNORED
            continue
        if name in names and name:
            raise ValueError(f"--palette {path}: line {number} repeats the name {name!r}; give every class its own.")
        ids[color] = len(names)
        names.append(name)
    if not 0 < len(names) <= IGNORED:
        raise ValueError(f"--palette {path}: {len(names)} colours; write a line R G B NAME for each class, 1 to 255.")
    if any(names) and not all(names):
        raise ValueError(f"--palette {path}: class {names.index('')} has no name and others have; name all, or none.")
    colors = sorted(ids)
    return Palette(
        np.array(colors, dtype=np.int64),
        np.array([ids[color] for color in colors], dtype=np.int32),
        names if any(names) else (),
        str(path),
    )


def decode_mask(file: Any, name: str, palette: Palette | None = None) -> np.ndarray:
    """The numbers that a mask's file holds, upright: (H, W) int32.

    Args:
        file: a path or a binary file.
        name: for messages.
        palette: turns colours into ids; without it they are refused.

    Raises:
        UnreadableImageError: it cannot be decoded, or holds no such numbers.
    """

    def stored(image: PIL.Image.Image) -> PIL.Image.Image:
        return PIL.Image.fromarray(_numbers(image, palette))

    return np.asarray(decode_as(file, name, stored), dtype=np.int32)


def stored_palette(file: Any) -> dict[int, Color]:
    """The colour of each number of a picture with a palette; nothing of others.

    Args:
        file: a path or a binary file that can be decoded.
    """
    with PIL.Image.open(file) as image:
        values = image.getpalette("RGB") if image.mode == "P" else None
    return {number: tuple(values[3 * number : 3 * number + 3]) for number in range(len(values) // 3)} if values else {}


def decode_colors(file: Any, name: str) -> np.ndarray:
    """The numbers R + 256 G + 65536 B of COCO's panoptic pictures: (H, W) int32.

    Raises:
        UnreadableImageError: it cannot be decoded, or is no picture of colours.
    """

    def stored(image: PIL.Image.Image) -> PIL.Image.Image:
        _refuse_lossy(image)
        if image.mode != "RGB":
            raise ValueError(f"it has the mode {image.mode}; COCO's panoptic pictures are RGB")
        colors = np.asarray(image).astype(np.int32)
        return PIL.Image.fromarray(colors[..., 0] + 256 * colors[..., 1] + 65536 * colors[..., 2])

    return np.asarray(decode_as(file, name, stored), dtype=np.int32)


def _numbers(image: PIL.Image.Image, palette: Palette | None) -> np.ndarray:
    _refuse_lossy(image)
    values = np.asarray(image)  # (H, W), or (H, W, channels)
    if image.mode in ("LA", "PA", "RGBA") and values[..., -1].min() < 255:
        raise ValueError("it is partly transparent, where a mask has one number a pixel; save it without alpha")
    if palette is not None and image.mode in COLORED:
        return _ids(np.asarray(image.convert("RGB")), palette)
    if image.mode in ("RGB", "RGBA"):
        if not (values[..., :1] == values[..., :3]).all():  # grey saved as colours counts by its value
            raise ValueError("it holds colours, not class ids; say which colour is which class: --palette FILE")
    elif image.mode not in COLORED and not image.mode.startswith("I"):
        raise ValueError(f"it has the mode {image.mode}; masks are PNG or TIFF with a palette, grey or of 1 bit")
    numbers = (values if values.ndim == 2 else values[..., 0]).astype(np.int32)
    if numbers.min() < 0:
        raise ValueError(f"it holds {numbers.min()}; ids are 0 or more")
    return numbers


def _refuse_lossy(image: PIL.Image.Image) -> None:
    if image.format in LOSSY_FORMATS:
        raise ValueError(
            f"{image.format} changes the numbers of a mask at its edges; make PNG of it where it comes from"
        )


def _ids(values: np.ndarray, palette: Palette) -> np.ndarray:
    """Colours (H, W, 3) uint8 to the ids (H, W) that a palette says."""
    colors = _number(*(values[..., channel].astype(np.int64) for channel in range(3)))  # (H, W)
    places = np.searchsorted(palette.colors, colors).clip(max=len(palette.colors) - 1)
    unknown = palette.colors[places] != colors
    if unknown.any():
        color = int(colors[unknown][0])
        raise ValueError(
            f"it holds the colour {color >> 16} {color >> 8 & 255} {color & 255}, {unknown.sum():,} pixels of it and "
            f"others that are not in {palette.file}; add it there (a colour named {IGNORED_NAME} is no class)"
        )
    return palette.ids[places]


def _number(red: Any, green: Any, blue: Any) -> Any:
    return 65536 * red + 256 * green + blue
