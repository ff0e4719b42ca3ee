"""The C++ kernels as functions of tensors: the implementations in the table of backends."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from ..dispatch import arithmetic
from ..local import gradients, kernel_parameters
from . import build


def _struct(*integers: str, number: str | None = None) -> Any:
    """The type of a C++ struct of the same fields: 32-bit integers, then perhaps a double."""
    fields = [(name, ctypes.c_int32) for name in integers] + ([(number, ctypes.c_double)] if number else [])
    return type("Shape", (ctypes.Structure,), {"_fields_": fields})


AttentionShape = _struct(
    "batch", "height", "width", "heads", "head_dim", "value_dim", "window_height", "window_width", "neighborhood",
    "remote", number="weight",
)  # fmt: skip
LocalShape = _struct("batch", "height", "width", "channels", "kernel", "batch_statistics", number="eps")
LinearShape = _struct("rows", "inputs", "outputs", "by_column")


def call(function: str, dtype: torch.dtype, shape: ctypes.Structure, *arguments: Any) -> None:
    """Call a function of kernels.cpp: storage type, shape, then contiguous tensors (or None) and other shapes."""
    pointers = [
        ctypes.byref(argument)
        if isinstance(argument, ctypes.Structure)
        else ctypes.c_void_p(None if argument is None else argument.data_ptr())
        for argument in arguments
    ]
    kernel = getattr(build.library(dtype), function)
    if kernel(ctypes.byref(shape), torch.get_num_threads(), *pointers):
        raise RuntimeError(f"{function} takes no {dtype} tensors of this shape; use the backend 'reference'.")


def _attention_shape(grid: torch.Size, channels: int, windows: Sequence[int]) -> ctypes.Structure:
    dim, heads, height, width, neighborhood, remote = windows
    values = channels - 2 * dim
    weight = max(neighborhood, remote)
    sizes = (*grid, heads, dim // heads, values // heads, height, width, neighborhood > 0, remote > 0)
    return AttentionShape(*sizes, weight)


def _parameter(parameter: torch.Tensor | None, tensor: torch.Tensor) -> torch.Tensor | None:
    return None if parameter is None else parameter.to(arithmetic(tensor.dtype)).contiguous()


def attend(qkv: torch.Tensor, windows: Sequence[int]) -> torch.Tensor:
    """See `kernels.attention`."""
    qkv, shape = qkv.contiguous(), _attention_shape(qkv.shape[:3], qkv.shape[-1], windows)
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[-1] - 2 * windows[0])
    call("attention_forward", qkv.dtype, shape, qkv, out)
    return out


def attend_backward(grad: torch.Tensor, qkv: torch.Tensor, windows: Sequence[int]) -> torch.Tensor:
    """See `kernels.attention`."""
    qkv, grad = qkv.contiguous(), grad.to(qkv.dtype).contiguous()
    grad_qkv = torch.empty_like(qkv)
    shape = _attention_shape(qkv.shape[:3], qkv.shape[-1], windows)
    call("attention_backward", qkv.dtype, shape, qkv, grad, grad_qkv)
    return grad_qkv


def convolve(hidden_states, weight, gamma, beta, mean, variance, batch_statistics, eps):
    """See `kernels.local`."""
    hidden_states, kind = hidden_states.contiguous(), arithmetic(hidden_states.dtype)
    out = torch.empty_like(hidden_states)
    mean, variance = mean.to(kind, copy=True), variance.to(kind, copy=True)
    shape = LocalShape(*hidden_states.shape, weight.shape[-1], batch_statistics, eps)
    parameters = kernel_parameters(hidden_states.dtype, weight, gamma, beta)
    call("local_forward", out.dtype, shape, hidden_states, *parameters, mean, variance, out)
    return out, mean, variance, out.new_empty(0)


def convolve_backward(grad, hidden_states, kept, weight, gamma, beta, mean, variance, batch_statistics, eps):
    """See `kernels.local`."""
    hidden_states, grad = hidden_states.contiguous(), grad.to(hidden_states.dtype).contiguous()
    parameters = kernel_parameters(hidden_states.dtype, weight, gamma, beta)
    grads = tuple(torch.empty_like(tensor) for tensor in (hidden_states, *parameters))
    shape = LocalShape(*hidden_states.shape, weight.shape[-1], batch_statistics, eps)
    call("local_backward", grad.dtype, shape, hidden_states, *parameters, mean, variance, grad, *grads)
    return gradients(grads, weight, gamma, beta)


def multiply(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """See `kernels.linear`."""
    inputs, weight = inputs.contiguous(), weight.contiguous()
    out = inputs.new_empty(*inputs.shape[:-1], weight.shape[0])
    shape = LinearShape(inputs.shape[:-1].numel(), *weight.shape[::-1], True)
    call("linear_forward", inputs.dtype, shape, inputs, weight, _parameter(bias, inputs), out)
    return out


def multiply_backward(
    grad: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.linear`."""
    inputs, weight, grad = inputs.contiguous(), weight.contiguous(), grad.to(inputs.dtype).contiguous()
    grad_inputs, grad_weight = torch.empty_like(inputs), torch.empty_like(weight)
    grad_bias = weight.new_empty(weight.shape[0], dtype=arithmetic(weight.dtype))
    rows, (outputs, channels) = inputs.shape[:-1].numel(), weight.shape
    of_inputs, of_weight = LinearShape(rows, outputs, channels, False), LinearShape(rows, channels, outputs, True)
    call("linear_forward", grad.dtype, of_inputs, grad, weight, None, grad_inputs)
    call("linear_weight_gradient", grad.dtype, of_weight, grad, inputs, grad_weight, grad_bias)
    return grad_inputs, grad_weight, grad_bias


def infer(hidden_states, expansion, bias, projection, windows, taps, summand):
    """See `kernels.fused`."""
    hidden_states, grid = hidden_states.contiguous(), hidden_states.shape[:3]
    out = hidden_states.new_empty(*grid, projection.shape[0])
    shape = _attention_shape(grid, expansion.shape[0], windows)
    local = LocalShape(*grid, projection.shape[1], round(taps.shape[0] ** 0.5), False, 0)
    projected = LinearShape(0, *projection.shape[::-1], True)
    parameters = (_parameter(tensor, hidden_states) for tensor in (bias, taps, summand))
    tensors = (hidden_states, expansion.contiguous(), *parameters, projection.contiguous(), out)
    call("block_forward", out.dtype, shape, local, projected, *tensors)
    return out
