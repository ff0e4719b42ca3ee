"""Spanning window attention in Triton, for CUDA GPUs: both kinds of window in one pass, windows read in place.

A program does one head of one image (forward, where there are few of them, some of its value channels): first the
neighborhood windows, whose results it stores, then the remote ones, which it adds. No two programs write the same
place.

A head's d channels are worked on in parts whose sizes are powers of two, at least 16 (72 = 64 + 16, the second half
empty), its value channels in pieces of VALUE_BLOCK.

Shapes and names: see kernels/reference.py; T tokens in a window, TP is T rounded up to a power of two.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..reference import Windows
from .grids import SIZES, launch

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

VALUE_BLOCK = 64  # value channels that are worked on at a time
WARPS = 4  # of a program
WANTED_PROGRAMS = 512  # forward: some for every core of a GPU


@triton.jit
def _image_and_head(unit, first_image, HEADS: tl.constexpr):
    return (first_image + unit // HEADS).to(tl.int64), unit % HEADS


@triton.jit
def _tokens(kind: tl.constexpr, window, t, height, width, WH: tl.constexpr, WW: tl.constexpr):
    """Numbers of a window's tokens; kind 0 is the neighborhood, 1 is remote."""
    rows, columns = height // WH, width // WW
    i, j, y, x = window // columns, window % columns, t // WW, t % WW
    if kind == 0:
        return (i * WH + y) * width + j * WW + x
    return (y * rows + i) * width + x * columns + j


@triton.jit
def _load(pointer, token, t, channel, limit, row: tl.constexpr, T: tl.constexpr):
    """Channels up to `limit` of a window's tokens, rows of `row` apart; zeros past the T tokens."""
    return tl.load(pointer + token[:, None] * row + channel[None, :], mask=_mask(t, channel, limit, T), other=0.0)


@triton.jit
def _mask(t, channel, limit, T: tl.constexpr):
    return (t[:, None] < T) & (channel[None, :] < limit)


@triton.jit
def _head(
    pointer, token, t, first,
    row: tl.constexpr, D: tl.constexpr, PARTS: tl.constexpr, T: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A head's queries or keys, D channels from `first` on, as parts."""
    parts = ()
    for i in tl.static_range(len(PARTS)):
        channel = first + PARTS[i][0] + tl.arange(0, PARTS[i][1])
        parts = parts + (_load(pointer, token, t, channel, first + D, row, T).to(DOT),)
    return parts


@triton.jit
def _normal(x):
    """Cumulative distribution, to 1e-7 (Abramowitz and Stegun, 26.2.17), and density; cheaper than erf."""
    density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * x * x)
    t = 1.0 / (1.0 + 0.2316419 * tl.abs(x))
    tail = 1.330274429 * t - 1.821255978
    tail = ((tail * t + 1.781477937) * t - 0.356563782) * t + 0.319381530
    tail *= t * density
    return tl.where(x > 0.0, 1.0 - tail, tail), density


