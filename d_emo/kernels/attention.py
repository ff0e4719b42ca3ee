"""Spanning window attention: the operation, its plain PyTorch reference, and its registration with PyTorch.

Shapes: B batch, H x W token grid, C channels of all query or key heads, E channels of all value heads, h heads,
d = C / h, e = E / h, w window side.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import register_flop_formula

from . import cpu
from .backend import fast_path

ATTENTION_TYPES = ("none", "neighborhood", "remote", "spanning")


class Windows(NamedTuple):
    """How a grid is cut and attended to; the operators take its fields one by one.

    dim is C; the window's sides divide the grid's; `weight` multiplies each kind of window's result.
    """

    dim: int
    num_heads: int
    height: int
    width: int
    neighborhood: bool = True
    remote: bool = True
    weight: float = 1.0

    @classmethod
    def of(
        cls, attention_type: str, dim: int, num_heads: int, window: tuple[int, int], grid: Sequence[int]
    ) -> "Windows":
        """The windows of an attention type ("neighborhood", "remote" or "spanning") on a grid."""
        neighborhood, remote, weight = attention_type != "remote", attention_type != "neighborhood", 1.0
        if attention_type == "spanning" and tuple(grid) == tuple(window):
            # A single window covers the grid: both kinds are the same tokens.
            remote, weight = False, 2.0
        return cls(dim, num_heads, *window, neighborhood, remote, weight)


def window_attention(qkv: torch.Tensor, bias: torch.Tensor | None, windows: Windows) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) GELU(v) in every window, added up over the kinds of window.

    Args:
        qkv: (B, H, W, 2C + E), queries, keys and values along the last axis, heads outermost in each.
        bias: (2C + E,), added to `qkv`, or None.

    Returns:
        (B, H, W, E).
    """
    if fast_path(qkv, windows):
        return _window_attention(qkv, bias, *windows)
    return reference(qkv, bias, windows)


# ---- plain PyTorch -------------------------------------------------------------------------------------------------


def reference(qkv: torch.Tensor, bias: torch.Tensor | None, windows: Windows) -> torch.Tensor:
    """The definition, as explicit products.

    scaled_dot_product_attention's fused CPU kernel is slower here: value heads are several times as wide as key heads
    and the windows are small.
    """
    if bias is not None:
        qkv = qkv + bias.to(qkv.dtype)
    dim, heads, window = windows.dim, windows.num_heads, (windows.height, windows.width)
    query, key, value = qkv.split((dim, dim, qkv.shape[-1] - 2 * dim), dim=-1)
    query = query / math.sqrt(dim // heads)
    value = F.gelu(value)                                                    # exact (erf) GELU
    results = []
    for remote in [False] * windows.neighborhood + [True] * windows.remote:
        q, k, v = (split_windows(tokens, window, heads, remote) for tokens in (query, key, value))
        weights = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)            # (N, w * w, w * w)
        attended = torch.bmm(weights.to(v.dtype), v)                         # (N, w * w, e)
        results.append(merge_windows(attended, qkv.shape[:3], window, heads, remote))  # (B, H, W, E)
    total = results[0] if len(results) == 1 else results[0] + results[1]
    return total if windows.weight == 1 else windows.weight * total


def split_windows(tokens: torch.Tensor, window: tuple[int, int], num_heads: int, remote: bool) -> torch.Tensor:
    """Cut a token grid into windows and heads.

    Args:
        tokens: (B, H, W, D) with H and W multiples of `window`, D a multiple of `num_heads`.
        window: height and width of a window in tokens.
        remote: False takes adjacent tokens; True takes tokens at stride (H / window[0], W / window[1]).

    Returns:
        (B * windows * heads, window[0] * window[1], D / heads).
    """
    batch, height, width, _ = tokens.shape
    rows, columns = height // window[0], width // window[1]
    if remote:
        tokens = tokens.view(batch, window[0], rows, window[1], columns, num_heads, -1)
        tokens = tokens.permute(0, 2, 4, 5, 1, 3, 6)  # (B, n, n, h, w, w, d)
    else:
        tokens = tokens.view(batch, rows, window[0], columns, window[1], num_heads, -1)
        tokens = tokens.permute(0, 1, 3, 5, 2, 4, 6)  # (B, n, n, h, w, w, d)
    return tokens.reshape(batch * rows * columns * num_heads, window[0] * window[1], -1)


def merge_windows(
    windows: torch.Tensor, grid: Sequence[int], window: tuple[int, int], num_heads: int, remote: bool
) -> torch.Tensor:
    """Undo `split_windows` for a grid of (B, H, W) tokens: (B * windows * heads, w * w, D / heads) -> (B, H, W, D)."""
    batch, height, width = grid
    rows, columns = height // window[0], width // window[1]
    tokens = windows.view(batch, rows, columns, num_heads, window[0], window[1], -1)
    order = (0, 4, 1, 5, 2, 3, 6) if remote else (0, 1, 4, 2, 5, 3, 6)
    return tokens.permute(order).reshape(batch, height, width, -1)


