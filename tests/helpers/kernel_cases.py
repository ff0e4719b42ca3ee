"""Inputs of the kernels that differ in kind, and how near a result must come."""

import torch
from torch import nn

from d_emo.kernels import dispatch
from d_emo.kernels.reference import Windows

# Largest error over the largest value, or over 1 if that is smaller.
# Float32 differs in the order of sums, bfloat16 in where it rounds.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2}

WINDOWS = {
    "published": ((2, 16, 16), Windows(48, 3, 8, 8), 64),
    "one window": ((2, 8, 8), Windows(32, 2, 8, 8, 2, 0), 64),
    "neighborhood": ((1, 6, 9), Windows(20, 4, 3, 3, 1, 0), 5),
    "remote": ((1, 10, 15), Windows(21, 3, 5, 3, 0, 1), 7),
    "odd sizes": ((1, 14, 21), Windows(72, 1, 7, 7), 100),
    "wide values": ((1, 32, 32), Windows(16, 1, 8, 8), 200),
    "values in several pieces": ((1, 8, 16), Windows(24, 2, 8, 8, 2, 2), 300),
    "windows in one row": ((1, 8, 24), Windows(16, 1, 8, 8), 20),
}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1)
    assert error <= TOLERANCE[dtype], f"{error:.2e}"


def attention_case(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Windows]:
    """qkv, a gradient of the output, windows."""
    grid, windows, value_dim = WINDOWS[name]
    generator = torch.Generator().manual_seed(0)
    channels = 2 * windows.dim + windows.num_heads * value_dim
    qkv = torch.randn(*grid, channels, generator=generator).to(dtype)
    return qkv, torch.randn(*grid, windows.num_heads * value_dim, generator=generator).to(dtype), windows


def local_case(
    shape: tuple[int, int, int, int], kernel: int, dtype: torch.dtype
) -> tuple[torch.Tensor, nn.Conv2d, nn.BatchNorm2d]:
    """An input, a depthwise convolution and a BatchNorm with random parameters and statistics."""
    channels = shape[-1]
    conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
    norm = nn.BatchNorm2d(channels)
    modules = nn.Sequential(conv, norm).to(dispatch.arithmetic(dtype))
    for name, tensor in modules.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + 0.5 if name.endswith("var") else torch.randn(tensor.shape))
    return torch.randn(shape).to(dtype), conv, norm