@triton.jit
def _probabilities(q, k, t, scale, T: tl.constexpr, PRECISION: tl.constexpr):
    """softmax(q k^T * scale) in float32; zero in the columns past T."""
    scores = tl.dot(q[0], tl.trans(k[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(q)):
        scores = tl.dot(q[i], tl.trans(k[i]), scores, input_precision=PRECISION)
    scores = tl.where(t[None, :] < T, scores * scale, float("-inf"))
    scores = tl.exp(scores - tl.max(scores, 1)[:, None])
    return scores / tl.sum(scores, 1)[:, None]


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    qkv, out, height, width, scale, weight, pieces, first_image,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr, EB: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, TP: tl.constexpr,
    NEIGHBORHOOD: tl.constexpr, REMOTE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`pieces` of a head's value channels; a head's programs follow one another, since they read the same keys."""
    all_pieces = tl.cdiv(E, EB)
    groups = tl.cdiv(all_pieces, pieces)
    image, head = _image_and_head(tl.program_id(0) // groups, first_image, HEADS)
    first = tl.program_id(0) % groups * pieces
    T: tl.constexpr = WH * WW
    row: tl.constexpr = HEADS * (2 * D + E)
    qkv += image * height * width * row
    out += image * height * width * HEADS * E
    t = tl.arange(0, TP)
    last = tl.minimum(first + pieces, all_pieces)
    for kind in tl.static_range(2):
        if (NEIGHBORHOOD and kind == 0) or (REMOTE and kind == 1):
            for window in range((height // WH) * (width // WW)):
                token = _tokens(kind, window, t, height, width, WH, WW)
                q = _head(qkv, token, t, head * D, row, D, PARTS, T, DOT)
                k = _head(qkv, token, t, (HEADS + head) * D, row, D, PARTS, T, DOT)
                p = (_probabilities(q, k, t, scale, T, PRECISION) * weight).to(DOT)
                for piece in tl.range(first, last, num_stages=2):
                    e = head * E + piece * EB + tl.arange(0, EB)
                    limit = (head + 1) * E
                    place, mask = out + token[:, None] * (HEADS * E) + e[None, :], _mask(t, e, limit, T)
                    v = _load(qkv, token, t, 2 * HEADS * D + e, 2 * HEADS * D + limit, row, T).to(tl.float32)
                    v *= _normal(v)[0]
                    if NEIGHBORHOOD and kind == 1:
                        before = tl.load(place, mask=mask, other=0.0).to(tl.float32)
                        o = tl.dot(p, v.to(DOT), input_precision=PRECISION) + before
                    else:
                        o = tl.dot(p, v.to(DOT), input_precision=PRECISION)
                    tl.store(place, o.to(out.dtype.element_ty), mask=mask)
            tl.debug_barrier()  # the remote windows read what other threads of this program have stored


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    grad, qkv, grad_qkv, height, width, scale, weight, first_image,
    HEADS: tl.constexpr, D: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr, EB: tl.constexpr,
    WH: tl.constexpr, WW: tl.constexpr, TP: tl.constexpr,
    NEIGHBORHOOD: tl.constexpr, REMOTE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    image, head = _image_and_head(tl.program_id(0), first_image, HEADS)
    T: tl.constexpr = WH * WW
    row: tl.constexpr = HEADS * (2 * D + E)
    qkv += image * height * width * row
    grad_qkv += image * height * width * row
    grad += image * height * width * HEADS * E
    t = tl.arange(0, TP)
    for kind in tl.static_range(2):
        if (NEIGHBORHOOD and kind == 0) or (REMOTE and kind == 1):
            for window in range((height // WH) * (width // WW)):
                token = _tokens(kind, window, t, height, width, WH, WW)
                q = _head(qkv, token, t, head * D, row, D, PARTS, T, DOT)
                k = _head(qkv, token, t, (HEADS + head) * D, row, D, PARTS, T, DOT)
                p = _probabilities(q, k, t, scale, T, PRECISION)
                p = tl.where(t[:, None] < T, p, 0.0)
                p_transposed = tl.trans((p * weight).to(DOT))
                grad_p = tl.zeros((TP, TP), tl.float32)  # transposed: (keys, queries)
                for piece in tl.range(tl.cdiv(E, EB), num_stages=2):
                    e = head * E + piece * EB + tl.arange(0, EB)
                    limit = (head + 1) * E
                    place, mask = grad + token[:, None] * (HEADS * E) + e[None, :], _mask(t, e, limit, T)
                    channel = 2 * HEADS * D + e
                    v = _load(qkv, token, t, channel, 2 * HEADS * D + limit, row, T).to(tl.float32)
                    g = tl.load(place, mask=mask, other=0.0).to(DOT)
                    cdf, density = _normal(v)
                    grad_p = tl.dot((v * cdf).to(DOT), tl.trans(g), grad_p, input_precision=PRECISION)
                    grad_v = tl.dot(p_transposed, g, input_precision=PRECISION) * (cdf + v * density)
                    _accumulate(grad_qkv, grad_v, token, channel, mask, row, NEIGHBORHOOD and kind == 1)
                grad_p = tl.trans(grad_p) * weight
                grad_s = (p * (grad_p - tl.sum(p * grad_p, 1)[:, None]) * scale).to(DOT)
                for i in tl.static_range(len(PARTS)):
                    d = PARTS[i][0] + tl.arange(0, PARTS[i][1])
                    mask = _mask(t, d, D, T)
                    grad_q = tl.dot(grad_s, k[i], input_precision=PRECISION)
                    grad_k = tl.dot(tl.trans(grad_s), q[i], input_precision=PRECISION)
                    _accumulate(grad_qkv, grad_q, token, head * D + d, mask, row, NEIGHBORHOOD and kind == 1)
                    _accumulate(grad_qkv, grad_k, token, (HEADS + head) * D + d, mask, row, NEIGHBORHOOD and kind == 1)
            tl.debug_barrier()  # as in the forward pass


@triton.jit
def _accumulate(pointer, tile, token, channel, mask, row: tl.constexpr, ADD: tl.constexpr):
    place = pointer + token[:, None] * row + channel[None, :]
    if ADD:
        tile += tl.load(place, mask=mask, other=0.0).to(tl.float32)
    tl.store(place, tile.to(pointer.dtype.element_ty), mask=mask)


def _parts(dim: int) -> tuple[tuple[int, int], ...]:
    """First channel and size of each part of a head: the binary digits of `dim` rounded up to a multiple of 16."""
    parts: list[tuple[int, int]] = []
    rest = triton.cdiv(dim, 16) * 16
    while rest:
        size = 1 << (rest.bit_length() - 1)
        parts.append((sum(size for _, size in parts), size))
        rest -= size
    return tuple(parts)


def _options(qkv: torch.Tensor, windows: Windows) -> dict[str, Any]:
    head_dim = windows.dim // windows.num_heads
    interpreted = triton.knobs.runtime.interpret
    return {
        "HEADS": windows.num_heads,
        "D": head_dim,
        "E": (qkv.shape[-1] - 2 * windows.dim) // windows.num_heads,
        "PARTS": _parts(head_dim),
        "EB": VALUE_BLOCK,
        "WH": windows.height,
        "WW": windows.width,
        "TP": max(16, triton.next_power_of_2(windows.height * windows.width)),
        "NEIGHBORHOOD": windows.neighborhood > 0,
        "REMOTE": windows.remote > 0,
        # The type that matrix products take. Triton's interpreter has none in bfloat16.
        "DOT": tl.float32 if interpreted else _TYPES[qkv.dtype],
        "PRECISION": "ieee",  # not TF32's three digits
        "num_warps": WARPS,
    }


def batch_of_several_pieces(channels: int, windows: Windows) -> int:
    """Images from which on a program of the forward pass does several pieces of a head's values, if there are any."""
    all_pieces = triton.cdiv((channels - 2 * windows.dim) // windows.num_heads, VALUE_BLOCK)
    return triton.cdiv(WANTED_PROGRAMS, windows.num_heads * max(1, all_pieces - 1))


def forward(qkv: torch.Tensor, windows: Windows) -> torch.Tensor:
    """`reference.window_attention` on a GPU (or in Triton's interpreter): float32, bfloat16 or float16, contiguous."""
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty(batch, height, width, channels - 2 * windows.dim)
    scale, weight = 1 / math.sqrt(windows.dim // windows.num_heads), max(windows.neighborhood, windows.remote)
    units, all_pieces = batch * windows.num_heads, triton.cdiv(out.shape[-1] // windows.num_heads, VALUE_BLOCK)
    pieces = triton.cdiv(all_pieces, triton.cdiv(WANTED_PROGRAMS, units))
    programs = triton.cdiv(all_pieces, pieces) * windows.num_heads
    arguments = (qkv, out, height, width, scale, float(weight), pieces)
    launch(_forward_kernel, programs, batch, *arguments, **_options(qkv, windows))
    return out


def backward(grad: torch.Tensor, qkv: torch.Tensor, windows: Windows) -> torch.Tensor:
    """The gradient of qkv."""
    batch, height, width, _ = qkv.shape
    grad_qkv = torch.empty_like(qkv)
    scale, weight = 1 / math.sqrt(windows.dim // windows.num_heads), max(windows.neighborhood, windows.remote)
    arguments = (grad, qkv, grad_qkv, height, width, scale, float(weight))
    launch(_backward_kernel, windows.num_heads, batch, *arguments, **_options(qkv, windows))
    return grad_qkv
