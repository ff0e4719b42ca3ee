"""The i2RMB block of EMOv2 and its spanning window attention, channels last.

Source: "EMOv2: Pushing 5M Vision Model Frontier", arXiv 2412.06674, section 3. What the paper leaves open (the bias
that padded pixels carry, the order of the heads' channels) follows its published code and is held by tests/golden.

Shapes: B batch, H x W token grid, C channels, E = expansion * C inner channels, w window side (pixels),
        n = number of windows along an axis, h heads, d = C / h channels of a query or key head, e d of a value head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

ATTENTION_TYPES = ("none", "neighborhood", "remote", "spanning")

# BatchNorm's epsilon in the published EMOv2 backbones; that D-EMOv2 has the same one is inferred.
BATCH_NORM_EPS = 1e-6


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
        tokens = tokens.permute(0, 2, 4, 5, 1, 3, 6)                         # (B, n, n, h, w, w, d)
    else:
        tokens = tokens.view(batch, rows, window[0], columns, window[1], num_heads, -1)
        tokens = tokens.permute(0, 1, 3, 5, 2, 4, 6)                         # (B, n, n, h, w, w, d)
    return tokens.reshape(batch * rows * columns * num_heads, window[0] * window[1], -1)


def merge_windows(
    windows: torch.Tensor, grid: tuple[int, int, int], window: tuple[int, int], num_heads: int, remote: bool
) -> torch.Tensor:
    """Undo `split_windows` for a grid of (B, H, W) tokens: (B * windows * heads, w * w, D / heads) -> (B, H, W, D)."""
    batch, height, width = grid
    rows, columns = height // window[0], width // window[1]
    tokens = windows.view(batch, rows, columns, num_heads, window[0], window[1], -1)
    order = (0, 4, 1, 5, 2, 3, 6) if remote else (0, 1, 4, 2, 5, 3, 6)
    return tokens.permute(order).reshape(batch, height, width, -1)


class SpanningWindowAttention(nn.Module):
    """Window attention whose neighborhood and remote windows share one set of queries, keys and values.

    The value projection expands the channels: each head has d query and key channels and e d value channels. The two
    kinds of window see the same projections, and their results are added.

    Args:
        dim: input channels C.
        num_heads: heads h; must divide `dim`.
        expansion: inner channels over input channels, E / C.
        window_size: window side w in tokens.
        attention_type: "none" (the expanded values pass through), "neighborhood", "remote" or "spanning" (both).
        clip_window: shrink the window to a grid smaller than it, as D-EMOv2 does. Otherwise the grid is padded up to
            one window, as the published classifiers do.
    """

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
        if attention_type not in ATTENTION_TYPES:
            raise ValueError(f"attention_type={attention_type!r} is unknown; use one of {', '.join(ATTENTION_TYPES)}.")
        self.inner_dim = int(dim * expansion)
        if dim % num_heads or self.inner_dim % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide {dim} channels and {self.inner_dim} inner channels; "
                "choose a number of heads that divides both."
            )
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self.attention_type = attention_type
        self.clip_window = clip_window
        query_key_dim = 0 if attention_type == "none" else 2 * dim
        # One matrix product for query, key and value, in this order along the output channels.
        self.to_qkv = nn.Linear(dim, query_key_dim + self.inner_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, E)."""
        if self.attention_type == "none":
            return F.gelu(self.to_qkv(hidden_states))                        # (B, H, W, E)

        _, height, width, _ = hidden_states.shape
        window = self._window(height, width)
        # Padding comes before the projections, so padded tokens carry their biases and take part as keys.
        pad_bottom, pad_right = -height % window[0], -width % window[1]
        if pad_bottom or pad_right:
            hidden_states = F.pad(hidden_states, (0, 0, 0, pad_right, 0, pad_bottom))

        qkv = self.to_qkv(hidden_states)                                     # (B, H', W', 2C + E)
        query, key, value = qkv.split((self.dim, self.dim, self.inner_dim), dim=-1)
        query = query / math.sqrt(self.dim // self.num_heads)
        value = F.gelu(value)                                                # exact (erf) GELU

        if self.attention_type != "spanning":
            attended = self._attend(query, key, value, window, remote=self.attention_type == "remote")
        elif query.shape[1:3] == window:
            # A single window covers the grid: both kinds of window are the same set of tokens.
            attended = 2 * self._attend(query, key, value, window, remote=False)
        else:
            attended = self._attend(query, key, value, window, remote=False)
            attended = attended + self._attend(query, key, value, window, remote=True)
        return attended[:, :height, :width]                                  # (B, H, W, E)

    def _window(self, height: int, width: int) -> tuple[int, int]:
        if self.clip_window:
            return min(self.window_size, height), min(self.window_size, width)
        return self.window_size, self.window_size

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: tuple[int, int], remote: bool
    ) -> torch.Tensor:
        """softmax(q k^T) v in every window, as explicit products.

        scaled_dot_product_attention's fused CPU kernel is slower here: value heads are `expansion` times as wide as
        key heads and the windows are small.
        """
        batch, height, width, _ = value.shape
        query = split_windows(query, window, self.num_heads, remote)         # (N, w * w, d)
        key = split_windows(key, window, self.num_heads, remote)             # (N, w * w, d)
        value = split_windows(value, window, self.num_heads, remote)         # (N, w * w, e d)
        weights = torch.bmm(query, key.transpose(1, 2)).softmax(dim=-1)      # (N, w * w, w * w)
        attended = torch.bmm(weights.to(value.dtype), value)                 # (N, w * w, e d)
        grid = (batch, height, width)
        return merge_windows(attended, grid, window, self.num_heads, remote)  # (B, H', W', E)


class I2RMB(nn.Module):
    """The inside of the improved inverted residual mobile block: expand and attend, depthwise convolution, project.

    Normalisation, residual connection and scaling belong to the caller, since classifiers (layer scale) and diffusion
    models (modulation) differ there.

    Args:
        dim, num_heads, expansion, window_size, attention_type, clip_window: see `SpanningWindowAttention`.
        kernel_size: odd side of the depthwise convolution.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        expansion: float = 4.0,
        window_size: int = 8,
        kernel_size: int = 5,
        attention_type: str = "spanning",
        clip_window: bool = True,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even, which shifts the grid; use {kernel_size + 1}.")
        self.attn = SpanningWindowAttention(dim, num_heads, expansion, window_size, attention_type, clip_window)
        inner_dim = self.attn.inner_dim
        self.conv = nn.Conv2d(inner_dim, inner_dim, kernel_size, padding=kernel_size // 2, groups=inner_dim, bias=False)
        self.conv_norm = nn.BatchNorm2d(inner_dim, eps=BATCH_NORM_EPS)
        self.proj_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C); the input is already normalised, the output not yet scaled or added."""
        hidden_states = self.attn(hidden_states)                             # (B, H, W, C) -> (B, H, W, E)
        local = self.conv(hidden_states.permute(0, 3, 1, 2))                 # (B, E, H, W), channels-last memory
        local = F.silu(self.conv_norm(local)).permute(0, 2, 3, 1)            # (B, H, W, E)
        return self.proj_out(hidden_states + local)                          # (B, H, W, E) -> (B, H, W, C)
