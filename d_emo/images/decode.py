"""The one decode: every picture of training, FID and accuracy comes through here, and has the same pixels in all.

Whatever a file holds becomes a picture of 8-bit RGB, upright, its transparency laid on `BACKGROUND`. Values of 16 bits
are divided by 257, floats in [0, 1] multiplied by 255; where a file does not define what white is, it is refused. The
first frame of an animation is taken; colour profiles are not applied (training on ImageNet never did).
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageCms
import torch

from d_emo.common import checks
from d_emo.common.messages import first_line, printable, shown

# How a file's pixels are read; part of the key of everything that is made of them and kept. 2: orientation, 16 bits,
# floats, transparency and LAB. 1: whatever Pillow's `convert("RGB")` made of them.
DECODE_VERSION = 2
# The colour behind transparent pixels: white, as paper and most viewers show them.
BACKGROUND = (255, 255, 255)
# Larger pictures are refused by name: they would take gigabytes. A phone's largest have 108 million pixels.
MAX_PIXELS = 2**27
# So many pixels at most are made of a picture that is enlarged before it is cut; more are cut first.
MAX_ENLARGED_PIXELS = 2**24
# Of a result; Pillow's own limit for many formats.
MAX_SIDE = 2**16 - 1
LONGEST_STRIP = 64
FILTER_SUPPORT = 4
# Rows that are converted at once, so that wide types need memory for a few of them only.
ROWS = 256

REFUSED_FORMATS = {
    "EPS": "PostScript, which is drawn by another program",
    "PDF": "a document, which is drawn by another program",
    "WMF": "a drawing of Windows, which Windows alone draws",
    "FPX": "FlashPix, a container that is not decoded",
    "MIC": "a container of Microsoft's that is not decoded",
    "BUFR": "a container of measurements, not a picture",
    "GRIB": "a container of measurements, not a picture",
    "HDF5": "a container of measurements, not a picture",
    "MPEG": "a film",
}
# Formats whose 16 bits mean what they say. (Others keep measurements in them, or Pillow does not say which it read.)
SIXTEEN_BIT_FORMATS = {"PNG", "PPM", "JPEG2000", "IM", "ICNS", "ICO"}  # the last two hold PNG
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT, EXIF_ORIENTATION = 258, 262, 339, 274
TIFF_WHITE_IS_ZERO, TIFF_UNSIGNED = 0, 1

_Turn = PIL.Image.Transpose
# What makes a picture of an EXIF orientation upright.
UPRIGHT = {2: _Turn.FLIP_LEFT_RIGHT, 3: _Turn.ROTATE_180, 4: _Turn.FLIP_TOP_BOTTOM, 5: _Turn.TRANSPOSE,
           6: _Turn.ROTATE_270, 7: _Turn.TRANSVERSE, 8: _Turn.ROTATE_90}  # fmt: skip
SIDEWAYS = (_Turn.TRANSPOSE, _Turn.ROTATE_270, _Turn.TRANSVERSE, _Turn.ROTATE_90)


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


def decode(file: Any, name: str) -> PIL.Image.Image:
    """Decode a path or binary file whole, to 8-bit RGB.

    Raises:
        UnreadableImageError: with `name`, whatever went wrong.
    """
    return decode_as(file, name, _to_rgb)


def decode_as(file: Any, name: str, convert: Callable[[PIL.Image.Image], PIL.Image.Image]) -> PIL.Image.Image:
    """Decode a path or binary file whole, upright, to what `convert` makes of its stored pixels.

    Raises:
        UnreadableImageError: with `name`, whatever went wrong.
    """
    with _named(name):
        _check_file(file)
        with _open(file) as image:
            _check_size(image)
            image.load()
            _check_size(image)  # some formats hold another picture than their header says
            turn = _orientation(image)
            picture = convert(image)
            return picture if turn is None else picture.transpose(turn)


def upright_size(file: Any, name: str) -> tuple[int, int]:
    """Width and height that `decode` gives, told by the header alone.

    Raises:
        UnreadableImageError: with `name`, whatever went wrong.
    """
    with _named(name):
        _check_file(file)
        with _open(file) as image:
            _check_size(image)
            width, height = image.size
            return (height, width) if _orientation(image) in SIDEWAYS else (width, height)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """What fails in here fails with the picture's name."""
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:  # decoders fail in any way: struct.error, IndexError, MemoryError, zlib.error, ...
        raise UnreadableImageError(f"{printable(name)} cannot be read ({printable(first_line(error))})") from error


