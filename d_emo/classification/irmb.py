"""The blocks of classifiers beside the plain i2RMB: EMOv1's iRMB, blocks that halve the grid, the papers' ablations.

Sources: "EMOv2: Pushing 5M Vision Model Frontier", arXiv 2412.06674, and "Rethinking Mobile Block for Efficient
Attention-based Models" (EMOv1), arXiv 2301.01146.

Shapes: see d_emo/models/i2rmb.py; O output channels.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..common.block_ranges import BLOCK, expands
from ..common.ranges import checked
from ..kernels import local_branch, window_attention
from ..kernels.reference import merge_windows, split_windows
from ..models.i2rmb import BATCH_NORM_EPS, I2RMB, SpanningWindowAttention, check_heads

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"gelu": F.gelu, "silu": F.silu}


@checked(BLOCK, expands)
def make_block(
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
) -> "I2RMB | IRMB":
    """The plain i2RMB where the options ask for it, else a block beside it.

    Args:
        dim, num_heads, expansion, window_size, attention_type, clip_window: see `SpanningWindowAttention`.
        kernel_size: odd side of the depthwise convolution.
        out_dim: channels O; None for `dim`.
        stride, dilation: of the depthwise convolution.
        activation: of the expanded values where nothing attends, "gelu" or "silu"; attended values take GELU.
        local: "conv", "deformable" or "none" in its place.
        local_skip: add the convolution's branch to its input; without it the branch replaces the input.
        attend: "values" (i2RMB: values are expanded, then mixed) or "inputs" (EMOv1's iRMB: mixed, then expanded).
        arrangement: "cascaded" (the convolution sees what was attended) or "parallel" (it sees the values before, and
            both are added; EMOv1's attention then mixes values as EMOv2's does, which one projection serves).
    """
    parallel = arrangement == "parallel" and attention_type != "none"
    plain = attend == "values" and attention_type != "none" and not parallel
    if plain and local == "conv" and local_skip and stride == dilation == 1:
        shape = (window_size, kernel_size, attention_type, clip_window)
        return I2RMB(dim, num_heads, expansion, *shape, out_dim=out_dim)
    arguments = (dim, num_heads, expansion, window_size, attention_type, clip_window)
    attn: SpanningWindowAttention
    if parallel:
        attn = ParallelAttention(*arguments, activation=activation)
    elif attend == "inputs":
        attn = InputWindowAttention(*arguments, activation=activation)
    elif attention_type == "none":
        attn = Expansion(*arguments, activation=activation)
    else:
        attn = SpanningWindowAttention(*arguments)
    if stride != 1 and local == "none":
        local = "conv"  # somebody has to halve the grid
    return (ParallelIRMB if parallel else IRMB)(
        attn, kernel_size, out_dim or dim, stride=stride, dilation=dilation, local=local, local_skip=local_skip
    )


class _ActivatedAttention(SpanningWindowAttention):
    """With an activation of the expanded values; other arguments as usual."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        expansion: float,
        window_size: int,
        attention_type: str,
        clip_window: bool,
        activation: str = "gelu",
    ):
        super().__init__(dim, num_heads, expansion, window_size, attention_type, clip_window)
        self.activation = ACTIVATIONS[activation]


class Expansion(_ActivatedAttention):
    """What takes attention's place where nothing attends: expanded values and their activation."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, E)."""
        return self.activation(self.to_qkv(hidden_states))                   # (B, H, W, E)


class InputWindowAttention(_ActivatedAttention):
    """EMOv1's attention: windows of the input itself are mixed, and what comes out is expanded.

    The published EMOv1 has "remote" windows.
    """

    def make_projections(self) -> None:
        """Queries and keys, and the expansion of what was mixed."""
        check_heads(self.num_heads, self.dim)
        self.to_qk = nn.Linear(self.dim, 2 * self.dim) if self.attention_type != "none" else None
        self.to_v = nn.Linear(self.dim, self.inner_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, E)."""
        if self.to_qk is not None:
            _, height, width, _ = hidden_states.shape
            tokens = self.padded(hidden_states)                              # (B, H', W', C)
            mixed = self._mix(tokens, self.to_qk(tokens), self.window(height, width))
            hidden_states = mixed[:, :height, :width]                        # (B, H, W, C)
        return self.activation(self.to_v(hidden_states))                     # (B, H, W, E)

    def _mix(self, tokens: torch.Tensor, query_key: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
        query, key = query_key.chunk(2, dim=-1)                              # (B, H, W, C) each
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


class ParallelAttention(_ActivatedAttention):
    """Spanning window attention that gives the values before it, too."""

    def with_values(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is attended to, and the expanded values before that, (B, H, W, C) -> twice (B, H, W, E)."""
        _, height, width, _ = hidden_states.shape
        qkv = self.to_qkv(self.padded(hidden_states))                        # (B, H', W', 2C + E)
        values = self.activation(qkv[..., 2 * self.dim:])                    # (B, H', W', E)
        window = self.window(height, width)
        attended = window_attention(qkv, self.attention_type, self.dim, self.num_heads, window)  # (B, H', W', E)
        return attended[:, :height, :width], values[:, :height, :width]


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


class IRMB(nn.Module):
    """A block of any attention, local branch and projection; `make_block` says what for.

    Args:
        attn: (B, H, W, C) -> (B, H, W, E).
        kernel_size, stride, dilation: of the depthwise convolution; its side is odd.
        out_dim: channels O.
        local: "conv", "deformable" or "none" in its place.
        local_skip: add the convolution's branch to its input.
    """

    @checked(BLOCK)
    def __init__(
        self,
        attn: SpanningWindowAttention,
        kernel_size: int,
        out_dim: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        local: str = "conv",
        local_skip: bool = True,
    ):
        super().__init__()
        self.attn = attn
        inner_dim, padding = attn.inner_dim, dilation * (kernel_size // 2)
        self.local_skip = local_skip
        self.conv: nn.Module | None = None
        if local == "deformable":
            self.conv = DeformableConvolution(inner_dim, kernel_size, stride, padding)
        elif local == "conv":
            self.conv = nn.Conv2d(
                inner_dim, inner_dim, kernel_size, stride, padding, dilation, groups=inner_dim, bias=False
            )
        self.conv_norm = nn.BatchNorm2d(inner_dim, eps=BATCH_NORM_EPS) if self.conv is not None else None
        self.proj_out = nn.Linear(inner_dim, out_dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, O), halved by a stride of 2; the input is normalised, the output not yet added."""
        attended = self.attn(hidden_states)                                  # (B, H, W, E)
        if self.conv is not None and self.conv_norm is not None and self.local_skip:
            return self.proj_out(local_branch(attended, self.conv, self.conv_norm))
        return self.proj_out(attended if self.conv is None else self.local(attended))  # (B, H', W', O)

    def local(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """SiLU(BatchNorm(conv(x))), (B, H, W, E) -> (B, H', W', E); zeros without a convolution."""
        if self.conv is None or self.conv_norm is None:
            return torch.zeros_like(hidden_states)
        local = self.conv(hidden_states.permute(0, 3, 1, 2))                 # (B, E, H', W'), channels-last memory
        return F.silu(self.conv_norm(local)).permute(0, 2, 3, 1)             # (B, H', W', E)


class ParallelIRMB(IRMB):
    """A block whose convolution sees the values before attention; what both make of them is added."""

    attn: ParallelAttention

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, O)."""
        attended, values = self.attn.with_values(hidden_states)              # (B, H, W, E) each
        return self.proj_out(attended + self.local(values))                  # (B, H, W, O)
