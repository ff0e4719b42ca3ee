"""Products with a linear layer's weight on the CPU: the kernels' own where they beat PyTorch's, with gradients.

Each of the three products (forward, gradient of the input, gradient of the weight) is chosen by itself.

Shapes: (..., I) inputs, (O, I) weights, (..., O) results.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from . import calibration, cpu
from .backend import fast_path, is_plain

LEAST_ROWS = 64  # fewer do not repay the packing of the weight
LEAST_SPEED = 1.0  # over PyTorch's product, as measured


def apply_linear(layer: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """`layer(inputs)`."""
    if isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear) and layer.bias is None:
        return product(inputs, layer.weight)
    return layer(inputs)


def linear_and_bias(layer: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`layer(inputs)` as a product and a bias still to be added, for `window_attention` to add while it reads.

    A bias of None means that it is in the product already, as on a GPU, whose products add it for nothing.
    """
    on_cpu = inputs.device.type == "cpu"
    if on_cpu and isinstance(layer, nn.Linear) and is_plain(layer, nn.Linear) and fast_path(inputs):
        return product(inputs, layer.weight), layer.bias
    return layer(inputs), None


def product(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear(inputs, weight)`."""
    inputs, weight = as_autocast(inputs), as_autocast(weight)
    if can_multiply(inputs, weight):
        own = own_products(weight)
        if any(own):
            return _product(inputs, weight, True, own)
    return F.linear(inputs, weight)


def as_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """In the type that products have under autocast, of which operators of our own are not told."""
    if tensor.device.type == "cpu" and torch.is_autocast_enabled("cpu") and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype("cpu"))
    return tensor


def own_products(weight: torch.Tensor) -> list[bool]:
    """Whether the kernels make a product, the gradients of its input and its weight; or PyTorch, where it is faster."""
    return [speed >= LEAST_SPEED for speed in calibration.product_speeds(weight.dtype, weight.numel())]


def can_multiply(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels have this product. How fast they are is another question (calibration.py)."""
    return (
        inputs.device.type == weight.device.type == "cpu"
        and inputs.dtype == weight.dtype
        and inputs.dtype in (torch.float32, torch.bfloat16)
        and fast_path(inputs)  # before sizes, which an exported graph leaves open
        and inputs.numel() >= LEAST_ROWS * inputs.shape[-1]
        and weight.shape[0] % 2 == weight.shape[1] % 2 == 0  # rows of whole pairs of bfloat16
    )


def multiply(inputs: torch.Tensor, weight: torch.Tensor, by_column: bool, own: Sequence[bool]) -> torch.Tensor:
    """`inputs @ weight.T`, or `inputs @ weight` if not by column.

    `own`: see `own_products`; the first is about this product.
    """
    outputs = weight.shape[0 if by_column else 1]
    if not own[0]:
        return torch.mm(inputs.flatten(0, -2), weight.t() if by_column else weight).view(*inputs.shape[:-1], outputs)
    inputs, weight = inputs.contiguous(), weight.contiguous()
    out = inputs.new_empty(*inputs.shape[:-1], outputs)
    shape = cpu.LinearShape(inputs.shape[:-1].numel(), inputs.shape[-1], outputs, by_column)
    cpu.call("linear", "linear_forward", inputs.dtype, shape, inputs, weight, out)
    return out


def weight_gradient(grad: torch.Tensor, inputs: torch.Tensor, own: bool) -> torch.Tensor:
    """`grad.T @ inputs` of their rows, (..., O) and (..., I) -> (O, I), by the kernels or by PyTorch."""
    if not own:
        return torch.mm(grad.flatten(0, -2).t(), inputs.flatten(0, -2))
    grad, inputs = grad.contiguous(), inputs.contiguous()
    out = inputs.new_empty(grad.shape[-1], inputs.shape[-1])
    shape = cpu.LinearShape(inputs.shape[:-1].numel(), inputs.shape[-1], grad.shape[-1], True)
    cpu.call("linear", "linear_weight_gradient", inputs.dtype, shape, grad, inputs, out)
    return out


_product = torch.library.custom_op("d_emo::linear", multiply, mutates_args=(), device_types="cpu")
_weight_gradient = torch.library.custom_op(
    "d_emo::linear_weight_gradient", weight_gradient, mutates_args=(), device_types="cpu"
)


@_product.register_fake
def _(inputs, weight, by_column, own):
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0 if by_column else 1])


@_weight_gradient.register_fake
def _(grad, inputs, own):
    return inputs.new_empty(grad.shape[-1], inputs.shape[-1])


def _keep_inputs(ctx, inputs, output):
    hidden, weight, ctx.by_column, ctx.own = inputs
    ctx.save_for_backward(hidden, weight)


def _backward(ctx, grad):
    inputs, weight = ctx.saved_tensors
    grad = grad.to(inputs.dtype)
    own_forward, own_input, own_weight = ctx.own
    grad_inputs = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_inputs = _product(grad, weight, not ctx.by_column, [own_input, own_forward, own_weight])
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(*((grad, inputs) if ctx.by_column else (inputs, grad)), own_weight)
    return grad_inputs, grad_weight, None, None


_product.register_autograd(_backward, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.d_emo.linear)
def _product_flops(inputs_shape, weight_shape, *_, **__) -> int:
    return 2 * math.prod(inputs_shape[:-1]) * math.prod(weight_shape)


@register_flop_formula(torch.ops.d_emo.linear_weight_gradient)
def _weight_gradient_flops(grad_shape, inputs_shape, *_, **__) -> int:
    return 2 * math.prod(grad_shape) * inputs_shape[-1]
