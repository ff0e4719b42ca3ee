"""EMOv2 and EMOv1: small classification backbones made of i2RMB and iRMB blocks.

Sources: "EMOv2: Pushing 5M Vision Model Frontier", arXiv 2412.06674 (sizes in Table IV, ablations in section 4), and
"Rethinking Mobile Block for Efficient Attention-based Models" (EMOv1), arXiv 2301.01146. What the papers leave open
follows their published definitions; golden outputs of those hold it (tests/classification/test_emov2.py).

Shapes: B batch, H x W grid of a stage, C channels in, O channels out, E inner channels of a block.
Blocks work channels last; stages take and give (B, C, H, W) in channels-last memory, so that nothing is copied between.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from d_emo.classification.checks import check_features, check_pixels, refuse_single_values
from d_emo.classification.irmb import make_block
from d_emo.classification.ranges import CLASSIFIER, FREEZING, stages_agree
from d_emo.common.ranges import checked
from d_emo.models.checkpointing import checkpoint_block
from d_emo.models.i2rmb import BATCH_NORM_EPS

LAYER_NORM_EPS = 1e-6
# Which of the four stages attend.
ATTENDING_STAGES = (3, 4)


class DropPath(nn.Module):
    """Drops a residual branch of whole samples in training, and scales those that stay (arXiv 1603.09382)."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C), or any other shape that begins with the batch."""
        if not self.training or self.probability == 0:
            return hidden_states
        keep = 1 - self.probability
        mask = hidden_states.new_empty(len(hidden_states), *[1] * (hidden_states.dim() - 1)).bernoulli_(keep)
        return hidden_states * (mask / keep)


