"""EMOv2 under torchvision's detectors: RetinaNet, Mask R-CNN and SSDLite.

    from d_emo.classification.detection import retinanet
    model = retinanet("EMOv2-5M", num_classes=91)

The heads, anchors, losses and image transform are torchvision's own, which must be installed; images are lists of
(3, H, W) in [0, 1]. A backbone is a name of `d_emo.list_classifiers()` (fresh weights) or the folder or Hub id of a
trained classifier.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    from torchvision.models.detection import MaskRCNN, RetinaNet
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
except ImportError as error:
    raise ImportError("d_emo.detection needs torchvision; pip install 'd-emo[eval]'.") from error

from d_emo.classification.transformers_models import IMAGENET_MEAN, IMAGENET_STD, EMOv2Backbone, EMOv2Config
from d_emo.classification.variants import CLASSIFIERS

PYRAMID_CHANNELS = 256
NORMALIZATION = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
# SSDLite's extra maps below the backbone's two, and its boxes' sizes and aspect ratios, as in torchvision's SSDLite.
EXTRA_CHANNELS = (512, 256, 256, 128)
NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)


def retinanet(backbone: str, num_classes: int, **options: Any) -> RetinaNet:
    """RetinaNet (arXiv 1708.02002) on stages 2 to 4.

    Args:
        backbone: name, folder or Hub id.
        num_classes: classes, the background included.
        **options: torchvision's, such as `min_size=640`.
    """
    stages = ("stage2", "stage3", "stage4")
    extra = LastLevelP6P7(PYRAMID_CHANNELS, PYRAMID_CHANNELS)
    return RetinaNet(PyramidBackbone(open_backbone(backbone, stages), extra), num_classes, **NORMALIZATION | options)


def mask_rcnn(backbone: str, num_classes: int, **options: Any) -> MaskRCNN:
    """Mask R-CNN (arXiv 1703.06870) on stages 1 to 4; arguments as of `retinanet`."""
    stages = ("stage1", "stage2", "stage3", "stage4")
    body = PyramidBackbone(open_backbone(backbone, stages), LastLevelMaxPool())
    return MaskRCNN(body, num_classes, **NORMALIZATION | options)


def ssdlite(backbone: str, num_classes: int, image_size: int = 320, **options: Any) -> SSD:
    """SSDLite (arXiv 1801.04381) on stages 3 and 4 and four smaller maps; arguments as of `retinanet`."""
    body = SSDLiteBackbone(open_backbone(backbone, ("stage3", "stage4")))
    anchors = DefaultBoxGenerator([[2, 3]] * len(body.channels), min_ratio=0.2, max_ratio=0.95)
    head = SSDLiteHead(body.channels, anchors.num_anchors_per_location(), num_classes, NORM)
    defaults = {"score_thresh": 0.001, "nms_thresh": 0.55, "detections_per_img": 300, "topk_candidates": 300}
    size = (image_size, image_size)
    return SSD(body, anchors, size, num_classes, head=head, **NORMALIZATION | defaults | options)


def open_backbone(name: str, stages: Sequence[str]) -> EMOv2Backbone:
    """A backbone that returns these stages: fresh by a size's name, trained by a folder or Hub id."""
    if name in CLASSIFIERS and not Path(name).is_dir():
        return EMOv2Backbone(EMOv2Config.of(name, out_features=list(stages)))
    return EMOv2Backbone.from_pretrained(name, out_features=list(stages))


class PyramidBackbone(nn.Module):
    """A feature pyramid (arXiv 1612.03144) on a backbone's stages, as torchvision's detectors take it.

    Args:
        backbone: returns feature maps.
        extra: adds coarser levels.
    """

    def __init__(self, backbone: EMOv2Backbone, extra: Any):
        super().__init__()
        self.backbone = backbone
        self.fpn = FeaturePyramidNetwork(list(backbone.channels), PYRAMID_CHANNELS, extra)
        self.out_channels = PYRAMID_CHANNELS

    def forward(self, images: torch.Tensor) -> "OrderedDict[str, torch.Tensor]":
        """(B, 3, H, W), normalised -> maps (B, 256, H / 2^i, W / 2^i), finest first."""
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

    def forward(self, images: torch.Tensor) -> "OrderedDict[str, torch.Tensor]":
        """(B, 3, H, W), normalised -> six maps, each half as wide as the one before."""
        maps = list(self.backbone(images).feature_maps)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return OrderedDict((str(number), level) for number, level in enumerate(maps))


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
