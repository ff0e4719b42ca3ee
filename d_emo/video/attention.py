"""Spanning window attention in time and space, channels last.

Source: V-EMOv2 of arXiv 2412.06674 (Table XIII); its published training log names windows of 2 x 5 x 5 tokens (time,
height, width). No code was published. That windows are cut in time as they are in space is inferred: clips of four
frames have one window in time, where both kinds hold the same frames.

Shapes: B batch, T x H x W token grid, C channels, E inner channels, (t, h, w) window, all as in d_emo/models/i2rmb.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from d_emo.classification.irmb import ACTIVATIONS
from d_emo.common.block_ranges import expands
from d_emo.common.ranges import checked
from d_emo.kernels import window_attention
from d_emo.models.i2rmb import check_heads
from d_emo.video.ranges import VIDEO_BLOCK

Window = tuple[int, int, int]


class VideoWindowAttention(nn.Module):
    """`SpanningWindowAttention` of clips: neighborhood and remote windows of (t, h, w) tokens, one set of projections.

    A neighborhood window holds adjacent tokens of all three axes, a remote window tokens at even strides of all three;
    what both give is added. The operator is that of images: `fold` lays the frames of a window below each other.

    Args:
        dim: input channels C.
        num_heads: heads; must divide C and E.
        expansion: E / C.
        window_size: the window's sides in time, height and width, in tokens.
        attention_type: "spanning" (both kinds), "neighborhood", "remote", or "none" (the expanded values pass through).
        clip_window: shrink the window to a grid smaller than it; otherwise the grid is padded up to one window.
        activation: of the expanded values where nothing attends, "silu" or "gelu"; attended values take GELU.
    """

    @checked(VIDEO_BLOCK, expands)
    def __init__(
        self,
        dim: int,
        num_heads: int,
        expansion: float = 4.0,
        window_size: Sequence[int] = (2, 5, 5),
        attention_type: str = "spanning",
        clip_window: bool = False,
        activation: str = "gelu",
    ):
        super().__init__()
        self.dim = dim
        self.inner_dim = int(dim * expansion)
        self.num_heads = num_heads
        self.window_size = tuple(window_size)
        self.attention_type = attention_type
        self.clip_window = clip_window
        self.activation = ACTIVATIONS[activation]
        attends = attention_type != "none"
        if attends:
            check_heads(num_heads, dim, self.inner_dim)
        # Queries, keys and values, in this order along the output channels, as in two dimensions.
        self.to_qkv = nn.Linear(dim, 2 * dim * attends + self.inner_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, H, W, C) -> (B, T, H, W, E)."""
        if self.attention_type == "none":
            return self.activation(self.to_qkv(hidden_states))
        _, frames, height, width, _ = hidden_states.shape
        qkv = self.to_qkv(self.padded(hidden_states))                        # (B, T', H', W', 2C + E)
        attended = self.attend(qkv, self.window(frames, height, width))      # (B, T', H', W', E)
        return attended[:, :frames, :height, :width]                         # (B, T, H, W, E)

    def attend(self, qkv: torch.Tensor, window: Window) -> torch.Tensor:
        """Both kinds of window, (B, T, H, W, 2C + E) -> (B, T, H, W, E); the window divides the grid."""
        kinds = ("neighborhood", "remote") if self.attention_type == "spanning" else (self.attention_type,)
        if tuple(qkv.shape[1:4]) == window:
            kinds = (self.attention_type,)  # a single window: both kinds are the same tokens, and the operator doubles
        deep, high, wide = window
        total = None
        for kind in kinds:
            folded = fold(qkv, window, kind == "remote")                     # (B n, t H, W, 2C + E)
            attended = window_attention(folded, kind, self.dim, self.num_heads, (deep * high, wide))
            attended = unfold(attended, qkv.shape, window, kind == "remote")  # (B, T, H, W, E)
            total = attended if total is None else total + attended
        assert total is not None
        return total

    def window(self, frames: int, height: int, width: int) -> Window:
        """The window's sides on a grid."""
        deep, high, wide = self.window_size
        if self.clip_window:
            # No min(), which torch.compile would leave open where it leaves the grid open.
            return (
                deep if deep <= frames else frames,
                high if high <= height else height,
                wide if wide <= width else width,
            )
        return deep, high, wide

    def padding(self, frames: int, height: int, width: int) -> Window:
        """Frames, rows and columns that a grid lacks to be cut into windows."""
        deep, high, wide = self.window(frames, height, width)
        return -frames % deep, -height % high, -width % wide

    def padded(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros at the end, bottom and right. Before the projections: padded tokens carry their biases and are keys."""
        pad_end, pad_bottom, pad_right = self.padding(*hidden_states.shape[1:4])
        if not (pad_end or pad_bottom or pad_right):
            return hidden_states
        return F.pad(hidden_states, (0, 0, 0, pad_right, 0, pad_bottom, 0, pad_end))

    def macs_saved(self, batch: int, frames: int, height: int, width: int, _: int) -> int:
        """Multiply-adds that a (B, T, H, W, C) grid of one window saves, being attended to once instead of twice."""
        sides = zip((frames, height, width), self.padding(frames, height, width), strict=True)
        grid = tuple(side + padding for side, padding in sides)
        if self.attention_type != "spanning" or grid != self.window(frames, height, width):
            return 0
        return batch * (grid[0] * grid[1] * grid[2]) ** 2 * (self.dim + self.inner_dim)


def fold(tokens: torch.Tensor, window: Window, remote: bool) -> torch.Tensor:
    """A clip's windows as a picture's windows of (t h, w) tokens, (B, T, H, W, D) -> (B T / t, t H, W, D).

    Args:
        tokens: (B, T, H, W, D), whose grid the window divides.
        window: (t, h, w).
        remote: False for adjacent tokens, True for tokens at the strides T / t and H / h.
    """
    batch, frames, height, width, channels = tokens.shape
    deep, high, _ = window
    if remote:
        tokens = tokens.reshape(batch, deep, frames // deep, high, height // high, width, channels)
        tokens = tokens.permute(0, 2, 1, 3, 4, 5, 6)                         # (B, n, t, h, m, W, D)
    else:
        tokens = tokens.reshape(batch, frames // deep, deep, height // high, high, width, channels)
        tokens = tokens.permute(0, 1, 3, 2, 4, 5, 6)                         # (B, n, m, t, h, W, D)
    return tokens.reshape(batch * (frames // deep), deep * height, width, channels)


def unfold(tokens: torch.Tensor, grid: Sequence[int], window: Window, remote: bool) -> torch.Tensor:
    """Undo `fold` for a grid of (B, T, H, W, ...): (B T / t, t H, W, D) -> (B, T, H, W, D)."""
    batch, frames, height, width = grid[:4]
    deep, high, _ = window
    channels = tokens.shape[-1]
    if remote:
        tokens = tokens.reshape(batch, frames // deep, deep, high, height // high, width, channels)
        tokens = tokens.permute(0, 2, 1, 3, 4, 5, 6)                         # (B, t, n, h, m, W, D)
    else:
        tokens = tokens.reshape(batch, frames // deep, height // high, deep, high, width, channels)
        tokens = tokens.permute(0, 1, 3, 2, 4, 5, 6)                         # (B, n, t, m, h, W, D)
    return tokens.reshape(batch, frames, height, width, channels)
