"""Segmenting images of any size window by window, as U-EMOv2 was evaluated.

Source: the published log's test configuration ("slide", windows of 256 every 170 pixels, arXiv 2412.06674, Table XII).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from d_emo.common.ranges import OneOrPair, Table, Whole, checked

SIDES = OneOrPair(Whole(1, 65_536))
WINDOWS: Table = {"window": SIDES, "stride": SIDES, "batch_size": Whole(1, 2**16)}


def _pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _covers(values: Mapping[str, Any]) -> str:
    window, stride = _pair(values["window"]), _pair(values["stride"])
    if any(step > side for step, side in zip(stride, window, strict=True)):
        return (
            f"stride={values['stride']} leaves gaps between windows of {values['window']}; choose one up to the window"
        )
    return ""


@checked(WINDOWS, _covers)
def predict_in_windows(
    model: Callable[[torch.Tensor], Any],
    pixel_values: torch.Tensor,
    window: int | tuple[int, int] = 256,
    stride: int | tuple[int, int] = 170,
    batch_size: int = 4,
) -> torch.Tensor:
    """Logits of whole images from windows of them, averaged where windows overlap.

    Windows begin every `stride` pixels; the last of a row or column ends with the image. A side shorter than a window
    is filled up to it at its end with zeros, the mean colour of normalised images, as training fills its crops; what is
    predicted there is cut off. Logits on a coarser grid are resized to their window bilinearly before they are added.

    Args:
        model: a segmenter, or anything that gives logits (N, K, h, w), an output with such `logits`, or a tuple that
            begins with them, for windows (N, C, window, window). A module runs in eval mode, and is in the mode it was
            in afterwards.
        pixel_values: (B, C, H, W), normalised, of any H and W.
        window: side in pixels, or (height, width).
        stride: pixels from a window to the next, or (down, right); at most the window.
        batch_size: windows in a batch, which bounds the memory; of several images together.

    Returns:
        (B, K, H, W), averaged in float32 on the images' device, without gradients: 4 B K H W bytes.

    Raises:
        ValueError: a value out of range, images of another shape or type, or a model that gives no such logits.
    """
    if not callable(model):
        raise ValueError(f"model is a {type(model).__name__}; pass a segmenter, or a function that gives logits.")
    _check_images(pixel_values)
    window, stride = _pair(window), _pair(stride)
    batch, _, *sides = pixel_values.shape
    short = [max(0, length - side) for side, length in zip(sides, window, strict=True)]
    padded = F.pad(pixel_values, (0, short[1], 0, short[0])) if any(short) else pixel_values  # (B, C, H', W')
    tops, lefts = (_starts(*line) for line in zip(padded.shape[2:], window, stride, strict=True))
    places = [(image, top, left) for image in range(batch) for top in tops for left in lefts]

    def cut(tensor: torch.Tensor, image: int, top: int, left: int) -> torch.Tensor:
        return tensor[image, :, top : top + window[0], left : left + window[1]]

    total, covered = None, torch.zeros(padded.shape[2:], device=padded.device)  # (H', W')
    for top in tops:
        for left in lefts:
            covered[top : top + window[0], left : left + window[1]] += 1
    with _evaluating(model), torch.no_grad():
        for first in range(0, len(places), batch_size):
            some = places[first : first + batch_size]
            logits = _logits(model(torch.stack([cut(padded, *place) for place in some])), len(some))  # (N, K, h, w)
            logits = logits.to(padded.device, torch.float32)
            if logits.shape[2:] != window:
                logits = F.interpolate(logits, window, mode="bilinear", align_corners=False)  # (N, K, window, window)
            if total is None:
                total = logits.new_zeros(batch, logits.shape[1], *padded.shape[2:])  # (B, K, H', W')
            for place, part in zip(some, logits, strict=True):
                cut(total, *place).add_(part)
    assert total is not None  # there is an image
    return total.div_(covered)[:, :, : sides[0], : sides[1]]


def _starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side of at least one; the last is flush with its end."""
    return [*range(0, side - window, stride), side - window]


def _check_images(pixels: Any) -> None:
    if not isinstance(pixels, torch.Tensor):
        raise ValueError(f"pixel_values is a {type(pixels).__name__}; pass a tensor (B, C, H, W) of normalised images.")
    if pixels.dim() != 4 or not pixels.numel():
        remedy = "; for one image pass pixel_values[None]" if pixels.dim() == 3 else ""
        raise ValueError(f"pixel_values have the shape {tuple(pixels.shape)}, not (B, C, H, W){remedy}.")
    if not pixels.is_floating_point():
        raise ValueError(f"pixel_values are {pixels.dtype}; pass normalised floating-point numbers (image processor).")


def _logits(output: Any, windows: int) -> torch.Tensor:
    logits = output[0] if isinstance(output, tuple) and output else getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 4 or len(logits) != windows:
        given = tuple(logits.shape) if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise ValueError(
            f"the model gave {given} for {windows} windows, not logits ({windows}, K, h, w); pass a segmenter."
        )
    return logits


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Every module in eval mode, and back in its own."""
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    try:
        if modes:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training
