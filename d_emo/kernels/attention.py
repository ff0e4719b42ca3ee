"""The operator of spanning window attention: the choice between backends, and what PyTorch is told about it.

Its definition is `reference.window_attention`. Shapes: see there.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .dispatch import operator, takes
from .inputs import check_attention, check_grid, check_tensors, check_windows, same_device
from .reference import Windows


def window_attention(
    qkv: torch.Tensor, attention_type: str, dim: int, num_heads: int, window: tuple[int, int]
) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) GELU(v) in every window, added up over the kinds of window.

    Args:
        qkv: (B, H, W, 2C + E), queries, keys and values along the last axis, heads outermost in each.
        attention_type: "neighborhood" (adjacent tokens), "remote" (tokens at even strides) or "spanning" (both).
        dim: C.
        num_heads: h, divides C and E.
        window: height and width of a window in tokens; they divide H and W.

    Returns:
        (B, H, W, E).

    Raises:
        ValueError: no floating-point (B, H, W, ...), an unknown type, or windows or heads that do not divide.
    """
    check_attention(qkv, attention_type, dim, num_heads, window)
    windows = Windows.of(attention_type, dim, num_heads, window, qkv.shape[1:3])
    if takes("window_attention", qkv, windows):
        return attention_operator(qkv, windows)
    return reference.window_attention(qkv, windows)


# ---- registration with PyTorch -------------------------------------------------------------------------------------


def _check(qkv, windows):
    check_grid("window_attention", qkv)
    check_windows("window_attention", qkv.shape[:3], qkv.shape[-1], windows)


def _check_backward(grad, qkv, windows):
    _check(qkv, windows)
    shape = (*qkv.shape[:3], qkv.shape[-1] - 2 * windows[0])
    check_tensors("window_attention_backward", qkv, grad=(grad, shape))


# `reference.window_attention`, of `Windows`, and the gradient of qkv.
attention_operator = operator("window_attention", "(Tensor qkv, SymInt[] windows) -> Tensor", _check)
attention_backward_operator = operator(
    "window_attention_backward", "(Tensor grad, Tensor qkv, SymInt[] windows) -> Tensor", _check_backward
)


@attention_operator.register_fake
def _(qkv, windows):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[-1] - 2 * windows[0])


@attention_backward_operator.register_fake
def _(grad, qkv, windows):
    same_device("window_attention_backward", grad, qkv)
    return qkv.new_empty(qkv.shape)


def _keep_inputs(ctx, inputs, output):
    qkv, ctx.windows = inputs
    ctx.save_for_backward(qkv)


def _backward(ctx, grad):
    return attention_backward_operator(grad, *ctx.saved_tensors, ctx.windows), None


attention_operator.register_autograd(_backward, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.d_emo.window_attention)
def attention_flops(qkv_shape, windows, *_, **__) -> int:
    """Two products a window: (w^2, d) (d, w^2) and (w^2, w^2) (w^2, e)."""
    batch, rows, columns, channels = qkv_shape
    dim, _, height, width, neighborhood, remote = windows
    kinds = bool(neighborhood) + bool(remote)
    return 2 * batch * rows * columns * height * width * (channels - dim) * kinds


@register_flop_formula(torch.ops.d_emo.window_attention_backward)
def _backward_flops(grad_shape, *arguments, **_) -> int:
    """Twice the forward pass's; the probabilities' recomputation is not counted."""
    return 2 * attention_flops(*arguments)