def _check_file(file: Any) -> None:
    if file is None:
        raise ValueError("there is no picture")
    if isinstance(file, str | os.PathLike) and not os.path.isfile(file):  # noqa: PTH113, any kind of path
        raise ValueError("no such file, or no regular one")


def refusal(path: Any) -> str | None:
    """Why a file will not be decoded, as far as its header says so; None if nothing speaks against it."""
    try:
        with _open(path) as image:
            _check_size(image)
            if image.mode == "I" or image.mode.startswith("I;16"):
                _white(image)
    except Exception as error:  # as in `decode`
        return f"{printable(str(path))} cannot be read ({printable(first_line(error))})"
    return None


def readable_formats() -> list[str]:
    """Pillow's names of the formats that it decodes by itself, in the order in which it tries them."""
    PIL.Image.init()
    return [name for name in PIL.Image.ID if name not in REFUSED_FORMATS]


def _open(file: Any) -> PIL.Image.Image:
    try:
        return PIL.Image.open(file, formats=readable_formats())
    except PIL.UnidentifiedImageError:
        reason = _refused_format(file)
    raise ValueError(reason or "no format that Pillow knows")


def _refused_format(file: Any) -> str | None:
    """Why the format of a file is refused, if it is one of those."""
    if hasattr(file, "seek"):
        file.seek(0)
    for name, reason in REFUSED_FORMATS.items():
        opener, accepts = PIL.Image.OPEN.get(name, (None, None))
        if opener is None or accepts is None:
            continue
        if hasattr(file, "seek"):
            start = file.read(16)
            file.seek(0)
        else:
            with open(file, "rb") as opened:  # noqa: PTH123, any kind of path
                start = opened.read(16)
        if accepts(start):
            return f"{name} is {reason}; save it as PNG"
    return None


def _check_size(image: PIL.Image.Image) -> None:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{width:,} x {height:,} pixels; from 1 to {MAX_PIXELS:,} in all are read: make it smaller")


def _orientation(image: PIL.Image.Image) -> PIL.Image.Transpose | None:
    """What makes it upright; nothing where its EXIF data are broken or senseless."""
    try:
        return UPRIGHT.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # a picture is not worse for what stands beside it
        return None


def _to_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Any mode to RGB, transparency laid on `BACKGROUND`."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode == "LAB":
        lab, srgb = PIL.ImageCms.createProfile("LAB"), PIL.ImageCms.createProfile("sRGB")
        return PIL.ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")  # type: ignore[return-value]
    if not _has_transparency(image):
        return image.convert("RGB")
    if image.mode == "La":  # multiplied by alpha beforehand; Pillow has one way out of it
        image = image.convert("LA")
    picture = PIL.Image.new("RGB", image.size, BACKGROUND)
    image = image.convert("RGBA")
    picture.paste(image, mask=image)
    return picture


def _has_transparency(image: PIL.Image.Image) -> bool:
    palette = getattr(image.palette, "mode", "") if image.mode == "P" else ""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info or palette.endswith("A")


