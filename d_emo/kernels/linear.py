"""Products with a linear layer's weight, by whichever of PyTorch's libraries is faster on this processor."""

import torch
import torch.nn.functional as F
from torch import nn

from . import cpu
from .backend import fast_path, is_plain


def apply_linear(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`layer(inputs)`, (B, H, W, C) -> (B, H, W, O)."""
    if isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear) and layer.bias is None:
        return product(inputs, layer.weight)
    return layer(inputs)


def linear_and_bias(layer: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`layer(inputs)` as a product and a bias still to be added, for `window_attention` to add while it reads.

    A bias of None means that it is in the product already.
    """
    if isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear) and fast_path(inputs):
        return product(inputs, layer.weight), layer.bias
    return layer(inputs), None


def product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear(inputs, weight)`, (B, H, W, C) and (O, C) -> (B, H, W, O)."""
    if inputs.device.type == "cpu" and inputs.dtype != torch.float64 and cpu.mkl_is_slow() and fast_path(inputs):
        # PyTorch hands products to MKL and convolutions to oneDNN, which is a tenth faster here (docs/speed.md).
        pixels = F.conv2d(inputs.permute(0, 3, 1, 2), weight[:, :, None, None])  # (B, O, H, W), channels-last memory
        return pixels.permute(0, 2, 3, 1)
    return F.linear(inputs, weight)
