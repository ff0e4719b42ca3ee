"""The i2RMB block of EMOv2, its spanning window attention, and the iRMB block of EMOv1, channels last.

Source: "EMOv2: Pushing 5M Vision Model Frontier", arXiv 2412.06674, section 3. What the paper leaves open (the bias
that padded pixels carry, the order of the heads' channels) follows its published code and is held by tests/golden.

Shapes: B batch, H x W token grid, C channels, E = expansion * C inner channels, w window side (pixels),
        n = number of windows along an axis, h heads, d = C / h channels of a query or key head, e d of a value head,
        O output channels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from d_emo.common.choices import one_of

from ..kernels import (
    ATTENTION_TYPES,
    Windows,
    apply_linear,
    is_plain,
    linear_and_bias,
    local_branch,
    merge_windows,
    split_windows,
    whole_block,
    window_attention,
)

# BatchNorm's epsilon in the published EMOv2 backbones; that D-EMOv2 has the same one is inferred.
BATCH_NORM_EPS = 1e-6
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "silu": F.silu}
LOCAL_KINDS = ("conv", "deformable", "none")
ARRANGEMENTS = ("cascaded", "parallel")


class _WindowedProjection(nn.Module):
    """What both kinds of attention share: their sizes, and how a grid is cut into windows."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        expansion: float,
        window_size: int,
        attention_type: str,
        clip_window: bool,
        activation: str,
        values_have_heads: bool,
    ):
        super().__init__()
        one_of("attention_type", attention_type, ATTENTION_TYPES)
        one_of("activation", activation, ACTIVATIONS)
        self.inner_dim = int(dim * expansion)
        split = (dim, self.inner_dim) if values_have_heads else (dim,)
        if any(channels % num_heads for channels in split):
            raise ValueError(
                f"num_heads={num_heads} does not divide {dim} channels and {self.inner_dim} inner channels; "
                "choose a number of heads that divides both."
            )
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_size
        self.attention_type = attention_type
        self.clip_window = clip_window
        self.activation = ACTIVATIONS[activation]

    def padding(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns that a grid lacks to be cut into windows."""
        window = self._window(height, width)
        return -height % window[0], -width % window[1]

    def _window(self, height: int, width: int) -> tuple[int, int]:
        size = self.window_size
        if self.clip_window:
            # No min(), which torch.compile would leave open where it leaves the grid open.
            return size if size <= height else height, size if size <= width else width
        return size, size

    def _padded(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Zeros at the bottom and right. Before the projections, so padded tokens carry their biases and are keys."""
        pad_bottom, pad_right = self.padding(*hidden_states.shape[1:3])
        if not (pad_bottom or pad_right):
            return hidden_states
        return F.pad(hidden_states, (0, 0, 0, pad_right, 0, pad_bottom))


class SpanningWindowAttention(_WindowedProjection):
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
        activation: of the values where nothing attends, "gelu" or "silu"; attended values take GELU.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        expansion: float = 4.0,
        window_size: int = 8,
        attention_type: str = "spanning",
        clip_window: bool = True,
        activation: str = "gelu",
    ):
        super().__init__(dim, num_heads, expansion, window_size, attention_type, clip_window, activation, True)
        query_key_dim = 0 if attention_type == "none" else 2 * dim
        # One matrix product for query, key and value, in this order along the output channels.
        self.to_qkv = nn.Linear(dim, query_key_dim + self.inner_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, E)."""
        if self.attention_type == "none":
            return self.activation(self.to_qkv(hidden_states))               # (B, H, W, E)
        _, height, width, _ = hidden_states.shape
        attended = window_attention(*self.project(self._padded(hidden_states)))  # (B, H', W', E)
        return attended[:, :height, :width]                                  # (B, H, W, E)

    def macs_saved(self, batch: int, height: int, width: int, _: int) -> int:
        """Multiply-adds that a (B, H, W, C) grid of one window saves, being attended to once instead of twice."""
        pad_bottom, pad_right = self.padding(height, width)
        tokens = (height + pad_bottom) * (width + pad_right)
        if self.attention_type == "none" or self.windows(height + pad_bottom, width + pad_right).weight == 1:
            return 0
        return batch * tokens**2 * (self.dim + self.inner_dim)

    def with_values(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is attended to, and the expanded values before that, (B, H, W, C) -> twice (B, H, W, E)."""
        _, height, width, _ = hidden_states.shape
        padded = self._padded(hidden_states)
        qkv = self.to_qkv(padded)                                            # (B, H', W', 2C + E)
        windows = self.windows(*padded.shape[1:3])
        values = self.activation(qkv[..., -self.inner_dim:])                 # (B, H', W', E)
        attended = window_attention(qkv, None, windows)                      # (B, H', W', E)
        return attended[:, :height, :width], values[:, :height, :width]

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, Windows]:
        """Queries, keys and values of a grid that needs no padding; the bias still to be added; the windows."""
        qkv, bias = linear_and_bias(self.to_qkv, hidden_states)              # (B, H, W, 2C + E)
        return qkv, bias, self.windows(*hidden_states.shape[1:3])

    def windows(self, height: int, width: int) -> Windows:
        """How a grid that needs no padding is cut."""
        window = self._window(height, width)
        return Windows.of(self.attention_type, self.dim, self.num_heads, window, (height, width))


