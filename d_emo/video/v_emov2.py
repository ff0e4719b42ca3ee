"""V-EMOv2: EMOv2 with every convolution and window in time, height and width.

Source: "EMOv2: Pushing 5M Vision Model Frontier", arXiv 2412.06674, Table XIII. Its code was not published; the log of
its training (EMOv2's repository, resources/Vid) prints the configuration and the shape of every tensor, which this
network has. What a log does not tell is inferred: the stem's temporal stride of 2, which alone gives the published
multiply-adds, padding with zeros in time as in space, and remote windows in time.

Tensors have the names of the image network (d_emo/classification/emov2.py), so that `inflation.inflate` finds them.
Shapes: B batch, T frames, H x W grid of a stage, C channels in, O channels out, E inner channels of a block.
Blocks work channels last.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from d_emo.classification.checks import refuse_single_values
from d_emo.classification.emov2 import ATTENDING_STAGES, LAYER_NORM_EPS, DropPath, Stage, initialize
from d_emo.common.block_ranges import expands
from d_emo.common.ranges import checked
from d_emo.models.i2rmb import BATCH_NORM_EPS
from d_emo.video.attention import VideoWindowAttention
from d_emo.video.checks import check_clips
from d_emo.video.ranges import VIDEO, VIDEO_BLOCK, video_agrees

# Of the stem and the four stages; halved in the stem alone (inferred).
TEMPORAL_STRIDES = (2, 1, 1, 1, 1)


class VideoI2RMB(nn.Module):
    """The inside of the block: expand and attend, depthwise convolution, project; see `I2RMB`.

    Args:
        attn: (B, T, H, W, C) -> (B, T, H, W, E).
        kernel_size: odd side of the depthwise convolution, the same in time, height and width.
        out_dim: channels O.
        strides: of that convolution in time, height and width.
        local_skip: add the convolution's branch to its input; without it the branch replaces the input.
    """

    @checked(VIDEO_BLOCK)
    def __init__(
        self,
        attn: VideoWindowAttention,
        kernel_size: int,
        out_dim: int,
        *,
        strides: Sequence[int] = (1, 1, 1),
        local_skip: bool = True,
    ):
        super().__init__()
        inner_dim, (deep, high, wide) = attn.inner_dim, strides
        self.attn = attn
        self.local_skip = local_skip
        self.conv = nn.Conv3d(
            inner_dim, inner_dim, kernel_size, (deep, high, wide), kernel_size // 2, groups=inner_dim, bias=False
        )
        self.conv_norm = nn.BatchNorm3d(inner_dim, eps=BATCH_NORM_EPS)
        self.proj_out = nn.Linear(inner_dim, out_dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, H, W, C) -> (B, T', H', W', O); the input is normalised, the output not yet added to it."""
        attended = self.attn(hidden_states)  # (B, T, H, W, E)
        pixels = attended.permute(0, 4, 1, 2, 3)  # (B, E, T, H, W)
        if pixels.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # In bfloat16 PyTorch 2.14 leaves this convolution's gradients undefined on small grids, such as 4 x 7 x 7.
            with torch.autocast("cpu", enabled=False):
                local = self.conv(pixels.float())  # (B, E, T', H', W')
        else:
            local = self.conv(pixels)  # (B, E, T', H', W')
        local = F.silu(self.conv_norm(local)).permute(0, 2, 3, 4, 1)  # (B, T', H', W', E)
        return self.proj_out(attended + local if self.local_skip else local)  # (B, T', H', W', O)


