"""What a network takes: its channels, frames, type of numbers; and random images or clips of that."""

from typing import Any

import torch
from torch import nn

from d_emo.common.block_ranges import SIDE
from d_emo.common.ranges import Maybe, OneOrPair, Table, Whole, checked

INPUT = "pixel_values"
EXPORT: Table = {"image_size": OneOrPair(SIDE), "batch_size": Maybe(Whole(1, 65_536)),
                 "num_frames": Maybe(Whole(1, 65_536)), "threads": Maybe(Whole(1, 1024))}  # fmt: skip
ImageSize = int | tuple[int, int]
REMEDY = "pass a classifier, a segmenter or a detector"


@checked(EXPORT)
def example_images(
    model: nn.Module, image_size: ImageSize, batch_size: int, seed: int = 0, num_frames: int | None = None
) -> torch.Tensor:
    """Random images or clips as a model takes them: its channels, type of numbers and device.

    Args:
        model: a classifier, a segmenter or a detector.
        image_size: side in pixels, or height and width.
        batch_size: images or clips B.
        seed: of the random numbers.
        num_frames: T of a network of clips; None for what its configuration names.

    Returns:
        (B, C, H, W), or for networks of clips (B, T, C, H, W).

    Raises:
        ValueError: a value out of range, or no network of images.
    """
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; {REMEDY} (torch.nn.Module).")
    like = next(model.parameters(), None)
    if like is None:
        raise ValueError(f"model is a {type(model).__name__} without parameters; {REMEDY}.")
    frames = frames_of(model, num_frames)
    shape = (batch_size, *frames, image_channels(model), height, width)
    # Drawn in float32 on the CPU, the images are the same for every type and device.
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return images.to(like.device, like.dtype)


def image_channels(model: nn.Module) -> int:
    """Channels of a network's images: as its configuration says, or its first convolution."""
    for holder, name in ((getattr(model, "config", None), "num_channels"), (model, "in_chans")):
        if isinstance(channels := getattr(holder, name, None), int):
            return channels
    return _first_convolution(model).in_channels


def frames_of(model: nn.Module, num_frames: int | None = None) -> tuple[int, ...]:
    """(T,) of a network of clips, () of one of images.

    Raises:
        ValueError: frames are named for a network of images, or not named where its configuration names none.
    """
    if not isinstance(_first_convolution(model), nn.Conv3d):
        if num_frames is not None:
            raise ValueError(f"num_frames={num_frames}: {type(model).__name__} takes images, not clips; leave it out.")
        return ()
    frames: Any = num_frames or getattr(getattr(model, "config", None), "num_frames", None)
    if frames is None:
        raise ValueError(f"{type(model).__name__} takes clips; pass num_frames.")
    return (frames,)


def _first_convolution(model: nn.Module) -> nn.Conv2d | nn.Conv3d:
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Conv3d)), None)
    if first is None:
        raise ValueError(f"model is a {type(model).__name__} without a convolution; {REMEDY} of images.")
    return first
