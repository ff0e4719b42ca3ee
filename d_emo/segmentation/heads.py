"""Decode heads of the published segmenters, as mmsegmentation 1.2.2 computes them (outputs held by tests/segmentation).

Source: arXiv 2412.06674, tables XI and A4, and the configurations and logs of its authors (github:zhangzjn/EMOv2 at
582a96f). DeepLabv3: arXiv 1706.05587; PSPNet: 1612.01105; SegFormer: 2105.15203; Semantic FPN: 1901.02446. Where the
published layers differ from the papers', they are the published ones; resizing never aligns corners.

Shapes: B batch, C channels in, c of the head, K classes, h x w grid of a map. Maps come finest first.
A unit's BatchNorm is called `bn`: the published optimizer leaves out of weight decay what has "norm" in its name, which
are the backbone's, and the heads' decay.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from d_emo.segmentation.checks import refuse_single_value

BATCH_NORM_EPS = 1e-5
DILATIONS = (1, 12, 24, 36)  # one unit each: 1x1 for 1, 3x3 for the others
POOL_SIZES = (1, 2, 3, 6)
DROPOUT = 0.1


class ConvUnit(nn.Sequential):
    """Convolution without bias that keeps the grid, BatchNorm, ReLU. (B, C, h, w) -> (B, c, h, w).

    Args:
        in_channels, out_channels: C and c.
        kernel_size: odd.
        dilation: of the kernel.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, dilation: int = 1):
        super().__init__()
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPS)
        self.act = nn.ReLU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> (B, c, h, w).

        Raises:
            ValueError: BatchNorm would learn from a single value a channel.
        """
        refuse_single_value(self.bn, features)
        return super().forward(features)


class Classifier(nn.Conv2d):
    """The biased 1x1 convolution that ends a head; its weights begin with a deviation of 0.01."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(in_channels, num_classes, 1)