class VideoBlock(nn.Module):
    """norm, then the inside of i2RMB, scaled and added to the input; `EMOBlock` in time and space.

    Args:
        in_dim, out_dim: channels C and O.
        expansion: E / C.
        head_dim: channels of a query or key head.
        kernel_size: side of the depthwise convolution.
        window_size: of attention, in time, height and width.
        attention_type, clip_window: see `VideoWindowAttention`.
        norm: "batch" or "layer".
        activation: of the expanded values where nothing attends, "silu" or "gelu".
        strides: of the depthwise convolution in time, height and width.
        skip: add the input; channels and grid must stay.
        layer_scale: initial scale of the branch; None for none.
        drop_path: probability of dropping the branch.
    """

    @checked(VIDEO_BLOCK, expands)
    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        expansion: float,
        head_dim: int,
        kernel_size: int,
        window_size: Sequence[int],
        attention_type: str,
        clip_window: bool,
        norm: str,
        activation: str,
        strides: Sequence[int],
        skip: bool,
        layer_scale: float | None,
        drop_path: float,
    ):
        super().__init__()
        self.has_skip = skip
        self.norm_kind = norm
        self.norm = (
            nn.BatchNorm3d(in_dim, eps=BATCH_NORM_EPS) if norm == "batch" else nn.LayerNorm(in_dim, eps=LAYER_NORM_EPS)
        )
        attn = VideoWindowAttention(
            in_dim, in_dim // head_dim, expansion, window_size, attention_type, clip_window, activation
        )
        self.i2rmb = VideoI2RMB(attn, kernel_size, out_dim, strides=strides, local_skip=skip)
        self.layer_scale = nn.Parameter(torch.full((out_dim,), layer_scale)) if layer_scale is not None else None
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, T, H, W, C) -> (B, T', H', W', O)."""
        branch = self.i2rmb(self._normalize(hidden_states))  # (B, T', H', W', O)
        if self.layer_scale is not None:
            branch = branch * self.layer_scale  # (B, T', H', W', O)
        return hidden_states + self.drop_path(branch) if self.has_skip else branch

    def _normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.norm_kind == "layer":
            return self.norm(hidden_states)
        return self.norm(hidden_states.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


class VideoStage(Stage):
    """Blocks of one resolution; the first one makes it."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> (B, O, T', H / 2, W / 2)."""
        return self.run_blocks(hidden_states.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)


class VideoStem(nn.Sequential):
    """3x3x3 convolution of stride (t, 2, 2), depthwise 3x3x3, 1x1x1: (B, C, T, H, W) -> (B, O, T / t, H / 2, W / 2)."""

    def __init__(self, in_channels: int, dim: int, temporal_stride: int):
        super().__init__()
        self.conv = nn.Conv3d(in_channels, dim, 3, stride=(temporal_stride, 2, 2), padding=1)
        self.conv_norm = nn.BatchNorm3d(dim, eps=BATCH_NORM_EPS)
        self.conv_act = nn.SiLU()
        self.depthwise = nn.Conv3d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.depthwise_norm = nn.BatchNorm3d(dim, eps=BATCH_NORM_EPS)
        self.depthwise_act = nn.SiLU()
        self.pointwise = nn.Conv3d(dim, dim, 1, bias=False)


class VEMOv2(nn.Module):
    """A video classifier; `create_video_classifier` builds the sizes by name. The defaults are V-EMOv2-5M's.

    Any number of frames from 1 on and any size of frame runs; grids are padded with zeros to whole windows.

    Args:
        depths, widths, expansions, head_dims, kernel_sizes: four numbers each, one a stage.
        num_classes: 0 leaves the head out.
        in_channels: of the frames.
        stem_dim: channels of the stem; None for the published ones (widths[0] / 2).
        window_size: the window's sides in time, height and width, in tokens.
        clip_window: shrink windows to grids smaller than them; the published network pads the grid.
        attention_type: "spanning", "neighborhood", "remote" or "none".
        attending_stages: which of the stages 1 to 4 attend; none of their first blocks does.
        norms, activations: four words each, one a stage.
        layer_scale: initial value, None for none.
        temporal_strides: five numbers, of the stem and of each stage (inferred).
        dropout: of the pooled features before the head, in training.
        drop_path: probability of the last block; rises linearly from 0.
    """

    @checked(VIDEO, video_agrees)
    def __init__(
        self,
        depths: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (48, 72, 160, 288),
        expansions: Sequence[float] = (2.0, 3.0, 4.0, 4.0),
        head_dims: Sequence[int] = (16, 24, 32, 32),
        kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        num_classes: int = 400,
        in_channels: int = 3,
        stem_dim: int | None = None,
        window_size: Sequence[int] = (2, 5, 5),
        clip_window: bool = False,
        attention_type: str = "spanning",
        attending_stages: Sequence[int] = ATTENDING_STAGES,
        norms: Sequence[str] = ("batch", "batch", "layer", "layer"),
        activations: Sequence[str] = ("silu", "silu", "gelu", "gelu"),
        layer_scale: float | None = 1e-6,
        temporal_strides: Sequence[int] = TEMPORAL_STRIDES,
        dropout: float = 0.5,
        drop_path: float = 0.05,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.widths = tuple(widths)
        self.temporal_strides = tuple(temporal_strides)
        self.stem_dim = stem_dim or max(1, widths[0] // 2)
        self.stem = VideoStem(in_channels, self.stem_dim, temporal_strides[0])
        drops = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        stages, in_dim = [], self.stem_dim
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                opens = index == 0
                attends = not opens and stage + 1 in attending_stages
                blocks.append(
                    VideoBlock(
                        in_dim,
                        widths[stage],
                        expansion=expansions[stage] * (2 if opens else 1),
                        head_dim=head_dims[stage] if attends else in_dim,
                        kernel_size=kernel_sizes[stage],
                        window_size=window_size,
                        attention_type=attention_type if attends else "none",
                        clip_window=clip_window,
                        norm=norms[stage],
                        activation=activations[stage],
                        strides=(temporal_strides[stage + 1], 2, 2) if opens else (1, 1, 1),
                        skip=not opens,
                        layer_scale=layer_scale,
                        drop_path=drops.pop(0),
                    )
                )
                in_dim = widths[stage]
            stages.append(VideoStage(blocks))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(in_dim, eps=LAYER_NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.head: nn.Module = nn.Linear(in_dim, num_classes) if num_classes else nn.Identity()
        self.apply(initialize)

    def frames_after(self, frames: int) -> int:
        """How many frames the last stage has of a clip of so many."""
        for stride in self.temporal_strides:
            frames = -(-frames // stride)
        return frames

    def forward_stages(self, clips: torch.Tensor) -> list[torch.Tensor]:
        """(B, T, C, H, W) -> the stem's and every stage's output, (B, O, T', H / 2^i, W / 2^i) with i = 1 to 5."""
        check_clips(clips, self.stem.conv)
        if self.frames_after(clips.shape[1]) == 1:
            refuse_single_values(self, clips, 2 ** (len(self.stages) + 1))
        outputs = [self.stem(clips.permute(0, 2, 1, 3, 4))]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs

    def forward_features(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, T, C, H, W) -> the last stage's output, normalised over channels, (B, O, T', H / 32, W / 32)."""
        return self.normed(self.forward_stages(clips)[-1])

    def normed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The last stage's output through the norm before the head, of the same shape."""
        return self.norm(hidden_states.permute(0, 2, 3, 4, 1)).permute(0, 4, 1, 2, 3)

    def forward_head(self, features: torch.Tensor) -> torch.Tensor:
        """(B, O, t, h, w) -> logits (B, num_classes); without a head the pooled features (B, O)."""
        return self.head(self.dropout(features.mean((2, 3, 4))))

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """(B, T, C, H, W), normalised -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(clips))
