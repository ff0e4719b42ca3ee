"""EMOv2 under torchvision's detectors: RetinaNet, Mask R-CNN and SSDLite.

    from d_emo.classification.detection import retinanet
    model = retinanet("EMOv2-5M", num_classes=91)

The heads, anchors, losses and image transform are torchvision's own, which must be installed; images are lists of
(3, H, W) in [0, 1], of any sizes, and are normalised as those that the backbone was trained on. A backbone is a name
of `d_emo.list_classifiers()` (fresh weights) or the folder or Hub id of a trained classifier.
"""

import contextlib
import difflib
import inspect
import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoImageProcessor

try:
    from torchvision.models.detection import MaskRCNN, RetinaNet
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from torchvision.ops import FeaturePyramidNetwork
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
except ImportError as error:
    raise ImportError("d_emo.detection needs torchvision; pip install 'd-emo[eval]'.") from error

from d_emo.classification.checks import refuse_single_values
from d_emo.classification.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from d_emo.classification.transformers_models import EMOv2Backbone, EMOv2Config
from d_emo.classification.variants import CLASSIFIERS
from d_emo.common.block_ranges import CLASSES, SIDE
from d_emo.common.messages import first_line
from d_emo.common.ranges import Table, Whole, checked

DETECTOR: Table = {"num_classes": Whole(2, CLASSES.high, "the background is one"), "image_size": SIDE}
PYRAMID_CHANNELS = 256
# SSDLite's extra maps below the backbone's two, and its boxes' sizes and aspect ratios, as in torchvision's SSDLite.
EXTRA_CHANNELS = (512, 256, 256, 128)
NORM = partial(nn.BatchNorm2d, eps=0.001, momentum=0.03)


class _Checking:
    """Refuses images and targets that do not fit, before the detector does in words of its inside."""

    label_count: int
    image_channels: int

    def forward(self, images: Any, targets: Any = None) -> Any:
        """torchvision's; see `check_scene` and `check_targets`."""
        assert isinstance(self, nn.Module)
        check_scene(images, self.image_channels)
        if self.training:
            check_targets(targets, images, self.label_count, isinstance(self, MaskRCNN))
        return super().forward(images, targets)  # type: ignore[misc]


class _RetinaNet(_Checking, RetinaNet):
    pass


class _MaskRCNN(_Checking, MaskRCNN):
    pass


class _SSD(_Checking, SSD):
    pass


@checked(DETECTOR)
def retinanet(backbone: str, num_classes: int, **options: Any) -> RetinaNet:
    """RetinaNet (arXiv 1708.02002) on stages 2 to 4.

    Args:
        backbone: name, folder or Hub id.
        num_classes: classes, the background included.
        **options: torchvision's, such as `min_size=640`.

    Raises:
        ValueError: there is no such backbone or option, or a number is out of range.
    """
    stages = ("stage2", "stage3", "stage4")
    _check_options(RetinaNet, options)
    body = open_backbone(backbone, stages)
    pyramid = PyramidBackbone(body, LastLevelP6P7(PYRAMID_CHANNELS, PYRAMID_CHANNELS))
    return _told(_RetinaNet(pyramid, num_classes, **normalization(backbone, body) | options), num_classes, body)


@checked(DETECTOR)
def mask_rcnn(backbone: str, num_classes: int, **options: Any) -> MaskRCNN:
    """Mask R-CNN (arXiv 1703.06870) on stages 1 to 4; arguments as of `retinanet`."""
    stages = ("stage1", "stage2", "stage3", "stage4")
    _check_options(MaskRCNN, options)
    body = open_backbone(backbone, stages)
    pyramid = PyramidBackbone(body, LastLevelMaxPool())
    return _told(_MaskRCNN(pyramid, num_classes, **normalization(backbone, body) | options), num_classes, body)


@checked(DETECTOR)
def ssdlite(backbone: str, num_classes: int, image_size: int = 320, **options: Any) -> SSD:
    """SSDLite (arXiv 1801.04381) on stages 3 and 4 and four smaller maps; trains on two images or more at once.

    Args:
        backbone, num_classes, **options: see `retinanet`.
        image_size: side that images are resized to, in pixels.
    """
    _check_options(SSD, options)
    defaults = {"score_thresh": 0.001, "nms_thresh": 0.55, "detections_per_img": 300, "topk_candidates": 300}
    inner = open_backbone(backbone, ("stage3", "stage4"))
    body = SSDLiteBackbone(inner)
    anchors = DefaultBoxGenerator([[2, 3]] * len(body.channels), min_ratio=0.2, max_ratio=0.95)
    head = SSDLiteHead(body.channels, anchors.num_anchors_per_location(), num_classes, NORM)
    size = (image_size, image_size)
    chosen = normalization(backbone, inner) | defaults | options
    return _told(_SSD(body, anchors, size, num_classes, head=head, **chosen), num_classes, inner)


def _check_options(kind: type[nn.Module], options: dict[str, Any]) -> None:
    """Refuse options that the detector does not have; torchvision would drop them."""
    known = {*inspect.signature(kind).parameters, *inspect.signature(GeneralizedRCNNTransform).parameters}
    known -= {"self", "kwargs", "backbone", "num_classes"}
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=3)
            meant = f"; did you mean {', '.join(close)}?" if close else f"; it has {', '.join(sorted(known))}."
            raise ValueError(f"{kind.__name__} has no option {name}{meant}")