def resize(features: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Bilinear, to another map's grid. (B, C, h, w) -> (B, C, h', w')."""
    return F.interpolate(features, size=like.shape[-2:], mode="bilinear", align_corners=False)


class DeepLabv3Head(nn.Module):
    """Atrous pyramid: parallel units of different dilations and a global average, concatenated, then a 3x3 unit.

    Args:
        in_channels: C.
        num_classes: K.
        channels: c of each branch.
        dropout: probability of dropping a channel before the classifier.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        channels: int = 256,
        dropout: float = DROPOUT,
    ):
        super().__init__()
        self.pooled = ConvUnit(in_channels, channels)
        self.branches = nn.ModuleList(
            ConvUnit(in_channels, channels, 1 if dilation == 1 else 3, dilation) for dilation in DILATIONS
        )
        self.bottleneck = ConvUnit((1 + len(DILATIONS)) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = Classifier(channels, num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> logits (B, K, h, w).

        Raises:
            ValueError: one image in training, whose average is a single value a channel.
        """
        average = self.pooled(F.adaptive_avg_pool2d(features, 1))  # (B, c, 1, 1)
        parts = [resize(average, features), *(branch(features) for branch in self.branches)]  # (B, c, h, w) each
        hidden_states = self.bottleneck(torch.cat(parts, dim=1))  # (B, c, h, w)
        return self.classifier(self.dropout(hidden_states))


class PSPHead(nn.Module):
    """Pyramid pooling: averages over grids of 1, 2, 3 and 6, beside the map itself, then a 3x3 unit.

    Args:
        in_channels, num_classes, channels, dropout: see `DeepLabv3Head`.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, dropout: float = DROPOUT):
        super().__init__()
        self.branches = nn.ModuleList(ConvUnit(in_channels, channels) for _ in POOL_SIZES)
        self.bottleneck = ConvUnit(in_channels + len(POOL_SIZES) * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = Classifier(channels, num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> logits (B, K, h, w).

        Raises:
            ValueError: one image in training, whose average is a single value a channel.
        """
        parts = [features]
        for size, branch in zip(POOL_SIZES, self.branches, strict=True):
            pooled = branch(F.adaptive_avg_pool2d(features, size))  # (B, c, size, size)
            parts.append(resize(pooled, features))  # (B, c, h, w)
        hidden_states = self.bottleneck(torch.cat(parts, dim=1))  # (B, c, h, w)
        return self.classifier(self.dropout(hidden_states))


class SegformerHead(nn.Module):
    """A 1x1 unit a map (SegFormer's own has a linear layer), all resized to the finest, and a 1x1 unit over them.

    Args:
        in_channels: C of each map.
        num_classes, channels, dropout: see `DeepLabv3Head`.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, channels: int = 288, dropout: float = DROPOUT):
        super().__init__()
        self.branches = nn.ModuleList(ConvUnit(width, channels) for width in in_channels)
        self.fusion = ConvUnit(len(in_channels) * channels, channels)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = Classifier(channels, num_classes)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps (B, C, h / 2^i, w / 2^i) -> logits (B, K, h, w)."""
        # The finest is resized to its own grid: nothing happens, and the published counter counts it.
        parts = [resize(branch(level), maps[0]) for branch, level in zip(self.branches, maps, strict=True)]
        hidden_states = self.fusion(torch.cat(parts, dim=1))  # (B, c, h, w)
        return self.classifier(self.dropout(hidden_states))


def feature_pyramid(in_channels: Sequence[int], channels: int) -> nn.Module:
    """torchvision's `FeaturePyramidNetwork` (arXiv 1612.03144), Semantic FPN's neck.

    Args:
        in_channels: C of each map.
        channels: of every level.

    Raises:
        ImportError: torchvision is missing.
    """
    try:
        from torchvision.ops import FeaturePyramidNetwork
    except ImportError as error:
        raise ImportError("head='semantic_fpn' needs torchvision; pip install 'd-emo[eval]'.") from error
    return FeaturePyramidNetwork(list(in_channels), channels)


class SemanticFPNHead(nn.Module):
    """Each level of a feature pyramid brought to the finest by 3x3 units and doublings, and their sum.

    Args:
        in_channels: C of every level.
        levels: how many.
        num_classes, channels, dropout: see `DeepLabv3Head`.
    """

    def __init__(
        self, in_channels: int, num_classes: int, channels: int = 128, levels: int = 4, dropout: float = DROPOUT
    ):
        super().__init__()
        self.branches = nn.ModuleList(_climb(in_channels, channels, doublings) for doublings in range(levels))
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = Classifier(channels, num_classes)

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps (B, C, h / 2^i, w / 2^i) -> logits (B, K, h, w)."""
        hidden_states = self.branches[0](maps[0])  # (B, c, h, w)
        for branch, level in zip(self.branches[1:], maps[1:], strict=True):
            # Where a grid is odd, twice the coarser one is larger.
            hidden_states = hidden_states + resize(branch(level), hidden_states)
        return self.classifier(self.dropout(hidden_states))


def _climb(in_channels: int, channels: int, doublings: int) -> nn.Sequential:
    """As many times a 3x3 unit and a doubling of the grid; the unit alone for none."""
    layers: list[nn.Module] = []
    for number in range(max(1, doublings)):
        layers.append(ConvUnit(channels if number else in_channels, channels, 3))
        if doublings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
    return nn.Sequential(*layers)


class AuxiliaryHead(nn.Module):
    """One 3x3 unit and a classifier, on an inner map, in training alone.

    Args:
        in_channels, num_classes, channels, dropout: see `DeepLabv3Head`.
    """

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, dropout: float = DROPOUT):
        super().__init__()
        self.unit = ConvUnit(in_channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = Classifier(channels, num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, C, h, w) -> logits (B, K, h, w)."""
        return self.classifier(self.dropout(self.unit(features)))
