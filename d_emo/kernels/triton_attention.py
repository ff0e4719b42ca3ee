"""Spanning window attention in Triton, for CUDA GPUs: both kinds of window in one pass, windows read in place.

A program does one head of one image (and, forward, one piece of its value channels): first the neighborhood windows,
whose results it stores, then the remote ones, which it adds. Both see the same projections, so the second reading comes
from the cache, and no two programs write the same place.

Shapes and names: see attention.py; T tokens in a window, TP and DP are T and d rounded up to powers of two.
"""

import math

import torch
import triton
import triton.language as tl

from .attention import Windows

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

VALUE_BLOCK = 64  # value channels that are worked on at a time


@triton.jit
def _tokens(kind: tl.constexpr, window, t, height, width, WH: tl.constexpr, WW: tl.constexpr):
    """Numbers of a window's tokens; kind 0 is the neighborhood, 1 is remote."""
    rows, columns = height // WH, width // WW
    i, j, y, x = window // columns, window % columns, t // WW, t % WW
    if kind == 0:
        return (i * WH + y) * width + j * WW + x
    return (y * rows + i) * width + x * columns + j


@triton.jit
def _load(pointer, bias, token, channel, row, mask, HAS_BIAS: tl.constexpr):
    """Rows of tokens, bias added, in float32."""
    tile = tl.load(pointer + token[:, None] * row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        tile += tl.where(
            mask, tl.load(bias + channel[None, :] + tl.zeros_like(token)[:, None], mask=mask, other=0.0), 0.0
        )
    return tile


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _probabilities(q, k, t, scale, T: tl.constexpr, PRECISION: tl.constexpr):
    """softmax(q k^T * scale) in float32; zero in the columns past T."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    scores = tl.where(t[None, :] < T, scores, float("-inf"))
    scores = tl.exp(scores - tl.max(scores, 1)[:, None])
    return scores / tl.sum(scores, 1)[:, None]


@triton.jit
def _forward_kernel(
    qkv, bias, out, height, width, scale, weight,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EB: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, TP: tl.constexpr,
    NEIGHBORHOOD: tl.constexpr, REMOTE: tl.constexpr, HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    unit, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    T: tl.constexpr = WH * WW
    row: tl.constexpr = HEADS * (2 * D + E)
    image, head = unit // HEADS, unit % HEADS
    qkv += image * height * width * row
    out += image * height * width * HEADS * E
    t, d, e = tl.arange(0, TP), tl.arange(0, DP), piece * EB + tl.arange(0, EB)
    narrow = (t[:, None] < T) & (d[None, :] < D)
    wide = (t[:, None] < T) & (e[None, :] < E)
    for kind in tl.static_range(2):
        if (NEIGHBORHOOD and kind == 0) or (REMOTE and kind == 1):
            for window in range((height // WH) * (width // WW)):
                token = _tokens(kind, window, t, height, width, WH, WW)
                q = _load(qkv, bias, token, head * D + d, row, narrow, HAS_BIAS).to(DOT)
                k = _load(qkv, bias, token, HEADS * D + head * D + d, row, narrow, HAS_BIAS).to(DOT)
                p = _probabilities(q, k, t, scale, T, PRECISION) * weight
                v = _load(qkv, bias, token, 2 * HEADS * D + head * E + e, row, wide, HAS_BIAS)
                v = v * _normal_cdf(v)
                o = tl.dot(p.to(DOT), v.to(DOT), input_precision=PRECISION)
                place = out + token[:, None] * (HEADS * E) + (head * E + e)[None, :]
                if NEIGHBORHOOD and kind == 1:
                    o += tl.load(place, mask=wide, other=0.0).to(tl.float32)
                tl.store(place, o.to(out.dtype.element_ty), mask=wide)
            tl.debug_barrier()  # the remote windows read what other threads of this program have stored


@triton.jit
def _backward_kernel(
    grad, qkv, bias, grad_qkv, height, width, scale, weight,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, DP: tl.constexpr, EB: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, TP: tl.constexpr,
    NEIGHBORHOOD: tl.constexpr, REMOTE: tl.constexpr, HAS_BIAS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0).to(tl.int64)
    T: tl.constexpr = WH * WW
    row: tl.constexpr = HEADS * (2 * D + E)
    image, head = unit // HEADS, unit % HEADS
    qkv += image * height * width * row
    grad_qkv += image * height * width * row
    grad += image * height * width * HEADS * E
    t, d = tl.arange(0, TP), tl.arange(0, DP)
    narrow = (t[:, None] < T) & (d[None, :] < D)
    for kind in tl.static_range(2):
        if (NEIGHBORHOOD and kind == 0) or (REMOTE and kind == 1):
            for window in range((height // WH) * (width // WW)):
                token = _tokens(kind, window, t, height, width, WH, WW)
                q = _load(qkv, bias, token, head * D + d, row, narrow, HAS_BIAS).to(DOT)
                k = _load(qkv, bias, token, HEADS * D + head * D + d, row, narrow, HAS_BIAS).to(DOT)
                p = _probabilities(q, k, t, scale, T, PRECISION)
                p = tl.where(t[:, None] < T, p, 0.0)
                grad_p = tl.zeros((TP, TP), tl.float32)
                for piece in range(tl.cdiv(E, EB)):
                    e = piece * EB + tl.arange(0, EB)
                    wide = (t[:, None] < T) & (e[None, :] < E)
                    v = _load(qkv, bias, token, 2 * HEADS * D + head * E + e, row, wide, HAS_BIAS)
                    cdf = _normal_cdf(v)
                    slope = cdf + v * tl.exp(-0.5 * v * v) * 0.3989422804014327
                    place = grad + token[:, None] * (HEADS * E) + (head * E + e)[None, :]
                    g = (tl.load(place, mask=wide, other=0.0).to(tl.float32) * weight).to(DOT)
                    grad_p += tl.dot(g, tl.trans((v * cdf).to(DOT)), input_precision=PRECISION)
                    grad_v = tl.dot(tl.trans(p.to(DOT)), g, input_precision=PRECISION) * slope
                    channel = 2 * HEADS * D + head * E + e
                    _accumulate(grad_qkv, grad_v, token, channel, row, wide, NEIGHBORHOOD and kind == 1)
                grad_s = (p * (grad_p - tl.sum(p * grad_p, 1)[:, None]) * scale).to(DOT)
                grad_q = tl.dot(grad_s, k, input_precision=PRECISION)
                grad_k = tl.dot(tl.trans(grad_s), q, input_precision=PRECISION)
                _accumulate(grad_qkv, grad_q, token, head * D + d, row, narrow, NEIGHBORHOOD and kind == 1)
                _accumulate(grad_qkv, grad_k, token, HEADS * D + head * D + d, row, narrow, NEIGHBORHOOD and kind == 1)
            tl.debug_barrier()  # as in the forward pass


@triton.jit
def _accumulate(pointer, tile, token, channel, row, mask, ADD: tl.constexpr):
    place = pointer + token[:, None] * row + channel[None, :]
    if ADD:
        tile += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, tile.to(pointer.dtype.element_ty), mask=mask)


def _options(qkv: torch.Tensor, bias: torch.Tensor | None, windows: Windows) -> dict[str, object]:
    head_dim = windows.dim // windows.num_heads
    return {
        "HEADS": windows.num_heads,
        "D": head_dim,
        "E": (qkv.shape[-1] - 2 * windows.dim) // windows.num_heads,
        "DP": max(16, triton.next_power_of_2(head_dim)),
        "EB": VALUE_BLOCK,
        "WH": windows.height,
        "WW": windows.width,
        "TP": max(16, triton.next_power_of_2(windows.height * windows.width)),
        "NEIGHBORHOOD": windows.neighborhood,
        "REMOTE": windows.remote,
        "HAS_BIAS": bias is not None,
        # The type that matrix products take. Triton's interpreter has none in bfloat16.
        "DOT": tl.float32 if triton.knobs.runtime.interpret else _TYPES[qkv.dtype],
        # Float32 stays float32: TF32 would round to three digits.
        "PRECISION": "ieee",
    }


def forward(qkv: torch.Tensor, bias: torch.Tensor | None, windows: Windows) -> torch.Tensor:
    """`attention.window_attention` on a GPU (or in Triton's interpreter): float32, bfloat16 or float16."""
    qkv = qkv.contiguous()
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty(batch, height, width, channels - 2 * windows.dim)
    options = _options(qkv, bias, windows)
    scale = 1 / math.sqrt(windows.dim // windows.num_heads)
    pieces = triton.cdiv(out.shape[-1] // windows.num_heads, VALUE_BLOCK)
    arguments = (qkv, qkv if bias is None else bias, out, height, width, scale, windows.weight)
    _forward_kernel[(batch * windows.num_heads, pieces)](*arguments, **options)
    return out


def backward(
    grad: torch.Tensor, qkv: torch.Tensor, bias: torch.Tensor | None, windows: Windows
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of qkv and, in float32, of a bias added to it."""
    grad, qkv = grad.to(qkv.dtype).contiguous(), qkv.contiguous()
    batch, height, width, _ = qkv.shape
    grad_qkv = torch.empty_like(qkv)
    scale = 1 / math.sqrt(windows.dim // windows.num_heads)
    arguments = (grad, qkv, qkv if bias is None else bias, grad_qkv, height, width, scale, windows.weight)
    _backward_kernel[(batch * windows.num_heads,)](*arguments, **_options(qkv, bias, windows))
    return grad_qkv, grad_qkv.sum((0, 1, 2), dtype=torch.float32)
