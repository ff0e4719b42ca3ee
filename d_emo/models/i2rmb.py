"""The i2RMB block of EMOv2 and its spanning window attention, channels last.

Source: "EMOv2: Pushing 5M Vision Model Frontier", arXiv 2412.06674, section 3. What the paper leaves open (the bias
that padded pixels carry, the order of the heads' channels) follows its published code and is held by tests/golden.

Shapes: B batch, H x W token grid, C channels, E = expansion * C inner channels, w window side (pixels),
        n = number of windows along an axis, h heads, d = C / h channels of a query or key head, e d of a value head.
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..choices import one_of
from ..kernels import (
    ATTENTION_TYPES,
    Windows,
    attend_and_convolve,
    fuses_for_inference,
    is_plain,
    linear_and_bias,
    local_branch,
    window_attention,
)

# BatchNorm's epsilon in the published EMOv2 backbones; that D-EMOv2 has the same one is inferred.
BATCH_NORM_EPS = 1e-6


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
        one_of("attention_type", attention_type, ATTENTION_TYPES)
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
        # Padding comes before the projections, so padded tokens carry their biases and take part as keys.
        pad_bottom, pad_right = self.padding(height, width)
        if pad_bottom or pad_right:
            hidden_states = F.pad(hidden_states, (0, 0, 0, pad_right, 0, pad_bottom))
        attended = window_attention(*self.project(hidden_states))            # (B, H', W', E)
        return attended[:, :height, :width]                                  # (B, H, W, E)

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, Windows]:
        """Queries, keys and values of a grid that needs no padding; the bias still to be added; the windows."""
        _, height, width, _ = hidden_states.shape
        qkv, bias = linear_and_bias(self.to_qkv, hidden_states)              # (B, H, W, 2C + E)
        window = self._window(height, width)
        return qkv, bias, Windows.of(self.attention_type, self.dim, self.num_heads, window, (height, width))

    def padding(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that a grid lacks to be cut into windows."""
        window = self._window(height, width)
        return -height % window[0], -width % window[1]

    def _window(self, height: int, width: int) -> tuple[int, int]:
        if self.clip_window:
            return min(self.window_size, height), min(self.window_size, width)
        return self.window_size, self.window_size


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
        if self._fuses_for_inference(hidden_states):
            inputs = self.attn.project(hidden_states)
            hidden_states = attend_and_convolve(*inputs, self.conv, self.conv_norm)  # the next two lines at once
        else:
            hidden_states = self.attn(hidden_states)                         # (B, H, W, C) -> (B, H, W, E)
            hidden_states = local_branch(hidden_states, self.conv, self.conv_norm)  # x + SiLU(BatchNorm(conv(x)))
        return self.proj_out(hidden_states)                                  # (B, H, W, E) -> (B, H, W, C)

    def _fuses_for_inference(self, hidden_states: torch.Tensor) -> bool:
        return (
            self.attn.attention_type != "none"
            and fuses_for_inference(hidden_states, self.conv, self.conv_norm)
            and is_plain(self.attn, SpanningWindowAttention)
            and not any(self.attn.padding(*hidden_states.shape[1:3]))
        )