class EMOBlock(nn.Module):
    """norm, then the inside of i2RMB (EMOv2) or iRMB (EMOv1), scaled and added to the input.

    Args:
        in_dim, out_dim: channels C and O.
        expansion: E / C.
        head_dim: channels of a query or key head.
        norm: "batch" or "layer".
        activation: of the expanded values where nothing attends, "silu" or "gelu".
        stride: of the depthwise convolution.
        skip: add the input; channels and grid must stay.
        layer_scale: initial scale of the branch; None for none (EMOv1).
        drop_path: probability of dropping the branch.
        attention_type, attend, window_size, clip_window, kernel_size, dilation, local, arrangement: see `make_block`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        expansion: float,
        head_dim: int,
        norm: str,
        activation: str,
        attention_type: str,
        attend: str,
        window_size: int,
        clip_window: bool,
        kernel_size: int,
        dilation: int,
        local: str,
        arrangement: str,
        stride: int,
        skip: bool,
        layer_scale: float | None,
        drop_path: float,
    ):
        super().__init__()
        self.has_skip = skip
        self.norm_kind = norm
        self.norm = (
            nn.BatchNorm2d(in_dim, eps=BATCH_NORM_EPS) if norm == "batch" else nn.LayerNorm(in_dim, eps=LAYER_NORM_EPS)
        )
        self.i2rmb = make_block(
            in_dim,
            in_dim // head_dim,
            expansion,
            window_size,
            kernel_size,
            attention_type,
            clip_window=clip_window,
            out_dim=out_dim,
            stride=stride,
            dilation=dilation,
            activation=activation,
            local=local,
            local_skip=self.has_skip,
            attend=attend,
            arrangement=arrangement,
        )
        self.layer_scale = nn.Parameter(torch.full((out_dim,), layer_scale)) if layer_scale is not None else None
        self.drop_path = DropPath(drop_path)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H / stride, W / stride, O)."""
        branch = self.i2rmb(self._normalize(hidden_states))  # (B, H', W', O)
        if self.layer_scale is not None:
            branch = branch * self.layer_scale  # (B, H', W', O)
        return hidden_states + self.drop_path(branch) if self.has_skip else branch

    def _normalize(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.norm_kind == "layer":
            return self.norm(hidden_states)
        # A plain BatchNorm, which detection code replaces by a frozen one, takes channels first.
        return self.norm(hidden_states.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Blocks of one resolution; the first one makes it.

    Attributes:
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them; BatchNorm's
            running statistics stay exact.
    """

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.gradient_checkpointing = False

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, O, H / 2, W / 2), or the grid as it was where the first block does not halve it."""
        return self.run_blocks(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, O, H / 2, W / 2)

    def run_blocks(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H / 2, W / 2, O), or the grid as it was."""
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            hidden_states = checkpoint_block(block, hidden_states) if again else block(hidden_states)
        return hidden_states


class StemV2(nn.Sequential):
    """EMOv2's stem: 3x3 convolution of stride 2, depthwise 3x3, 1x1. (B, 3, H, W) -> (B, O, H / 2, W / 2)."""

    def __init__(self, in_channels: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, dim, 3, stride=2, padding=1)
        self.conv_norm = nn.BatchNorm2d(dim, eps=BATCH_NORM_EPS)
        self.conv_act = nn.SiLU()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(dim, eps=BATCH_NORM_EPS)
        self.depthwise_act = nn.SiLU()
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, O, H / 2, W / 2)."""
        check_pixels(pixels, self.conv)
        return super().forward(pixels)


class StemV1(nn.Module):
    """EMOv1's stem: 3x3 convolution of stride 2, then a block of depthwise 3x3, squeeze and excitation, and 1x1."""

    def __init__(self, in_channels: int, dim: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, dim, 3, stride=2, padding=1)
        self.conv_norm = nn.BatchNorm2d(dim, eps=BATCH_NORM_EPS)
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(dim, eps=BATCH_NORM_EPS)
        self.squeeze = nn.Conv2d(dim, dim, 1)
        self.excite = nn.Conv2d(dim, dim, 1)
        self.pointwise = nn.Conv2d(dim, dim, 1, bias=False)
        self.act = nn.SiLU()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, O, H / 2, W / 2)."""
        check_pixels(pixels, self.conv)
        hidden_states = self.conv_norm(self.conv(pixels))  # (B, O, H / 2, W / 2)
        hidden_states = self.act(self.depthwise_norm(self.depthwise(hidden_states)))
        gate = self.excite(self.act(self.squeeze(hidden_states.mean((2, 3), keepdim=True))))  # (B, O, 1, 1)
        return self.pointwise(hidden_states * gate.sigmoid())


class EMOv2(nn.Module):
    """A classification backbone; `create_classifier` and the transformers classes build the published sizes.

    Args:
        version: 2 for EMOv2 (values are expanded, then mixed), 1 for EMOv1 (mixed, then expanded; its own stem).
        depths, widths, expansions, head_dims, kernel_sizes: four numbers each, one a stage.
        num_classes: 0 leaves the head out.
        in_channels: of the images.
        stem_dim: channels of the stem; None for the published ones (widths[0] / 2, or 24 for EMOv1).
        window_size: window side in tokens: 7 for images of 224, 8 for 256 and 512.
        clip_window: shrink windows to grids smaller than them, as D-EMOv2 does; the published classifiers pad the grid.
        attention_type: "spanning", "neighborhood", "remote" or "none".
        attending_stages: which of the stages 1 to 4 attend; none of their first blocks does.
        local: "conv", "deformable" (torchvision's) or "none" in place of the depthwise convolution.
        dilation: of that convolution.
        arrangement: "cascaded" (convolution after attention) or "parallel".
        norms, activations: four words each, one a stage.
        layer_scale: initial value, None for none.
        drop_path: probability of the last block; rises linearly from 0.
        output_stride: how much the grid shrinks in all; below 32 the last stages keep it and dilate, for segmentation.

    Attributes:
        frozen_stages, fixed_statistics: what `freeze` was last told.
    """

    frozen_stages = 0
    fixed_statistics = False

    @checked(CLASSIFIER, stages_agree)
    def __init__(
        self,
        version: int = 2,
        depths: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (48, 72, 160, 288),
        expansions: Sequence[float] = (2.0, 3.0, 4.0, 4.0),
        head_dims: Sequence[int] = (16, 24, 32, 32),
        kernel_sizes: Sequence[int] = (5, 5, 5, 5),
        num_classes: int = 1000,
        in_channels: int = 3,
        stem_dim: int | None = None,
        window_size: int = 7,
        clip_window: bool = False,
        attention_type: str = "spanning",
        attending_stages: Sequence[int] = ATTENDING_STAGES,
        local: str = "conv",
        dilation: int = 1,
        arrangement: str = "cascaded",
        norms: Sequence[str] = ("batch", "batch", "layer", "layer"),
        activations: Sequence[str] = ("silu", "silu", "gelu", "gelu"),
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.05,
        output_stride: int = 32,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.output_stride = output_stride
        self.widths = tuple(widths)
        stem_dim = stem_dim or (widths[0] // 2 if version == 2 else 24)
        self.stem_dim = stem_dim
        self.stem = StemV2(in_channels, stem_dim) if version == 2 else StemV1(in_channels, stem_dim)
        drops = torch.linspace(0, drop_path, sum(depths), device="cpu").tolist()
        stages, in_dim, reduction = [], stem_dim, 2
        for stage, depth in enumerate(depths):
            blocks = []
            # Beyond the output stride the grid stays, and the convolutions see as far as before.
            stride = 2 if reduction < output_stride else 1
            dilation *= 2 // stride
            reduction *= stride
            for index in range(depth):
                opens = index == 0
                attends = not opens and stage + 1 in attending_stages
                blocks.append(
                    EMOBlock(
                        in_dim,
                        widths[stage],
                        expansion=expansions[stage] * (2 if opens else 1),
                        head_dim=head_dims[stage] if attends else in_dim,
                        norm=norms[stage],
                        activation=activations[stage],
                        attention_type=attention_type if attends else "none",
                        attend="values" if version == 2 else "inputs",
                        window_size=window_size,
                        clip_window=clip_window,
                        kernel_size=kernel_sizes[stage],
                        dilation=dilation,
                        local=local,
                        arrangement=arrangement,
                        stride=stride if opens else 1,
                        skip=not opens,
                        layer_scale=layer_scale,
                        drop_path=drops.pop(0),
                    )
                )
                in_dim = widths[stage]
            stages.append(Stage(blocks))
        self.stages = nn.Sequential(*stages)  # timm's feature extractor looks into these only
        self.norm: nn.Module = nn.LayerNorm(in_dim, eps=LAYER_NORM_EPS)
        self.head: nn.Module = nn.Linear(in_dim, num_classes) if num_classes else nn.Identity()
        self.apply(initialize)

    def forward_stages(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """(B, 3, H, W) -> the stem's and every stage's output, (B, C, H / 2^i, W / 2^i) with i = 1 to 5."""
        refuse_single_values(self, pixels, self.output_stride)
        outputs = [self.stem(pixels)]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs

    def forward_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> the last stage's output, normalised over channels, (B, C, H / 32, W / 32)."""
        return self.normed(self.forward_stages(pixels)[-1])

    def normed(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The last stage's output through the norm before the head, (B, C, h, w) -> (B, C, h, w)."""
        return self.norm(hidden_states.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_head(self, features: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, C, h, w) -> logits (B, num_classes); or the pooled features (B, C)."""
        check_features(features, self.widths[-1])
        pooled = features.mean((2, 3))  # (B, C)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(pixels))

    @checked(FREEZING)
    def freeze(self, stages: int = 1, statistics: bool = True) -> None:
        """Keep the first stages as they are, and BatchNorm's statistics everywhere, while the rest learns.

        What is frozen stays so through `train()` of a network around this one, copies and loaded weights. Call again
        for another choice: `freeze(0, False)` lets everything learn. Detection trains with `freeze(1, True)`.

        Args:
            stages: the stem and so many stages get no gradient, and work as in `eval()`; 0 for none of them.
            statistics: the other stages' BatchNorms, too, normalise by running statistics and keep them; scale and
                shift learn.

        Raises:
            ValueError: there are not so many stages.
        """
        parts = [self.stem, *self.stages]
        if stages >= len(parts):
            raise ValueError(f"freeze: stages={stages} is not 0 to {len(parts) - 1}, the stages of this network.")
        for part in parts[: self.frozen_stages + 1 if self.frozen_stages else 0]:
            part.requires_grad_(True)
        self.frozen_stages, self.fixed_statistics = stages, statistics
        for part in self._frozen_parts():
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "EMOv2":
        """PyTorch's, which leaves what `freeze` froze in evaluation mode."""
        super().train(mode)
        for part in self._frozen_parts():
            part.eval()
        for module in self.modules() if self.fixed_statistics else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def _frozen_parts(self) -> Iterator[nn.Module]:
        if self.frozen_stages:
            yield from (self.stem, *self.stages[: self.frozen_stages])

    def __prepare_scriptable__(self) -> "EMOv2":
        raise RuntimeError(
            "EMOv2 cannot be scripted (torch.jit.script); use torch.compile, or d_emo.export for a file without Python."
        )

    def drop_final_norm(self) -> None:
        """Leave out the norm before the head, which backbones do not use."""
        self.norm = nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute the stages' activations again in the backward pass: less memory, about a third more time."""
        for module in self.modules():
            if isinstance(module, Stage):
                module.gradient_checkpointing = enable

    @checked(CLASSIFIER)
    def reset_classifier(self, num_classes: int) -> None:
        """A fresh head for other classes, on the network's device and in its type; 0 for none.

        Raises:
            ValueError: a number of classes that is none.
        """
        self.num_classes = num_classes
        self.head = self.make_head(self.widths[-1], num_classes)

    def make_head(self, features: int, num_classes: int) -> nn.Module:
        """An initialised layer from so many features to the classes; for 0 classes it does nothing."""
        like = next(self.parameters())
        head = nn.Linear(features, num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        initialize(head)
        return head.train(self.training)


@torch.no_grad()
def initialize(module: nn.Module) -> None:
    """Products from a normal distribution of deviation 0.02 with zero biases; the rest keeps PyTorch's own."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
