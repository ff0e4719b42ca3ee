"""The block as one operation, for inference on the CPU.

With running statistics the local branch needs only the channels that a head has just made, so they stay in the cache.
Where the kernels' own matrix products beat PyTorch's, the projections stay there too.
"""

import math

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from . import calibration, cpu
from .attention import Windows, attention_flops, cpu_parameter, cpu_shape
from .backend import is_plain
from .linear import LEAST_SPEED, apply_linear, can_multiply, linear_and_bias, product
from .local import convolution_flops, kernel_parameters


def infer_block(
    hidden_states: torch.Tensor,
    to_qkv: nn.Module,
    windows: Windows,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    proj_out: nn.Module,
) -> torch.Tensor:
    """`proj_out(local_branch(window_attention(to_qkv(x), windows), conv, norm))`, (B, H, W, C) -> (B, H, W, O).

    Has no gradient.
    """
    local = (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
    if (
        are_plain_projections(to_qkv, proj_out)
        and to_qkv.weight.dtype == proj_out.weight.dtype == hidden_states.dtype
        and not torch.is_autocast_enabled("cpu")
    ):
        return _infer_block(hidden_states, to_qkv.weight, to_qkv.bias, proj_out.weight, *windows, *local)
    qkv, bias = linear_and_bias(to_qkv, hidden_states)  # (B, H, W, 2C + E)
    return apply_linear(proj_out, _attend_and_convolve(qkv, bias, *windows, *local))


def are_plain_projections(to_qkv: nn.Module, proj_out: nn.Module) -> bool:
    """Whether both are `nn.Linear` and no more, the second without a bias."""
    return is_plain(to_qkv, nn.Linear) and is_plain(proj_out, nn.Linear) and proj_out.bias is None


def _multiplies(hidden_states: torch.Tensor, projection: torch.Tensor, windows: Windows) -> bool:
    """Whether the kernels' own products serve here; a thread takes a head of an image."""
    return (
        can_multiply(hidden_states, projection)
        and calibration.product_speeds(projection.dtype, projection.numel()).forward >= LEAST_SPEED
        and windows.dim % 2 == 0
        and torch.get_num_threads() <= hidden_states.shape[0] * windows.num_heads
    )


@torch.library.custom_op("d_emo::infer_block", mutates_args=(), device_types="cpu")
def _infer_block(
    hidden_states: torch.Tensor,
    expansion: torch.Tensor,
    bias: torch.Tensor | None,
    projection: torch.Tensor,
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
    eps: float,
) -> torch.Tensor:
    windows = Windows(dim, num_heads, height, width, neighborhood, remote, weighting)
    if not _multiplies(hidden_states, projection, windows):
        qkv = product(hidden_states, expansion)  # (B, H, W, 2C + E)
        expanded = _attend_and_convolve(qkv, bias, *windows, weight, gamma, beta, mean, variance, eps)
        return product(expanded, projection).contiguous()
    hidden_states, grid = hidden_states.contiguous(), hidden_states.shape[:3]
    out = hidden_states.new_empty(*grid, projection.shape[0])
    shapes = (
        cpu_shape((*grid, expansion.shape[0]), windows),
        cpu.LocalShape(*grid, projection.shape[1], weight.shape[-1], False, eps),
        cpu.BlockShape(projection.shape[0]),
    )
    local = _local_parameters(hidden_states, weight, gamma, beta, mean, variance)
    tensors = (hidden_states, expansion.contiguous(), cpu_parameter(bias, hidden_states), *local)
    arguments = (*shapes[1:], *tensors, projection.contiguous(), out)
    cpu.call("fused", "block_forward", out.dtype, shapes[0], *arguments)
    return out


@torch.library.custom_op("d_emo::attend_and_convolve", mutates_args=(), device_types="cpu")
def _attend_and_convolve(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
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
    eps: float,
) -> torch.Tensor:
    windows = Windows(dim, num_heads, height, width, neighborhood, remote, weighting)
    qkv = qkv.contiguous()
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[-1] - 2 * dim)
    shape = cpu.LocalShape(*out.shape, weight.shape[-1], False, eps)
    tensors = (qkv, cpu_parameter(bias, qkv), *_local_parameters(qkv, weight, gamma, beta, mean, variance), out)
    cpu.call("fused", "fused_forward", qkv.dtype, cpu_shape(qkv.shape, windows), shape, *tensors)
    return out


def _local_parameters(
    inputs: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
) -> tuple[torch.Tensor | None, ...]:
    """The local branch's parameters as the C++ kernels take them with `inputs`."""
    statistics = (cpu_parameter(mean, inputs), cpu_parameter(variance, inputs))
    return *kernel_parameters(inputs.dtype, weight, gamma, beta), *statistics


@_infer_block.register_fake
def _(hidden_states, expansion, bias, projection, *_):
    return hidden_states.new_empty(*hidden_states.shape[:3], projection.shape[0])


@_attend_and_convolve.register_fake
def _(qkv, bias, dim, *_):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[-1] - 2 * dim)


@register_flop_formula(torch.ops.d_emo.infer_block)
def block_flops(x_shape, expansion_shape, bias_shape, projection_shape, dim, *windows_and_weight, **__):
    """The projections', attention's and the convolution's."""
    pixels = x_shape[0] * x_shape[1] * x_shape[2]
    products = 2 * pixels * (math.prod(expansion_shape) + math.prod(projection_shape))
    return products + _flops((*x_shape[:3], expansion_shape[0]), bias_shape, dim, *windows_and_weight)


@register_flop_formula(torch.ops.d_emo.attend_and_convolve)
def _flops(qkv_shape, bias_shape, dim, heads, height, width, neighborhood, remote, weighting, weight_shape, *_, **__):
    """Attention's and the convolution's."""
    out_shape = (*qkv_shape[:3], qkv_shape[3] - 2 * dim)
    attention = attention_flops(qkv_shape, bias_shape, dim, heads, height, width, neighborhood, remote)
    return attention + convolution_flops(out_shape, weight_shape)
