"""The block's two operators in plain PyTorch: their definition, and what runs where no backend has anything faster.

Shapes: B batch, H x W token grid, C channels of all query or key heads, E channels of all value heads, h heads,
d = C / h, e = E / h, w window side.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


class Windows(NamedTuple):
    """How a grid is cut and attended to: C, h, the window's sides, which divide the grid's.

    `neighborhood` and `remote` say how often each kind of window counts; if both do, equally often.
    """

    dim: int
    num_heads: int
    height: int
    width: int
    neighborhood: int = 1
    remote: int = 1

    @classmethod
    def of(
        cls, attention_type: str, dim: int, num_heads: int, window: tuple[int, int], grid: Sequence[int]
    ) -> "Windows":
        """The windows of an attention type ("neighborhood", "remote" or "spanning") on a grid."""
        neighborhood, remote = attention_type != "remote", attention_type != "neighborhood"
        if attention_type == "spanning" and tuple(grid) == tuple(window):
            # A single window covers the grid: both kinds are the same tokens.
            return cls(dim, num_heads, *window, 2, 0)
        return cls(dim, num_heads, *window, int(neighborhood), int(remote))


def window_attention(qkv: torch.Tensor, windows: Windows) -> torch.Tensor:
    """softmax(q k^T / sqrt(d)) GELU(v) in every window, added up over the kinds: (B, H, W, 2C + E) -> (B, H, W, E).

    scaled_dot_product_attention's fused CPU kernel is slower here: value heads are several times as wide as key heads
    and the windows are small.
    """
    dim, heads, window = windows.dim, windows.num_heads, (windows.height, windows.width)
    query, key, value = qkv.split((dim, dim, qkv.shape[-1] - 2 * dim), dim=-1)
    query = query / math.sqrt(dim // heads)
    value = F.gelu(value)                                                    # exact (erf) GELU
    results = []
    for remote in [False] * bool(windows.neighborhood) + [True] * bool(windows.remote):
        q, k, v = (split_windows(tokens, window, heads, remote) for tokens in (query, key, value))
        weights = torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1)            # (N, w * w, w * w)
        attended = torch.bmm(weights.to(v.dtype), v)                         # (N, w * w, e)
        results.append(merge_windows(attended, qkv.shape[:3], window, heads, remote))  # (B, H, W, E)
    total = results[0] if len(results) == 1 else results[0] + results[1]
    times = max(windows.neighborhood, windows.remote)
    return total if times == 1 else times * total


def split_windows(tokens: torch.Tensor, window: tuple[int, int], num_heads: int, remote: bool) -> torch.Tensor:
    """Cut a token grid into windows and heads.

    Args:
        tokens: (B, H, W, D) with H and W multiples of `window`, D a multiple of `num_heads`.
        window: height and width of a window in tokens.
        remote: False takes adjacent tokens; True takes tokens at stride (H / window[0], W / window[1]).

    Returns:
        (B * windows * heads, window[0] * window[1], D / heads).
    """
    batch, height, width, channels = tokens.shape
    rows, columns, dim = height // window[0], width // window[1], channels // num_heads
    if remote:
        tokens = tokens.view(batch, window[0], rows, window[1], columns, num_heads, dim)
        tokens = tokens.permute(0, 2, 4, 5, 1, 3, 6)                         # (B, n, n, h, w, w, d)
    else:
        tokens = tokens.view(batch, rows, window[0], columns, window[1], num_heads, dim)
        tokens = tokens.permute(0, 1, 3, 5, 2, 4, 6)                         # (B, n, n, h, w, w, d)
    return tokens.reshape(batch * rows * columns * num_heads, window[0] * window[1], dim)


def merge_windows(
    windows: torch.Tensor, grid: Sequence[int], window: tuple[int, int], num_heads: int, remote: bool
) -> torch.Tensor:
    """Undo `split_windows` for a grid of (B, H, W) tokens: (B * windows * heads, w * w, D / heads) -> (B, H, W, D)."""
    batch, height, width = grid
    rows, columns = height // window[0], width // window[1]
    dim = windows.shape[-1]
    tokens = windows.view(batch, rows, columns, num_heads, window[0], window[1], dim)
    order = (0, 4, 1, 5, 2, 3, 6) if remote else (0, 1, 4, 2, 5, 3, 6)
    return tokens.permute(order).reshape(batch, height, width, num_heads * dim)


Layer = Callable[[torch.Tensor], torch.Tensor]


def local_branch(hidden_states: torch.Tensor, conv: Layer, norm: Layer) -> torch.Tensor:
    """x + SiLU(BatchNorm(depthwise convolution of x)), (B, H, W, E) -> (B, H, W, E)."""
    local = conv(hidden_states.permute(0, 3, 1, 2))                          # (B, E, H, W), channels-last memory
    return hidden_states + F.silu(norm(local)).permute(0, 2, 3, 1)           # (B, H, W, E)
