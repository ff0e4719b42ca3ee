"""Linear layers, by the backend where PyTorch's library is slower on this machine.

Shapes: (..., I) inputs, (O, I) weights, (O,) biases, (..., O) results.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from .dispatch import arithmetic, operator, takes
from .inputs import check_tensors, same_device

LEAST_ROWS = 64  # fewer do not repay the packing of the weight


def linear(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear(inputs, weight, bias)`."""
    cast = _as_autocast(inputs), _as_autocast(weight)
    if multiplies(*cast):
        return linear_operator(*cast, bias)
    return F.linear(inputs, weight, bias)


def _as_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """In the type that products have under autocast, of which operators of our own are not told."""
    device = tensor.device.type
    if torch.is_autocast_enabled(device) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device))
    return tensor


def multiplies(inputs: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a backend makes this product."""
    return (
        takes("linear", inputs)  # before sizes, which an exported graph leaves open
        and inputs.dtype == weight.dtype
        and inputs.device == weight.device
        and inputs.shape[-1] == weight.shape[1]
        and inputs.numel() >= LEAST_ROWS * inputs.shape[-1]
        and weight.shape[0] % 2 == weight.shape[1] % 2 == 0  # rows of whole pairs of bfloat16
    )


def _check(x, weight, bias, **others):
    if not x.dim() or weight.dim() != 2 or weight.dtype != x.dtype:
        raise ValueError(
            f"linear: inputs {tuple(x.shape)} in {x.dtype} and a weight {tuple(weight.shape)} in {weight.dtype} make "
            "no product; pass (..., I) and (O, I) of one type."
        )
    outputs = weight.shape[0]
    check_tensors("linear", x, weight=(weight, (outputs, x.shape[-1])), bias=(bias, (outputs,)), **others)


def _check_backward(grad, x, weight):
    _check(x, weight, None, grad=(grad, (*x.shape[:-1], *weight.shape[:1])))


# `F.linear`, whose bias may be of another type; gradients of x, weight and, in the arithmetic type, of the bias.
linear_operator = operator("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _check)
linear_backward_operator = operator(
    "linear_backward", "(Tensor grad, Tensor x, Tensor weight) -> (Tensor, Tensor, Tensor)", _check_backward
)


@linear_operator.register_fake
def _(inputs, weight, bias):
    same_device("linear", inputs, weight, bias)
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


@linear_backward_operator.register_fake
def _(grad, inputs, weight):
    same_device("linear_backward", grad, inputs, weight)
    grad_bias = weight.new_empty(weight.shape[0], dtype=arithmetic(weight.dtype))
    return inputs.new_empty(inputs.shape), weight.new_empty(weight.shape), grad_bias


def _keep_inputs(ctx, inputs, output):
    hidden_states, weight, bias = inputs
    ctx.save_for_backward(hidden_states, weight)
    ctx.bias_type = None if bias is None else bias.dtype


def _backward(ctx, grad):
    grad_inputs, grad_weight, grad_bias = linear_backward_operator(grad, *ctx.saved_tensors)
    return grad_inputs, grad_weight, None if ctx.bias_type is None else grad_bias.to(ctx.bias_type)


linear_operator.register_autograd(_backward, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.d_emo.linear)
def linear_flops(inputs_shape, weight_shape, *_, **__) -> int:
    """The product's."""
    return 2 * math.prod(inputs_shape[:-1]) * math.prod(weight_shape)


@register_flop_formula(torch.ops.d_emo.linear_backward)
def _backward_flops(grad_shape, inputs_shape, weight_shape, **_) -> int:
    """The two products'."""
    return 2 * linear_flops(inputs_shape, weight_shape)