def _eight_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Wide grey values as L, or LA where one value stands for transparency."""
    values = np.asarray(image)  # (H, W) uint16, int32 or float32
    white, inverted = (1.0, False) if image.mode == "F" else _white(image)
    grey = np.empty(values.shape, dtype=np.uint8)
    for start in range(0, len(values), ROWS):
        rows = values[start : start + ROWS].astype(np.float64) / white
        if not (rows.min() >= 0 and rows.max() <= 1):  # nor NaN
            what = "floats" if image.mode == "F" else "integers"
            raise ValueError(f"{what} beyond 0 to {white:g}, whose white is not defined; save it with 8 or 16 bits")
        grey[start : start + ROWS] = np.floor((1 - rows if inverted else rows) * 255 + 0.5)
    picture = PIL.Image.fromarray(grey)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        picture.putalpha(PIL.Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return picture


def _white(image: PIL.Image.Image) -> tuple[float, bool]:
    """The value of white in a picture of integers, and whether it is black that is zero instead.

    Raises:
        ValueError: its format does not define it.
    """
    if image.format in SIXTEEN_BIT_FORMATS:
        return 65535.0, False
    tags = getattr(image, "tag_v2", {})
    bits, kind = (tags.get(tag, (1,)) for tag in (TIFF_BITS, TIFF_SAMPLE_FORMAT))
    bits, kind = (part[0] if isinstance(part, tuple) else part for part in (bits, kind))
    if image.format == "TIFF" and kind == TIFF_UNSIGNED and 8 < bits <= 16:
        return float(2**bits - 1), tags.get(TIFF_PHOTOMETRIC) == TIFF_WHITE_IS_ZERO
    raise ValueError(
        f"{image.format} with integers of mode {image.mode}, whose white is not defined; save it with 8 or 16 bits"
    )


def center_crop(image: PIL.Image.Image, width: int, height: int | None = None) -> PIL.Image.Image:
    """ADM's crop: halve with a box filter while twice too large, resize bicubically to just cover, cut the centre.

    Args:
        image: any size. What would be enlarged beyond `MAX_ENLARGED_PIXELS` (strips) is cut before, not after.
        width, height: of the result; a square without the latter.

    Raises:
        ValueError: no picture, or no such size.
    """
    _check_picture(image)
    width = checks.whole(width, "width", most=MAX_SIDE)
    height = width if height is None else checks.whole(height, "height", most=MAX_SIDE)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
    if covering[0] * covering[1] > MAX_ENLARGED_PIXELS:
        # The part of the enlarged picture with what the filter sees around it.
        more = math.ceil(FILTER_SUPPORT * scale)
        first = max(0, left - more), max(0, top - more)
        last = min(covering[0], left + width + more), min(covering[1], top + height + more)
        across, down = image.width / covering[0], image.height / covering[1]
        box = (first[0] * across, first[1] * down, last[0] * across, last[1] * down)
        covering = last[0] - first[0], last[1] - first[1]
        left, top = left - first[0], top - first[1]
        image = image.resize(covering, PIL.Image.Resampling.BICUBIC, box=box)
    else:
        image = image.resize(covering, PIL.Image.Resampling.BICUBIC)
    return image.crop((left, top, left + width, top + height))


def trim_strip(image: PIL.Image.Image) -> PIL.Image.Image:
    """The centre of a picture that is more than `LONGEST_STRIP` times as long as wide; others as they are.

    For image processors, which enlarge the short side of the whole picture before they cut the centre.
    """
    longest = min(image.size) * LONGEST_STRIP
    width, height = min(image.width, longest), min(image.height, longest)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if image.size == (width, height) else image.crop((left, top, left + width, top + height))


def _check_picture(image: Any) -> None:
    if not isinstance(image, PIL.Image.Image):
        raise ValueError(f"image={shown(image)} is not a picture of Pillow's.")


def to_pixels(image: PIL.Image.Image, channels: int) -> np.ndarray:
    """An image as (H, W, channels) uint8, grey (1) or colour (3)."""
    checks.one_of(channels, "channels", (1, 3))
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def to_tensor(image: PIL.Image.Image, channels: int, side: int) -> torch.Tensor:
    """An image as (channels, side, side) float32 in [-1, 1]."""
    checks.one_of(channels, "channels", (1, 3))
    _check_picture(image)
    image = center_crop(image.convert("L" if channels == 1 else "RGB"), side)
    pixels = to_pixels(image, channels).astype(np.float32)
    return torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()