class InputWindowAttention(_WindowedProjection):
    """EMOv1's attention: windows of the input itself are mixed, and what comes out is expanded.

    Args: see `SpanningWindowAttention`; the published EMOv1 has "remote" windows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        expansion: float = 4.0,
        window_size: int = 7,
        attention_type: str = "remote",
        clip_window: bool = False,
        activation: str = "gelu",
    ):
        super().__init__(dim, num_heads, expansion, window_size, attention_type, clip_window, activation, False)
        self.to_qk = nn.Linear(dim, 2 * dim) if attention_type != "none" else None
        self.to_v = nn.Linear(dim, self.inner_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, E)."""
        if self.to_qk is not None:
            _, height, width, _ = hidden_states.shape
            hidden_states = self._mix(self._padded(hidden_states))[:, :height, :width]  # (B, H, W, C)
        return self.activation(self.to_v(hidden_states))                     # (B, H, W, E)

    def _mix(self, tokens: torch.Tensor) -> torch.Tensor:
        assert self.to_qk is not None
        window = self._window(*tokens.shape[1:3])
        query, key = self.to_qk(tokens).chunk(2, dim=-1)                     # (B, H, W, C) each
        query = query / math.sqrt(self.dim // self.num_heads)
        total = None
        for remote in (False, True):
            if self.attention_type == ("neighborhood" if remote else "remote"):
                continue
            q, k, v = (split_windows(part, window, self.num_heads, remote) for part in (query, key, tokens))
            mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1), v)  # (N, w * w, d)
            mixed = merge_windows(mixed, tokens.shape[:3], window, self.num_heads, remote)  # (B, H, W, C)
            total = mixed if total is None else total + mixed
        assert total is not None
        return total


