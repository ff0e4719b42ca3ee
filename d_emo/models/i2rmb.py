"""The i2RMB block of EMOv2 and its spanning window attention, channels last.

Source: "EMOv2: Pushing 5M Vision Model Frontier", arXiv 2412.06674, section 3. What the paper leaves open (the bias
that padded pixels carry, the order of the heads' channels) follows its published code and is held by tests/golden. The
block of EMOv1 and the paper's ablations are in d_emo/classification/irmb.py.

Shapes: B batch, H x W token grid, C channels, E = expansion * C inner channels, w window side (pixels),
        h heads, d = C / h channels of a query or key head, e = E / h of a value head.
"""

import torch
import torch.nn.functional as F
from torch import nn

from d_emo.common.block_ranges import ATTENTION_TYPES as ATTENTION_TYPES
from d_emo.common.block_ranges import BLOCK, expands, heads_divide_block, undivided
from d_emo.common.ranges import checked

from ..kernels import local_branch, use_fused_forward, window_attention

# BatchNorm's epsilon in the published EMOv2 backbones; that D-EMOv2 has the same one is inferred.
BATCH_NORM_EPS = 1e-6


def check_heads(num_heads: int, *channels: int) -> None:
    """Refuse a number of heads that does not divide each of these numbers of channels."""
    if wrong := undivided(num_heads, *channels):
        raise ValueError(f"{wrong}.")


class SpanningWindowAttention(nn.Module):
    """Window attention whose neighborhood and remote windows share one set of queries, keys and values.

    The value projection expands the channels: each head has d query and key channels and e value channels. The two
    kinds of window see the same projections, and their results are added.

    Args:
        dim: input channels C.
        num_heads: heads h; must divide C and E.
        expansion: inner channels over input channels, E / C.
        window_size: window side w in tokens.
        attention_type: "spanning" (both kinds), "neighborhood" (adjacent tokens), "remote" (tokens at even strides), or
            "none" (the expanded values pass through).
        clip_window: shrink the window to a grid smaller than it, as D-EMOv2 does. Otherwise the grid is padded up to
            one window, as the published classifiers do.
    """

    @checked(BLOCK, expands)
    def __init__(
        self,
        dim: int,
        num_heads: int,
        expansion: float = 4.0,
        window_size: int = 8,
        attention_type: str = "spanning",
        clip_window: bool = True,
    ):
        super().__init__()
        self.dim = dim
        self.inner_dim = int(dim * expansion)
        self.num_heads = num_heads
        self.window_size = window_size
        self.attention_type = attention_type
        self.clip_window = clip_window
        self.make_projections()

    def make_projections(self) -> None:
        """The linear layers."""
        check_heads(self.num_heads, self.dim, self.inner_dim)
        query_key_dim = 0 if self.attention_type == "none" else 2 * self.dim
        # One matrix product for query, key and value, in this order along the output channels.
        self.to_qkv = nn.Linear(self.dim, query_key_dim + self.inner_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, E)."""
        _, height, width, _ = hidden_states.shape
        qkv = self.to_qkv(self.padded(hidden_states))                        # (B, H', W', 2C + E)
        if self.attention_type == "none":
            return F.gelu(qkv)
        window = self.window(height, width)
        attended = window_attention(qkv, self.attention_type, self.dim, self.num_heads, window)  # (B, H', W', E)
        return attended[:, :height, :width]                                  # (B, H, W, E)

    def window(self, height: int, width: int) -> tuple[int, int]:
        """The window's sides on a grid."""
        size = self.window_size
        if self.clip_window:
            # No min(), which torch.compile would leave open where it leaves the grid open.
            return size if size <= height else height, size if size <= width else width
        return size, size

    def padding(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that a grid lacks to be cut into windows."""
        window = self.window(height, width)
        return -height % window[0], -width % window[1]

    def padded(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros at the bottom and right. Before the projections, so padded tokens carry their biases and are keys."""
        pad_bottom, pad_right = self.padding(*hidden_states.shape[1:3])
        if self.attention_type == "none" or not (pad_bottom or pad_right):
            return hidden_states
        return F.pad(hidden_states, (0, 0, 0, pad_right, 0, pad_bottom))

    def macs_saved(self, batch: int, height: int, width: int, _: int) -> int:
        """Multiply-adds that a (B, H, W, C) grid of one window saves, being attended to once instead of twice."""
        pad_bottom, pad_right = self.padding(height, width)
        grid = height + pad_bottom, width + pad_right
        if self.attention_type != "spanning" or grid != self.window(height, width):
            return 0
        return batch * (grid[0] * grid[1]) ** 2 * (self.dim + self.inner_dim)


class I2RMB(nn.Module):
    """The inside of the improved inverted residual mobile block: expand and attend, depthwise convolution, project.

    Normalisation, residual connection and scaling belong to the caller, since classifiers (layer scale) and diffusion
    models (modulation) differ there.

    Args:
        dim, num_heads, expansion, window_size, attention_type, clip_window: see `SpanningWindowAttention`.
        kernel_size: odd side of the depthwise convolution.
        out_dim: channels of the result; None for `dim`.
    """

    @checked(BLOCK, expands, heads_divide_block)
    def __init__(
        self,
        dim: int,
        num_heads: int,
        expansion: float = 4.0,
        window_size: int = 8,
        kernel_size: int = 5,
        attention_type: str = "spanning",
        clip_window: bool = True,
        *,
        out_dim: int | None = None,
    ):
        super().__init__()
        self.attn = SpanningWindowAttention(dim, num_heads, expansion, window_size, attention_type, clip_window)
        inner_dim = self.attn.inner_dim
        self.conv = nn.Conv2d(
            inner_dim, inner_dim, kernel_size, padding=kernel_size // 2, groups=inner_dim, bias=False
        )
        self.conv_norm = nn.BatchNorm2d(inner_dim, eps=BATCH_NORM_EPS)
        self.proj_out = nn.Linear(inner_dim, out_dim or dim, bias=False)

    @use_fused_forward(attn=SpanningWindowAttention)
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, O); the input is normalised, the output not yet added to it."""
        attended = self.attn(hidden_states)                                  # (B, H, W, C) -> (B, H, W, E)
        mixed = local_branch(attended, self.conv, self.conv_norm)            # x + SiLU(BatchNorm(conv(x)))
        return self.proj_out(mixed)                                          # (B, H, W, E) -> (B, H, W, O)
