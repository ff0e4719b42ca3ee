"""A block's forward pass by kernels: in inference as one operation, in training with products of their own.

With running statistics the local branch needs only the channels that a head of attention has just made, so they stay in
the cache, and so do the projections. Shapes: B batch, H x W token grid, C channels, E inner channels, O outputs.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from .attention import attention_flops, window_attention
from .dispatch import arithmetic, is_plain, operator, remember, takes
from .inputs import check_grid, check_tensors, check_windows, same_device
from .linear import linear, linear_flops
from .local import KERNEL_SIZES, convolution_flops, fusible, local_branch
from .reference import Windows

Forward = Callable[[Any, torch.Tensor], torch.Tensor]


def use_fused_forward(attn: type[nn.Module]) -> Callable[[Forward], Forward]:
    """Decorate the forward of a block; kernels run in its place where that is faster and comes to the same.

    The forward stays the block's definition, as with transformers' `use_kernel_forward_from_hub`. It must be
    `proj_out(local_branch(attn(x), conv, conv_norm))`, (B, H, W, C) -> (B, H, W, O), of modules with these names. Where
    one of them is another than usual or has hooks (adapters, quantisation, offloading), the forward itself runs.

    Args:
        attn: the class whose forward is `window_attention(to_qkv(x), ...)`. Has `to_qkv`, `attention_type`, `dim`,
            `num_heads`, `window(height, width)` and `padding(height, width)`.
    """

    remember(attn)

    def decorate(forward: Forward) -> Forward:
        @functools.wraps(forward)
        def fused_or_forward(block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
            if takes("infer_block", hidden_states) and _is_usual(block, attn, hidden_states):
                return _run(block, hidden_states)
            return forward(block, hidden_states)

        return fused_or_forward

    return decorate


def _is_usual(block: Any, attn: type[nn.Module], hidden_states: torch.Tensor) -> bool:
    """Whether the block's modules do what their names say, and the grid needs no padding."""
    return (
        hidden_states.dim() == 4
        and is_plain(block.attn, attn)
        and block.attn.attention_type != "none"
        and is_plain(block.attn.to_qkv, nn.Linear)
        and is_plain(block.proj_out, nn.Linear)
        and block.proj_out.bias is None
        and hidden_states.shape[-1] == block.attn.dim
        and fusible(block.conv, block.conv_norm, hidden_states, block.attn.inner_dim)
        and not any(block.attn.padding(*hidden_states.shape[1:3]))
    )


def _run(block: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    attn, conv, norm, projection = block.attn, block.conv, block.conv_norm, block.proj_out.weight
    expansion, bias, grid = attn.to_qkv.weight, attn.to_qkv.bias, hidden_states.shape[1:3]
    cut = (attn.attention_type, attn.dim, attn.num_heads, attn.window(*grid))
    if (
        not torch.is_grad_enabled()
        and not norm.training
        and not torch.is_autocast_enabled("cpu")
        and hidden_states.dtype == expansion.dtype == projection.dtype
        and attn.dim % 2 == 0  # rows of whole pairs of bfloat16
        and _threads() <= hidden_states.shape[0] * attn.num_heads  # a thread takes a head of an image
    ):
        kind = arithmetic(hidden_states.dtype)
        factor = norm.weight.to(kind) * (norm.running_var.to(kind) + norm.eps).rsqrt()  # (E,)
        summand = norm.bias.to(kind) - norm.running_mean.to(kind) * factor  # (E,)
        taps = conv.weight.to(kind).flatten(1).t() * factor  # (K * K, E)
        return infer_operator(hidden_states, expansion, bias, projection, Windows.of(*cut, grid), taps, summand)
    attended = window_attention(linear(hidden_states, expansion, bias), *cut)  # (B, H, W, E)
    return linear(local_branch(attended, conv, norm), projection)  # (B, H, W, O)


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


# ---- registration with PyTorch -------------------------------------------------------------------------------------


def _check(x, expansion, bias, projection, windows, taps, summand):
    check_grid("infer_block", x)
    side = math.isqrt(len(taps)) if taps.dim() else 0
    if expansion.dim() != 2 or projection.dim() != 2 or side not in KERNEL_SIZES:
        raise ValueError("infer_block: the projections are no matrices, or there is no kernel for the convolution.")
    if not expansion.dtype == projection.dtype == x.dtype:
        raise ValueError(
            f"infer_block: the input is {x.dtype}, the projections {expansion.dtype} and {projection.dtype}; pass one "
            "type."
        )
    grid, wide, outputs = x.shape[:3], expansion.shape[0], projection.shape[0]
    check_windows("infer_block", grid, wide, windows)
    dim, inner = windows[0], wide - 2 * windows[0]
    check_tensors(
        "infer_block", x,
        expansion=(expansion, (wide, dim)), bias=(bias, (wide,)), projection=(projection, (outputs, inner)),
        taps=(taps, (side * side, inner)), summand=(summand, (inner,)), x=(x, (*grid, dim)),
    )  # fmt: skip


# The block without a gradient, (B, H, W, C) -> (B, H, W, O). `taps` (K * K, E) and `summand` (E,), in arithmetic types,
# are the convolution and the normalisation after it.
infer_operator = operator(
    "infer_block",
    "(Tensor x, Tensor expansion, Tensor? bias, Tensor projection, SymInt[] windows, Tensor taps, Tensor summand)"
    " -> Tensor",
    _check,
)


@infer_operator.register_fake
def _(hidden_states, expansion, bias, projection, windows, taps, summand):
    same_device("infer_block", hidden_states, expansion, bias, projection, taps, summand)
    return hidden_states.new_empty(*hidden_states.shape[:3], projection.shape[0])


@register_flop_formula(torch.ops.d_emo.infer_block)
def _flops(x_shape, expansion_shape, bias_shape, projection_shape, windows, taps_shape, *_, **__) -> int:
    """The projections', attention's and the convolution's."""
    grid, side = tuple(x_shape[:3]), round(taps_shape[0] ** 0.5)
    products = linear_flops(x_shape, expansion_shape) + linear_flops(x_shape, projection_shape)
    attention = attention_flops((*grid, expansion_shape[0]), windows)
    return products + attention + convolution_flops((*grid, taps_shape[1]), (side, side))