def _told(detector: Any, num_classes: int, backbone: EMOv2Backbone) -> Any:
    """The detector, which knows from now on what to refuse."""
    detector.label_count, detector.image_channels = num_classes, backbone.config.num_channels
    return detector


def check_scene(images: Any, channels: int) -> None:
    """Refuse images that a detector cannot work on.

    Args:
        images: tensors (C, H, W) in [0, 1], as a list or as one (B, C, H, W); C is 1 (greys) or `channels`.
        channels: of the backbone's images.

    Raises:
        ValueError: something does not fit; the message says which image.
    """
    rule = f"({channels}, H, W)"
    if not isinstance(images, list | tuple | torch.Tensor) or (isinstance(images, torch.Tensor) and not images.dim()):
        raise ValueError(f"images is a {type(images).__name__}; pass a list of tensors {rule} in [0, 1].")
    if not len(images):
        raise ValueError(f"images are none; pass a list of at least one tensor {rule} in [0, 1].")
    for number, image in enumerate(images):
        fits = isinstance(image, torch.Tensor) and image.dim() == 3 and image.shape[0] in (1, channels)
        if not fits or not image.numel():
            given = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(f"images[{number}] is {given}; pass a tensor {rule}, or (1, H, W) of greys.")
        if not image.is_floating_point():
            raise ValueError(f"images[{number}] is {image.dtype}; pass numbers in [0, 1] (image / 255).")


def check_targets(targets: Any, images: Any, num_classes: int, masks: bool) -> None:
    """Refuse what a detector cannot learn from.

    Args:
        targets: one dictionary an image: boxes (N, 4), labels (N,) from 0 to `num_classes` - 1, and masks (N, H, W) if
            `masks`; N may be 0.
        images: see `check_scene`, which they passed.
        num_classes: classes, the background included.
        masks: whether masks are learned.

    Raises:
        ValueError: something does not fit; the message says which image's.
    """
    if not isinstance(targets, list | tuple) or len(targets) != len(images):
        given = f"{len(targets)} for {len(images)} images" if isinstance(targets, list | tuple) else "missing"
        raise ValueError(f"targets are {given}; in training pass one dictionary an image, else call eval().")
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        _check_target(f"targets[{number}]", target, image, num_classes, masks)


def _check_target(name: str, target: Any, image: torch.Tensor, num_classes: int, masks: bool) -> None:
    wanted = ["boxes", "labels", *(["masks"] if masks else [])]
    absent = [part for part in wanted if not isinstance(target, dict) or not isinstance(target.get(part), torch.Tensor)]
    if absent:
        raise ValueError(f"{name} has no tensor {' and '.join(absent)}; pass {', '.join(wanted)}.")
    boxes, labels = target["boxes"], target["labels"]
    shapes = {"boxes": (len(boxes), 4), "labels": (len(boxes),), "masks": (len(boxes), *image.shape[1:])}
    for part in wanted:
        if tuple(target[part].shape) != shapes[part]:
            raise ValueError(f"{name}: {part} have the shape {tuple(target[part].shape)}, not {shapes[part]}.")
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: labels are {labels.dtype}; pass labels.long().")
    # On a GPU a look at the values would wait for it.
    if labels.device.type == "cpu" and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"{name}: labels are {labels.tolist()}, the detector's classes 0 to {num_classes - 1}.")


def open_backbone(name: str, stages: Sequence[str]) -> EMOv2Backbone:
    """A backbone that returns these stages: fresh by a size's name, trained by a folder or Hub id.

    Raises:
        ValueError: it is none of these.
    """
    if not isinstance(name, str | os.PathLike) or not str(name):
        raise ValueError(
            f"backbone={name!r} is no name of a backbone; pass one of {', '.join(CLASSIFIERS)}, or a folder."
        )
    if name in CLASSIFIERS and not Path(name).is_dir():
        return EMOv2Backbone(EMOv2Config.of(str(name), out_features=list(stages)))
    try:
        config = AutoConfig.from_pretrained(name)
        if not isinstance(config, EMOv2Config):
            raise ValueError(f"it holds a model of the type {config.model_type!r}")
        return EMOv2Backbone.from_pretrained(name, out_features=list(stages))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"backbone={str(name)!r} does not load as an EMOv2 ({first_line(error)}); pass a folder or Hub id of a "
            f"trained classifier, or for fresh weights one of {', '.join(CLASSIFIERS)}."
        ) from error


def normalization(name: str, backbone: EMOv2Backbone) -> dict[str, list[float]]:
    """The mean and deviation of its pixels that a backbone was trained with: its folder's, else ImageNet's."""
    channels = backbone.config.num_channels
    mean, deviation = list(IMAGENET_MEAN), list(IMAGENET_STD)
    if name not in CLASSIFIERS or Path(name).is_dir():
        with contextlib.suppress(OSError, ValueError):  # saved without an image processor
            processor: Any = AutoImageProcessor.from_pretrained(name)
            mean, deviation = list(processor.image_mean), list(processor.image_std)
    if len(mean) != channels:  # of the colours
        mean, deviation = [sum(mean) / len(mean)] * channels, [sum(deviation) / len(deviation)] * channels
    return {"image_mean": mean, "image_std": deviation}


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
