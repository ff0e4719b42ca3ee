"""The backend for CUDA GPUs, in Triton: compiled by Triton at the first launch of every size.

Triton is imported when a kernel is first asked for. What it gains: "Measured on an H100" in docs/kernels.md.
"""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from ..dispatch import Backend, is_planned, told
from ..local import gradients, kernel_parameters
from ..reference import Windows
from ..selfcheck import Check, attention_check, first_failure, local_check


def attend(qkv: torch.Tensor, windows: Sequence[int]) -> torch.Tensor:
    """See `kernels.attention`."""
    from . import attention

    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        return attention.forward(qkv.contiguous(), Windows(*windows))


def attend_backward(grad: torch.Tensor, qkv: torch.Tensor, windows: Sequence[int]) -> torch.Tensor:
    """See `kernels.attention`."""
    from . import attention

    with torch.cuda.device_of(qkv):
        return attention.backward(grad.to(qkv.dtype).contiguous(), qkv.contiguous(), Windows(*windows))


def convolve(hidden_states, weight, gamma, beta, mean, variance, batch_statistics, eps):
    """See `kernels.local`."""
    from . import local

    affine = kernel_parameters(hidden_states.dtype, weight, gamma, beta)
    parameters = local.Parameters(*affine, mean.to(torch.float32), variance.to(torch.float32))
    with torch.cuda.device_of(hidden_states):
        out, mean, variance, kept = local.forward(hidden_states.contiguous(), parameters, batch_statistics, eps)
    if batch_statistics:
        return out, mean, variance, kept
    return out, mean.clone(), variance.clone(), kept  # an operator's results must not be its inputs


def convolve_backward(grad, hidden_states, kept, weight, gamma, beta, mean, variance, batch_statistics, eps):
    """See `kernels.local`."""
    from . import local

    parameters = local.Parameters(*kernel_parameters(hidden_states.dtype, weight, gamma, beta), mean, variance)
    grad, kept = (tensor.to(hidden_states.dtype).contiguous() for tensor in (grad, kept))
    with torch.cuda.device_of(hidden_states):
        grads = local.backward(grad, hidden_states.contiguous(), kept, parameters, batch_statistics, eps)
    return gradients(grads, weight, gamma, beta)


@functools.cache
def _obstacle(dtype: torch.dtype) -> str:
    return "" if importlib.util.find_spec("triton") else "the package triton is not installed"


_failures: dict[tuple[Any, ...], str] = {}  # of what was checked


def _size_obstacle(name: str, dtype: torch.dtype, channels: int, many: bool, size: tuple[int, ...]) -> str:
    """A GPU's kernel is another one for every type and size: each is checked before its first use.

    Not inside of a CUDA graph's capture, which a check would break: there plain PyTorch runs in place of what was not
    checked before.
    """
    attends = name == "window_attention"
    if attends and dtype == torch.float32:
        return "attention in float32 on a GPU is left to PyTorch's products"  # a tile fills the registers several times
    if is_planned():
        return ""
    key = (name, dtype, channels, many, size)
    if key not in _failures:
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph captures what did not run before; run it once before the capture"
        make = _attention_check if attends else _local_check
        what = f"{'window attention' if attends else 'the local branch'} with {channels} channels in {dtype} on the GPU"
        _failures[key] = told(what, first_failure("cuda", [make(dtype, channels, many, size)]))
    return _failures[key]


def _attention_check(dtype: torch.dtype, channels: int, many: bool, size: tuple[int, ...]) -> Check:
    """Four windows of each kind, in two images; or one, in so many that a program has several pieces of values."""
    from . import attention

    windows = Windows(*size)
    shape = (2, 2 * windows.height, 2 * windows.width, channels)
    if many:
        batch = attention.batch_of_several_pieces(channels, windows)
        shape = (max(2, batch), windows.height, windows.width, channels)
    return attention_check(dtype, shape, windows)


def _local_check(dtype: torch.dtype, channels: int, many: bool, size: tuple[int, ...]) -> Check:
    """Two images with a strip that is not full; or low ones, so many that a program has several of them."""
    from . import local

    (side,) = size
    shape = (2, 6, 9, channels)
    if many:
        shape = (local.batch_of_several_images(channels, 5), 3, 5, channels)
    return local_check(dtype, shape, side)


BACKEND = Backend(
    name="Triton (attention in bfloat16 and float16)",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    obstacle=_obstacle,
    size_obstacle=_size_obstacle,
    slower=lambda operator, dtype: False,
    keeps_convolution=True,
    operators={
        "window_attention": attend,
        "window_attention_backward": attend_backward,
        "local_branch": convolve,
        "local_branch_backward": convolve_backward,
    },
)
