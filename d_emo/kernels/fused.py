"""Attention and local branch as one operation, for inference on the CPU.

With running statistics the local branch needs only the channels that a head has just made, so they stay in the cache.
"""

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from . import cpu
from .attention import Windows, attention_flops, cpu_parameter, cpu_shape
from .local import convolution_flops, fusible, kernel_parameters


def fuses_for_inference(hidden_states: torch.Tensor, conv: nn.Module, norm: nn.Module) -> bool:
    """Whether `attend_and_convolve` can be used: no gradients, running statistics, CPU kernels."""
    no_gradients = not torch.is_grad_enabled() and not norm.training
    return no_gradients and hidden_states.device.type == "cpu" and fusible(hidden_states, conv, norm)


def attend_and_convolve(
    qkv: torch.Tensor, bias: torch.Tensor | None, windows: Windows, conv: nn.Conv2d, norm: nn.BatchNorm2d
) -> torch.Tensor:
    """`local_branch(window_attention(qkv, bias, windows), conv, norm)`; see there. Has no gradient."""
    statistics = (norm.running_mean, norm.running_var)
    return _attend_and_convolve(qkv, bias, *windows, conv.weight, norm.weight, norm.bias, *statistics, norm.eps)


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
    local = cpu.LocalShape(*out.shape, weight.shape[-1], False, eps)
    statistics = [cpu_parameter(tensor, qkv) for tensor in (mean, variance)]
    parameters = kernel_parameters(qkv.dtype, weight, gamma, beta)
    tensors = (qkv, cpu_parameter(bias, qkv), *parameters, *statistics, out)
    cpu.call("fused", "fused_forward", qkv.dtype, cpu_shape(qkv, windows), local, *tensors)
    return out


@_attend_and_convolve.register_fake
def _(qkv, bias, dim, *_):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[-1] - 2 * dim)


@register_flop_formula(torch.ops.d_emo.attend_and_convolve)
def _flops(qkv_shape, bias_shape, dim, heads, height, width, neighborhood, remote, weighting, weight_shape, *_, **__):
    """Attention's and the convolution's."""
    out_shape = (*qkv_shape[:3], qkv_shape[3] - 2 * dim)
    attention = attention_flops(qkv_shape, bias_shape, dim, heads, height, width, neighborhood, remote)
    return attention + convolution_flops(out_shape, weight_shape)