# ---- the operator: C++ and Triton ----------------------------------------------------------------------------------


def attend(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    dim: int,
    num_heads: int,
    height: int,
    width: int,
    neighborhood: bool,
    remote: bool,
    weight: float,
) -> torch.Tensor:
    """The C++ kernel; see `window_attention`, and `Windows` for the numbers."""
    windows = Windows(dim, num_heads, height, width, neighborhood, remote, weight)
    qkv = qkv.contiguous()
    out = qkv.new_empty(*qkv.shape[:3], qkv.shape[-1] - 2 * dim)
    tensors = (qkv, cpu_parameter(bias, qkv), out)
    cpu.call("attention", "attention_forward", qkv.dtype, cpu_shape(qkv.shape, windows), *tensors)
    return out


def attend_backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    dim: int,
    num_heads: int,
    height: int,
    width: int,
    neighborhood: bool,
    remote: bool,
    weight: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of qkv and of the bias (2C + E,), which is there without a bias, too."""
    windows = Windows(dim, num_heads, height, width, neighborhood, remote, weight)
    qkv, grad = qkv.contiguous(), grad.to(qkv.dtype).contiguous()
    grad_qkv = torch.empty_like(qkv)
    sums = qkv.new_empty(qkv.shape[0], qkv.shape[-1], dtype=cpu.arithmetic(qkv.dtype))
    tensors = (qkv, cpu_parameter(bias, qkv), grad, grad_qkv, sums)
    cpu.call("attention", "attention_backward", qkv.dtype, cpu_shape(qkv.shape, windows), *tensors)
    return grad_qkv, sums.sum(0)


_window_attention = torch.library.custom_op(
    "d_emo::window_attention", attend, mutates_args=(), device_types="cpu"
)
_window_attention_backward = torch.library.custom_op(
    "d_emo::window_attention_backward", attend_backward, mutates_args=(), device_types="cpu"
)


@_window_attention.register_kernel("cuda")
def attend_on_gpu(qkv, bias, *windows):
    """The Triton kernel for `attend`."""
    from . import triton_attention

    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        return triton_attention.forward(qkv, bias, Windows(*windows))


@_window_attention_backward.register_kernel("cuda")
def attend_backward_on_gpu(grad, qkv, bias, *windows):
    """The Triton kernel for `attend_backward`."""
    from . import triton_attention

    with torch.cuda.device_of(qkv):
        return triton_attention.backward(grad, qkv, bias, Windows(*windows))


def cpu_parameter(parameter: torch.Tensor | None, tensor: torch.Tensor) -> torch.Tensor | None:
    """A parameter as the C++ kernels take it with `tensor`."""
    return None if parameter is None else parameter.to(cpu.arithmetic(tensor.dtype)).contiguous()


def cpu_shape(qkv_shape: Sequence[int], windows: Windows) -> cpu.AttentionShape:
    """The C++ kernels' description of the problem."""
    heads, value_dim = windows.num_heads, (qkv_shape[-1] - 2 * windows.dim) // windows.num_heads
    return cpu.AttentionShape(*qkv_shape[:3], heads, windows.dim // heads, value_dim, *windows[2:])


@_window_attention.register_fake
def _(qkv, bias, dim, *_):
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[-1] - 2 * dim)


@_window_attention_backward.register_fake
def _(grad, qkv, bias, *_):
    return qkv.new_empty(qkv.shape), qkv.new_empty(qkv.shape[-1], dtype=cpu.arithmetic(qkv.dtype))


def _keep_inputs(ctx, inputs, output):
    qkv, bias, *ctx.windows = inputs
    ctx.save_for_backward(qkv, bias)


def _backward(ctx, grad):
    qkv, bias = ctx.saved_tensors
    grad_qkv, grad_bias = _window_attention_backward(grad, qkv, bias, *ctx.windows)
    return grad_qkv, None if bias is None else grad_bias.to(bias.dtype), *[None] * len(ctx.windows)


_window_attention.register_autograd(_backward, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.d_emo.window_attention)
def attention_flops(qkv_shape, bias_shape, dim, heads, height, width, neighborhood, remote, *_, **__) -> int:
    """Two products a window: (w^2, d) (d, w^2) and (w^2, w^2) (w^2, e)."""
    batch, rows, columns, channels = qkv_shape
    return 2 * batch * rows * columns * height * width * (channels - dim) * (neighborhood + remote)


@register_flop_formula(torch.ops.d_emo.window_attention_backward)
def _backward_flops(grad_shape, *arguments, **_) -> int:
    """Twice the forward pass's; the probabilities' recomputation is not counted."""
    return 2 * attention_flops(*arguments)