class DeformableConvolution(nn.Module):
    """Depthwise convolution at positions and with weights that the input chooses (arXiv 1811.11168), by torchvision.

    Offsets and masks come from a 1x1 convolution that starts at zero, the plain grid. How the paper's ablation made
    them was not published; its parameter count is larger than this one's.
    """

    def __init__(self, dim: int, kernel_size: int, stride: int, padding: int):
        super().__init__()
        try:
            from torchvision.ops import DeformConv2d
        except ImportError as error:
            raise ImportError("local='deformable' needs torchvision; pip install 'd-emo[eval]'.") from error
        self.conv = DeformConv2d(dim, dim, kernel_size, stride, padding, groups=dim, bias=False)
        self.offset = nn.Conv2d(dim, 3 * kernel_size**2, 1, stride)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, E, H, W) -> (B, E, H / stride, W / stride)."""
        taps = self.conv.kernel_size[0] ** 2
        offsets, mask = self.offset(pixels).split((2 * taps, taps), dim=1)   # (B, 2 K K, ...), (B, K K, ...)
        return self.conv(pixels, offsets, 2 * mask.sigmoid())


class I2RMB(nn.Module):
    """The inside of the improved inverted residual mobile block: expand and attend, depthwise convolution, project.

    Normalisation, residual connection and scaling belong to the caller, since classifiers (layer scale) and diffusion
    models (modulation) differ there.

    Args:
        dim, num_heads, expansion, window_size, attention_type, clip_window, activation: see `SpanningWindowAttention`.
        kernel_size: odd side of the depthwise convolution.
        out_dim: channels O; None for `dim`.
        stride, dilation: of the depthwise convolution.
        local: "conv", "deformable" or "none" in its place.
        local_skip: add the convolution's branch to its input; without it the branch replaces the input.
        attend: "values" (i2RMB: values are expanded, then mixed) or "inputs" (EMOv1's iRMB: mixed, then expanded).
        arrangement: "cascaded" (the convolution sees what was attended) or "parallel" (it sees the values before, and
            both are added; EMOv1's attention then mixes values as EMOv2's does, which one projection serves).
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
        *,
        out_dim: int | None = None,
        stride: int = 1,
        dilation: int = 1,
        activation: str = "gelu",
        local: str = "conv",
        local_skip: bool = True,
        attend: str = "values",
        arrangement: str = "cascaded",
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} is even, which shifts the grid; use {kernel_size + 1}.")
        one_of("local", local, LOCAL_KINDS)
        one_of("attend", attend, ("values", "inputs"))
        one_of("arrangement", arrangement, ARRANGEMENTS)
        if stride != 1 and local == "none":
            local = "conv"  # somebody has to halve the grid
        self.parallel = arrangement == "parallel" and attention_type != "none"
        attention = SpanningWindowAttention if attend == "values" or self.parallel else InputWindowAttention
        self.attn: Any = attention(dim, num_heads, expansion, window_size, attention_type, clip_window, activation)
        inner_dim, padding = self.attn.inner_dim, dilation * (kernel_size // 2)
        self.local_skip = local_skip
        self.conv: Any = None
        if local == "deformable":
            self.conv = DeformableConvolution(inner_dim, kernel_size, stride, padding)
        elif local == "conv":
            self.conv = nn.Conv2d(
                inner_dim, inner_dim, kernel_size, stride, padding, dilation, groups=inner_dim, bias=False
            )
        self.conv_norm: Any = nn.BatchNorm2d(inner_dim, eps=BATCH_NORM_EPS) if self.conv is not None else None
        self.proj_out = nn.Linear(inner_dim, out_dim or dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, O), halved by a stride of 2; the input is normalised, the output not yet added."""
        if self._is_whole(hidden_states):
            windows = self.attn.windows(*hidden_states.shape[1:3])
            return whole_block(hidden_states, self.attn.to_qkv, windows, self.conv, self.conv_norm, self.proj_out)
        if self.parallel:
            attended, values = self.attn.with_values(hidden_states)          # (B, H, W, E) each
            hidden_states = attended + self._local(values)                   # (B, H, W, E)
        else:
            hidden_states = self._with_local(self.attn(hidden_states))       # (B, H, W, C) -> (B, H', W', E)
        return apply_linear(self.proj_out, hidden_states)                    # (B, H', W', E) -> (B, H', W', O)

    def _with_local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """x + SiLU(BatchNorm(conv(x))), or without the first x, or x alone."""
        if self.conv is None:
            return hidden_states
        if self.local_skip:
            return local_branch(hidden_states, self.conv, self.conv_norm)    # (B, H, W, E)
        return self._local(hidden_states)                                    # (B, H', W', E)

    def _local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.conv is None:
            return torch.zeros_like(hidden_states)
        local = self.conv(hidden_states.permute(0, 3, 1, 2))                 # (B, E, H', W'), channels-last memory
        return F.silu(self.conv_norm(local)).permute(0, 2, 3, 1)             # (B, H', W', E)

    def _is_whole(self, hidden_states: torch.Tensor) -> bool:
        """Whether the block is what `whole_block` computes: attention, then the convolution and a skip, no padding."""
        return (
            self.attn.attention_type != "none"
            and self.conv is not None
            and self.local_skip
            and not self.parallel
            and is_plain(self.attn, SpanningWindowAttention)
            and not any(self.attn.padding(*hidden_states.shape[1:3]))
        )
