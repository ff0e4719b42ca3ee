"""What every operator of the kernels refuses, on each device: a backend reads memory by the sizes that it is told."""

from collections.abc import Sequence
from typing import Any

import torch

from d_emo.common.messages import shown
from d_emo.common.ranges import OneOf, Whole

from .reference import Windows

KINDS = ("neighborhood", "remote", "spanning")
# Sizes are 32-bit numbers in the backends.
LARGEST = 2**31 - 1
KIND, SIZE = OneOf(KINDS), Whole(1, LARGEST, "in tokens or channels")


def check_tensors(operator: str, first: torch.Tensor, **others: tuple[torch.Tensor | None, tuple[int, ...]]) -> None:
    """Refuse tensors of other shapes, other devices or other kinds of numbers than an operator's first one needs.

    Args:
        operator: its name, for the message.
        first: what tells the device.
        others: by name, a tensor (None passes) and the shape that it has to have.
    """
    if not first.is_floating_point():
        raise ValueError(f"{operator}: the input is {first.dtype}; pass floating-point numbers.")
    if max(first.shape, default=0) > LARGEST:
        raise ValueError(f"{operator}: the input's shape {tuple(first.shape)} has a side above {LARGEST}; split it.")
    device, layout = first.device, first.layout
    for name, (tensor, shape) in others.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{operator}: {name} has the shape {tuple(tensor.shape)}; the others need {tuple(shape)}.")
        if tensor.device != device or tensor.layout != layout:
            raise ValueError(
                f"{operator}: {name} is {tensor.layout} on {tensor.device}, the input is {layout} on {device}; move "
                "them to one device."
            )
        if not tensor.is_floating_point():
            raise ValueError(f"{operator}: {name} is {tensor.dtype}; pass floating-point numbers.")


def same_device(operator: str, *tensors: torch.Tensor | None) -> None:
    """Refuse tensors of several devices; asked where only shapes are computed, which a "meta" tensor leads to."""
    devices = sorted({str(tensor.device) for tensor in tensors if tensor is not None})
    if len(devices) > 1:
        raise ValueError(f"{operator}: tensors are on {' and '.join(devices)}; move them to one device.")


def check_grid(operator: str, tensor: Any) -> None:
    """Refuse what is no (B, H, W, C) tensor of numbers."""
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
        given = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"{operator}: the input is {given}, not a tensor (B, H, W, C), channels last.")
    if not tensor.is_floating_point():
        raise ValueError(f"{operator}: the input is {tensor.dtype}; pass floating-point numbers.")


def check_windows(operator: str, grid: Sequence[int], channels: int, windows: Sequence[int]) -> None:
    """Refuse windows that do not divide a grid, and heads that do not divide the channels.

    Args:
        operator: its name, for the message.
        grid: (B, H, W).
        channels: of queries, keys and values together.
        windows: the numbers of `Windows`.
    """
    if len(windows) != len(Windows._fields):
        raise ValueError(f"{operator}: windows={list(windows)} are not the numbers {', '.join(Windows._fields)}.")
    dim, heads, height, width, neighborhood, remote = windows
    _, rows, columns = grid
    values = channels - 2 * dim
    if (
        min(rows, columns, dim, heads, height, width, values) < 1
        or min(neighborhood, remote) < 0
        or not max(neighborhood, remote)
        or dim % heads
        or values % heads
        or rows % height
        or columns % width
    ):
        raise ValueError(
            f"{operator}: {Windows(*windows)} do not divide a grid of {tuple(grid)} with {channels} channels."
        )


def check_attention(qkv: Any, attention_type: Any, dim: Any, num_heads: Any, window: Any) -> None:
    """Refuse arguments of `window_attention`; sizes that a graph leaves open are not looked at."""
    check_grid("window_attention", qkv)
    KIND.check(attention_type, "attention_type")
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ValueError(f"window={shown(window)} is not (height, width) in tokens.")
    sizes = {"dim": dim, "num_heads": num_heads, "window height": window[0], "window width": window[1]}
    if torch.jit.is_tracing() or any(isinstance(size, torch.SymInt) for size in (*sizes.values(), *qkv.shape)):
        return
    for name, size in sizes.items():
        SIZE.check(size, name)
    check_windows("window_attention", qkv.shape[:3], qkv.shape[-1], Windows(dim, num_heads, *window))
