"""The block as one operation for training on the CPU: one step of autograd in place of four.

Between two kernels Python, the dispatcher and autograd run from a cold cache, about a millisecond an operation: a tenth
of a training step of D-EMOv2-S-2 at batch 8.

Shapes: B batch, H x W token grid, C channels, E inner channels, O channels of the result.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from . import cpu
from .attention import Windows, attend, attend_backward
from .fused import are_plain_projections, block_flops
from .linear import as_autocast, can_multiply, multiply, own_products, weight_gradient
from .local import convolve, convolve_backward, update_statistics


def train_block(
    hidden_states: torch.Tensor,
    to_qkv: nn.Module,
    windows: Windows,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    proj_out: nn.Module,
) -> torch.Tensor | None:
    """`proj_out(local_branch(window_attention(to_qkv(x), windows), conv, norm))`, (B, H, W, C) -> (B, H, W, O).

    None where there is no such operation: without gradients, where a parameter does not learn, for other layers than
    plain ones and for sizes or types without the kernels' products. The local branch must have its kernel.
    """
    if not torch.is_grad_enabled() or not are_plain_projections(to_qkv, proj_out):
        return None
    assert isinstance(to_qkv, nn.Linear)
    assert isinstance(proj_out, nn.Linear)
    affine = (conv.weight, norm.weight, norm.bias)
    learned = (to_qkv.weight, to_qkv.bias, proj_out.weight, *affine)
    if not all(parameter is None or parameter.requires_grad for parameter in learned):
        return None
    hidden_states, expansion, projection = (
        as_autocast(tensor) for tensor in (hidden_states, to_qkv.weight, proj_out.weight)
    )
    outputs = projection.shape[0]
    if not can_multiply(hidden_states, expansion) or projection.dtype != expansion.dtype or outputs % 2:
        return None
    own = [*own_products(expansion), *own_products(projection)]
    local = (*affine, norm.running_mean, norm.running_var, norm.training, norm.eps)
    results = _train_block(hidden_states, expansion, to_qkv.bias, projection, own, *windows, *local)
    if norm.training:
        update_statistics(norm, results[4], results[5], hidden_states[..., 0].numel())
    return results[0]


# ---- the operators -------------------------------------------------------------------------------------------------


@torch.library.custom_op("d_emo::train_block", mutates_args=(), device_types="cpu")
def _train_block(
    hidden_states: torch.Tensor,
    expansion: torch.Tensor,
    bias: torch.Tensor | None,
    projection: torch.Tensor,
    own: Sequence[bool],
    dim: int,
    num_heads: int,
    height: int,
    width: int,
    neighborhood: bool,
    remote: bool,
    weighting: float,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    batch_statistics: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result; then what the backward pass needs: qkv, what attention and the local branch gave, the statistics.

    `own` is `own_products` of the expansion and of the projection.
    """
    windows = Windows(dim, num_heads, height, width, neighborhood, remote, weighting)
    qkv = multiply(hidden_states, expansion, True, own[:3])  # (B, H, W, 2C + E)
    attended = attend(qkv, bias, *windows)  # (B, H, W, E)
    mixed, mean, variance = convolve(attended, weight, gamma, beta, mean, variance, batch_statistics, eps)
    out = multiply(mixed, projection, True, own[3:])  # (B, H, W, O)
    return out, qkv, attended, mixed, mean, variance


@torch.library.custom_op("d_emo::train_block_backward", mutates_args=(), device_types="cpu")
def _train_block_backward(
    grad: torch.Tensor,
    hidden_states: torch.Tensor,
    expansion: torch.Tensor,
    bias: torch.Tensor | None,
    projection: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    qkv: torch.Tensor,
    attended: torch.Tensor,
    mixed: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    own: Sequence[bool],
    dim: int,
    num_heads: int,
    height: int,
    width: int,
    neighborhood: bool,
    remote: bool,
    weighting: float,
    batch_statistics: bool,
    eps: float,
) -> list[torch.Tensor]:
    """Gradients of x, expansion, projection, convolution, gamma and beta, and of the bias if there is one."""
    windows = Windows(dim, num_heads, height, width, neighborhood, remote, weighting)
    grad = grad.to(hidden_states.dtype)
    grad_projection = weight_gradient(grad, mixed, own[5])
    grad_mixed = multiply(grad, projection, False, own[4:5])
    grad_attended, *grad_local = convolve_backward(
        grad_mixed, attended, weight, gamma, beta, mean, variance, batch_statistics, eps
    )
    del grad_mixed
    grad_qkv, grad_bias = attend_backward(grad_attended, qkv, bias, *windows)
    del grad_attended
    grad_expansion = weight_gradient(grad_qkv, hidden_states, own[2])
    grad_hidden = multiply(grad_qkv, expansion, False, own[1:2])
    grads = [grad_hidden, grad_expansion, grad_projection, *grad_local]
    return grads if bias is None else [*grads, grad_bias.to(bias.dtype)]


@_train_block.register_fake
def _(x, expansion, bias, projection, own, dim, num_heads, height, width, near, remote, weighting, weight, gamma, *_):
    statistics = [gamma.new_empty(gamma.shape, dtype=cpu.arithmetic(x.dtype)) for _ in range(2)]
    sizes = (projection.shape[0], expansion.shape[0], projection.shape[1], projection.shape[1])
    return *(x.new_empty(*x.shape[:3], size) for size in sizes), *statistics


@_train_block_backward.register_fake
def _(grad, x, expansion, bias, projection, weight, gamma, beta, *_):
    tensors = (x, expansion, projection, weight, gamma, beta)
    return [tensor.new_empty(tensor.shape) for tensor in (*tensors, *([] if bias is None else [bias]))]


def _keep(ctx, inputs, output):
    hidden_states, expansion, bias, projection, ctx.own, *rest = inputs
    ctx.windows, (weight, gamma, beta, _, _, *ctx.norm) = rest[:7], rest[7:]
    ctx.save_for_backward(hidden_states, expansion, bias, projection, weight, gamma, beta, *output[1:])
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 19
    grads = _train_block_backward(grad, *ctx.saved_tensors, ctx.own, *ctx.windows, *ctx.norm)
    hidden, expansion, projection, weight, gamma, beta, *bias = grads
    bias = bias[0] if bias else None
    return hidden, expansion, bias, projection, *(None,) * 8, weight, gamma, beta, *(None,) * 4


_train_block.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.d_emo.train_block)
def _flops(x_shape, expansion_shape, bias_shape, projection_shape, own, *windows_and_weight, **_) -> int:
    return block_flops(x_shape, expansion_shape, bias_shape, projection_shape, *windows_and_weight)


@register_flop_formula(torch.ops.d_emo.train_block_backward)
def _backward_flops(
    grad_shape, x_shape, expansion_shape, bias_shape, projection_shape, weight_shape, gamma, beta, qkv, attended,
    mixed, mean, variance, own, *windows, **__
) -> int:  # fmt: skip
    """Twice the forward pass's; what is computed again is not counted."""
    shapes = (x_shape, expansion_shape, bias_shape, projection_shape)
    return 2 * block_flops(*shapes, *windows[:7], weight_shape)
