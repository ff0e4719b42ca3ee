"""What stands between EMOv2 and the detectors' heads: feature pyramids, and SSDLite's smaller maps.

Shapes: B images of H x W pixels, C channels; level i of a backbone is H / 2^i x W / 2^i.
"""

from collections import OrderedDict
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from d_emo.classification.checks import refuse_single_values
from d_emo.classification.transformers_models import EMOv2Backbone

PYRAMID_CHANNELS = 256
# SSDLite's extra maps below the backbone's two.
EXTRA_CHANNELS = (512, 256, 256, 128)
NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)


class CoarserLevels(LastLevelP6P7):
    """RetinaNet's P6 from the backbone's last stage, and P7 from P6 without an activation between them.

    As published (mmdet's `add_extra_convs="on_input"`); torchvision's own has a ReLU before P7, and makes P6 from P5
    where both have as many channels.

    Args:
        in_channels: of the backbone's last stage.
        out_channels: of the pyramid.
    """

    def forward(
        self, p: list[torch.Tensor], c: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        """Levels of the pyramid and of the backbone, finest first -> the pyramid's with two more, and their names."""
        p6 = self.p6(c[-1])  # (B, 256, H / 64, W / 64)
        return [*p, p6, self.p7(p6)], [*names, "p6", "p7"]


class PyramidBackbone(nn.Module):
    """A feature pyramid (arXiv 1612.03144) on a backbone's stages, as torchvision's detectors take it.

    Args:
        backbone: returns feature maps.
        extra: adds coarser levels.

    Attributes:
        strides: of the levels in pixels, finest first.
    """

    def __init__(self, backbone: EMOv2Backbone, extra: Any, extra_levels: int):
        super().__init__()
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(list(backbone.channels), PYRAMID_CHANNELS, extra)
        self.out_channels = PYRAMID_CHANNELS
        self.strides = stage_strides(backbone)
        for _ in range(extra_levels):
            self.strides.append(2 * self.strides[-1])

    def forward(self, images: torch.Tensor) -> "OrderedDict[str, torch.Tensor]":
        """(B, 3, H, W), normalised -> maps (B, 256, H / stride, W / stride), finest first."""
        maps = self.backbone(images).feature_maps
        return self.fpn(OrderedDict((str(number), level) for number, level in enumerate(maps)))


class SSDLiteBackbone(nn.Module):
    """A backbone's two last stages and smaller maps made of them.

    Args:
        backbone: returns two feature maps.
    """

    def __init__(self, backbone: EMOv2Backbone):
        super().__init__()
        self.backbone = backbone
        self.channels = [*backbone.channels, *EXTRA_CHANNELS]
        inputs = self.channels[1:-1]
        self.extra = nn.ModuleList(_smaller(a, b) for a, b in zip(inputs, EXTRA_CHANNELS, strict=True))

    def grid_sides(self, image_size: int) -> list[int]:
        """How many cells the six maps have along a side of so many pixels; convolutions of stride 2 round up."""
        sides = [-(-image_size // stride) for stride in stage_strides(self.backbone)]
        for _ in self.extra:
            sides.append(-(-sides[-1] // 2))
        return sides

    def forward(self, images: torch.Tensor) -> "OrderedDict[str, torch.Tensor]":
        """(B, 3, H, W), normalised -> six maps, each half as wide as the one before.

        Raises:
            ValueError: one image in training, whose smallest map is a single value a channel.
        """
        # Stage 4 and the smaller maps: 2^(5 + 4) at least.
        refuse_single_values(self, images, 2 ** (5 + len(EXTRA_CHANNELS)))
        maps = list(self.backbone(images).feature_maps)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return OrderedDict((str(number), level) for number, level in enumerate(maps))


def stage_strides(backbone: EMOv2Backbone) -> list[int]:
    """How many pixels a cell of each returned map is wide."""
    config = backbone.config
    numbers = [config.stage_names.index(name) for name in backbone.out_features]
    return [min(2 ** (number + 1), config.output_stride) for number in numbers]


def _smaller(in_channels: int, out_channels: int) -> nn.Sequential:
    """1x1, depthwise 3x3 of stride 2, 1x1, each with norm and activation. (B, I, H, W) -> (B, O, H / 2, W / 2)."""
    middle = out_channels // 2

    def unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            NORM(outputs),
            nn.ReLU6(),
        ]

    layers = [
        *unit(in_channels, middle, 1, 1, 1),
        *unit(middle, middle, 3, 2, middle),
        *unit(middle, out_channels, 1, 1, 1),
    ]
    return nn.Sequential(*layers)
