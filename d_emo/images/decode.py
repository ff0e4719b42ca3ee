"""The one decode: every picture of training, FID and accuracy comes through here, and has the same pixels in all.

A file becomes a picture, a picture is cropped as ADM prepares ImageNet, and a crop becomes numbers.
"""

from typing import Any

import numpy as np
import PIL.Image
import torch

from d_emo.common.messages import first_line


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


def decode(file: Any, name: str) -> PIL.Image.Image:
    """Decode a path or binary file whole.

    Raises:
        UnreadableImageError: with `name`.
    """
    try:
        with PIL.Image.open(file) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{name} cannot be read ({first_line(error)})") from error


def center_crop(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """ADM's crop: halve with a box filter while twice too large, resize the short side bicubically, cut the centre."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def to_pixels(image: PIL.Image.Image, channels: int) -> np.ndarray:
    """An image as (H, W, channels) uint8, grey or colour."""
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def to_tensor(image: PIL.Image.Image, channels: int, side: int) -> torch.Tensor:
    """An image as (channels, side, side) float32 in [-1, 1]."""
    image = center_crop(image.convert("L" if channels == 1 else "RGB"), side)
    pixels = to_pixels(image, channels).astype(np.float32)
    return torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()
