"""The backend for CUDA GPUs, in Triton: compiled by Triton at the first launch of every size.

Triton is imported when a kernel is first asked for. What it gains was not measured yet: "On GPUs" in docs/speed.md.
"""

import functools
import importlib.util
from collections.abc import Sequence

import torch

from ..dispatch import Backend, told
from ..local import gradients, kernel_parameters
from ..reference import Windows
from ..selfcheck import attention_check, first_failure, local_check


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
        out, mean, variance = local.forward(hidden_states.contiguous(), parameters, batch_statistics, eps)
    if batch_statistics:
        return out, mean, variance
    return out, mean.clone(), variance.clone()  # an operator's results must not be its inputs


def convolve_backward(grad, hidden_states, weight, gamma, beta, mean, variance, batch_statistics, eps):
    """See `kernels.local`."""
    from . import local

    parameters = local.Parameters(*kernel_parameters(hidden_states.dtype, weight, gamma, beta), mean, variance)
    grad = grad.to(hidden_states.dtype).contiguous()
    with torch.cuda.device_of(hidden_states):
        grads = local.backward(grad, hidden_states.contiguous(), parameters, batch_statistics, eps)
    return gradients(grads, weight, gamma, beta)


@functools.cache
def _obstacle(dtype: torch.dtype) -> str:
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    return told(f"the kernels on cuda in {dtype}", first_failure("cuda", [local_check(dtype)]))


def _attention_obstacle(dtype: torch.dtype, channels: int, windows: Windows) -> str:
    if dtype == torch.float32:
        return "attention in float32 on a GPU is left to PyTorch's products"  # a tile fills the registers several times
    return _attention_failure(dtype, channels, windows)


@functools.cache
def _attention_failure(dtype: torch.dtype, channels: int, windows: Windows) -> str:
    """A GPU's kernel is another one at every size: each is checked before its first use."""
    failure = first_failure("cuda", [attention_check(dtype, channels, windows)])
    return told(f"window attention with {channels} channels in {dtype} on the GPU", failure)


BACKEND = Backend(
    name="Triton (attention in bfloat16 and float16)",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    obstacle=_obstacle,
    attention_obstacle=_attention_obstacle,
    slower=lambda operator, dtype: False,
    operators={
        "window_attention": attend,
        "window_attention_backward": attend_backward,
        "local_branch": convolve,
        "local_branch_backward": convolve_backward,
    },
)
