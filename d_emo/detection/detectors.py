"""The detectors of the paper's tables VIII to X: SSDLite, RetinaNet and Mask R-CNN.

Sources: the authors' configurations and logs (github:zhangzjn/EMOv2 at 582a96f) and mmdet 3.3.0, in which the runs were
made. Networks, boxes, losses and test settings are theirs; matching, sampling and the rest are torchvision's.
Differences that are left: an anchor of Mask R-CNN's proposals that is an object's best match learns an object however
little they overlap (mmdet: from an IoU of 0.3 on); an anchor of RetinaNet or of proposals that is one object's best
match and overlaps another more learns the other (mmdet: the one); SSDLite keeps 1000 candidates a class before
suppression (mmdet: a map).
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.ssdlite import SSDLiteHead
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from d_emo.classification.backbones import is_trained, normalization, open_backbone
from d_emo.classification.preprocessing import IMAGENET_MEAN, IMAGENET_STD, by_channel
from d_emo.classification.ranges import STAGES
from d_emo.classification.transformers_models import EMOv2Backbone
from d_emo.common.block_ranges import SIDE, WINDOW
from d_emo.common.ranges import Flag, Maybe, OneOf, Table, Whole, checked
from d_emo.detection.backbones import NORM, PYRAMID_CHANNELS, CoarserLevels, PyramidBackbone, SSDLiteBackbone
from d_emo.detection.boxes import PROPOSAL_SCALES, RETINANET_SCALES, LevelAnchors, at_least_float32, ssdlite_boxes
from d_emo.detection.checks import check_options, check_scene, check_targets, in_image_type
from d_emo.detection.heads import (
    BOX_FEATURES,
    MASK_CHANNELS,
    BoxPredictor,
    MaskPredictor,
    ProposalHead,
    ProposalsWithL1,
    RoIAlignOfLevels,
    RoIHeadsWithL1,
)

COCO_CLASSES = 80
# What each system takes of a backbone, and how many of its stages were frozen in the published runs.
FEATURES = {
    "ssdlite": ("stage3", "stage4"),
    "retinanet": ("stage2", "stage3", "stage4"),
    "mask_rcnn": ("stage1", "stage2", "stage3", "stage4"),
}
PUBLISHED_FROZEN = {"ssdlite": 0, "retinanet": 1, "mask_rcnn": 1}
DETECTOR: Table = {
    "num_classes": Whole(1, 100_000, "objects alone, the background is not counted"),
    "image_size": SIDE,
    "boxes": OneOf(("scaled", "published")),
    "window_size": Maybe(WINDOW),
    "frozen_stages": Maybe(Whole(0, STAGES, "0 freezes none")),
    "fixed_statistics": Maybe(Flag()),
}
# torchvision's options that the functions below set themselves.
SSD_OWN = ("size", "min_size", "max_size", "size_divisible", "fixed_size", "anchor_generator", "head")


class _Checking:
    """Refuses images and targets that do not fit, and counts labels from 0 without a background.

    Attributes:
        label_count: classes of objects.
        image_channels: of the backbone's images.
        background: how many labels torchvision's class keeps in front of the objects', for the background: 0 or 1.
    """

    label_count: int
    image_channels: int
    background: int

    def forward(self, images: Any, targets: Any = None) -> Any:
        """Losses by name in training, else what was found in each image.

        Args:
            images: list of (C, H, W) in [0, 1] of any sizes, or one tensor (B, C, H, W); C may be 1, for greys.
            targets: in training, a dictionary for each image: `boxes` (N, 4) as (x1, y1, x2, y2) in pixels, `labels`
                (N,) int64 from 0 to `num_classes` - 1, and for Mask R-CNN `masks` (N, H, W) of 0 and 1. N may be 0.

        Returns:
            In training scalars by name; their sum is the loss. Else a dictionary for each image: `boxes` (n, 4),
            `labels` (n,) from 0 to `num_classes` - 1, `scores` (n,), best first, and for Mask R-CNN `masks`
            (n, 1, H, W), probabilities.

        Raises:
            ValueError: something does not fit; the message says which image and box.
        """
        assert isinstance(self, nn.Module)
        masks = isinstance(self, MaskRCNN)
        check_scene(images, self.image_channels, self.transform)
        if not self.training:
            found = super().forward(list(images))  # type: ignore[misc]
            return [{**one, "labels": one["labels"] - self.background} for one in found]
        check_targets(targets, images, self.label_count, masks)
        taken = [
            {
                "boxes": in_image_type(target["boxes"], image),
                "labels": target["labels"] + self.background,
                **({"masks": target["masks"]} if masks else {}),
            }
            for image, target in zip(images, targets, strict=True)
        ]
        return super().forward(list(images), taken)  # type: ignore[misc]


class _Float32Outputs:
    """Scores and boxes in float32 under autocast too."""

    def forward(self, x: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Maps (B, C, h, w) -> scores (B, boxes, classes) and boxes (B, boxes, 4)."""
        return {name: at_least_float32(values) for name, values in super().forward(x).items()}  # type: ignore[misc]


class _RetinaNetHead(_Float32Outputs, RetinaNetHead):
    def compute_loss(
        self,
        targets: list[dict[str, torch.Tensor]],
        head_outputs: dict[str, torch.Tensor],
        anchors: list[torch.Tensor],
        matched_idxs: list[torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Sums over all images, over the number of anchors on objects (torchvision: each image's mean, averaged)."""
        counts = torch.stack([(matched >= 0).sum().clamp(min=1) for matched in matched_idxs])
        shares = counts / counts.sum()
        losses = dict.fromkeys(("classification", "bbox_regression"), shares.new_zeros(()))
        for number, share in enumerate(shares):
            one = slice(number, number + 1)
            outputs = {name: values[one] for name, values in head_outputs.items()}
            of_image = super().compute_loss(targets[one], outputs, anchors[one], matched_idxs[one])
            losses = {name: total + share * of_image[name] for name, total in losses.items()}
        return losses


class _SSDLiteHead(_Float32Outputs, SSDLiteHead):
    pass


class _RetinaNet(_Checking, RetinaNet):
    background = 0


class _MaskRCNN(_Checking, MaskRCNN):
    background = 1


class _SSD(_Checking, SSD):
    background = 1


@checked(DETECTOR)
def retinanet(
    backbone: str | os.PathLike | EMOv2Backbone,
    num_classes: int = COCO_CLASSES,
    *,
    window_size: int | None = None,
    frozen_stages: int | None = None,
    fixed_statistics: bool | None = None,
    **options: Any,
) -> RetinaNet:
    """RetinaNet (arXiv 1708.02002) on stages 2 to 4: 14.46M parameters with EMOv2-5M and COCO's classes.

    Args:
        backbone: name of `d_emo.list_classifiers()` (fresh weights), or folder or Hub id of a trained classifier; or
            one that is made already, which is taken as it is, and for fresh.
        num_classes: classes of objects; the background is none. Labels are 0 to `num_classes` - 1, in targets and in
            results.
        window_size: of attention, in tokens; None for the published 10 (EMOv1-1M and 2M: 7).
        frozen_stages: the stem and so many stages do not learn, 0 for none of them. None for 1, as published, where the
            backbone is trained; and for 0 where its weights are fresh, which would stay noise.
        fixed_statistics: whether the backbone's BatchNorms keep their running statistics. None for True where the
            backbone is trained, as published, else False.
        **options: torchvision's, such as `min_size=640`. As published: images of 800 x 1333 at most, score above 0.05,
            suppression at an IoU of 0.5, 1000 candidates a level, 100 kept.

    Returns:
        A detector, called as torchvision's: see `forward`.

    Raises:
        ValueError: there is no such backbone or option, or a number is out of range.
    """
    options = check_options("retinanet", RetinaNet, options, ())
    inner = _opened(backbone, FEATURES["retinanet"], window_size)
    body = PyramidBackbone(inner, CoarserLevels(inner.channels[-1], PYRAMID_CHANNELS), 2)
    anchors = options.setdefault("anchor_generator", LevelAnchors(body.strides, RETINANET_SCALES))
    defaults: dict[str, Any] = {"detections_per_img": 100, **_normalization(backbone, inner)}
    if "head" not in options:
        defaults["head"] = _RetinaNetHead(PYRAMID_CHANNELS, anchors.num_anchors_per_location()[0], num_classes)
    _freeze(inner, backbone, frozen_stages, fixed_statistics, PUBLISHED_FROZEN["retinanet"])
    return _told(_RetinaNet(body, num_classes, **defaults | options), num_classes, inner)


@checked(DETECTOR)
def mask_rcnn(
    backbone: str | os.PathLike | EMOv2Backbone,
    num_classes: int = COCO_CLASSES,
    *,
    window_size: int | None = None,
    frozen_stages: int | None = None,
    fixed_statistics: bool | None = None,
    **options: Any,
) -> MaskRCNN:
    """Mask R-CNN (arXiv 1703.06870) on stages 1 to 4: 24.89M parameters with EMOv2-5M and COCO's classes.

    Arguments are those of `retinanet`. As published: images of 800 x 1333 at most, 1000 proposals after suppression at
    0.7, score above 0.05, suppression at 0.5, 100 kept.
    """
    own = ("box_predictor", "mask_predictor", "box_head", "mask_head", "box_roi_pool", "mask_roi_pool", "rpn_head")
    options = check_options("mask_rcnn", MaskRCNN, options, own)
    inner = _opened(backbone, FEATURES["mask_rcnn"], window_size)
    body = PyramidBackbone(inner, LastLevelMaxPool(), 1)
    anchors = options.setdefault("rpn_anchor_generator", LevelAnchors(body.strides, PROPOSAL_SCALES))
    parts: dict[str, Any] = {
        "rpn_head": ProposalHead(PYRAMID_CHANNELS, anchors.num_anchors_per_location()[0]),
        "box_roi_pool": RoIAlignOfLevels(7, body.strides),
        "mask_roi_pool": RoIAlignOfLevels(14, body.strides),
        "box_predictor": BoxPredictor(BOX_FEATURES, num_classes),
        "mask_predictor": MaskPredictor(MASK_CHANNELS, num_classes),
        "rpn_post_nms_top_n_train": 1000,
    }
    model = _MaskRCNN(body, None, **parts | _normalization(backbone, inner) | options)
    # torchvision's constructor makes these itself; only what they do in training differs.
    model.rpn.__class__, model.roi_heads.__class__ = ProposalsWithL1, RoIHeadsWithL1
    _freeze(inner, backbone, frozen_stages, fixed_statistics, PUBLISHED_FROZEN["mask_rcnn"])
    return _told(model, num_classes, inner)


@checked(DETECTOR)
def ssdlite(
    backbone: str | os.PathLike | EMOv2Backbone,
    num_classes: int = COCO_CLASSES,
    image_size: int = 320,
    *,
    boxes: str = "scaled",
    window_size: int | None = None,
    frozen_stages: int | None = None,
    fixed_statistics: bool | None = None,
    **options: Any,
) -> SSD:
    """SSDLite (arXiv 1801.04381) on stages 3 and 4 and four smaller maps.

    6.09M parameters with EMOv2-5M and COCO's classes. It trains on two images or more at once: its smallest map is one
    pixel.

    Args:
        backbone, num_classes, window_size: see `retinanet`.
        image_size: side that images are resized to, in pixels, whatever their ratio. Published are 320 and 512.
        boxes: "scaled" for default boxes that grow with `image_size`; "published" for those of the published run at
            512, which kept the pixels of 320, so that none is larger and the coarsest maps' are off their cells (large
            objects lose there). At 320 both are the same.
        frozen_stages: the stem and so many stages do not learn; None for 0, as published.
        fixed_statistics: see `retinanet`.
        **options: torchvision's. As published: score above 0.02, suppression at 0.45, 1000 candidates, 200 kept.
    """
    options = check_options("ssdlite", SSD, options, SSD_OWN)
    inner = _opened(backbone, FEATURES["ssdlite"], window_size)
    body = SSDLiteBackbone(inner)
    default_boxes = ssdlite_boxes(image_size, body.grid_sides(image_size), boxes == "published")
    head = _SSDLiteHead(body.channels, default_boxes.num_anchors_per_location(), num_classes + 1, NORM)
    defaults = {"score_thresh": 0.02, "nms_thresh": 0.45, "detections_per_img": 200, "topk_candidates": 1000}
    chosen = defaults | _normalization(backbone, inner) | options
    model = _SSD(body, default_boxes, (image_size, image_size), num_classes + 1, head=head, **chosen)
    _freeze(inner, backbone, frozen_stages, fixed_statistics, PUBLISHED_FROZEN["ssdlite"])
    return _told(model, num_classes, inner)


def _opened(backbone: str | os.PathLike | EMOv2Backbone, stages: Sequence[str], window: int | None) -> EMOv2Backbone:
    if not isinstance(backbone, EMOv2Backbone):
        return open_backbone(backbone, stages, "detection", window)
    if list(backbone.out_features) != list(stages):
        raise ValueError(
            f"backbone returns {', '.join(backbone.out_features)}; this detector is on {', '.join(stages)}."
        )
    if window is not None and window != backbone.config.window_size:
        raise ValueError(
            f"window_size={window} is not the {backbone.config.window_size} of this backbone; leave it out."
        )
    return backbone


def _normalization(backbone: str | os.PathLike | EMOv2Backbone, inner: EMOv2Backbone) -> dict[str, list[float]]:
    channels = inner.config.num_channels
    if not isinstance(backbone, EMOv2Backbone):
        return normalization(backbone, channels)
    return {"image_mean": by_channel(IMAGENET_MEAN, channels), "image_std": by_channel(IMAGENET_STD, channels)}


def _freeze(
    inner: EMOv2Backbone,
    backbone: str | os.PathLike | EMOv2Backbone,
    stages: int | None,
    statistics: bool | None,
    published_stages: int,
) -> None:
    """Freeze a backbone as chosen, else as published where its weights are trained."""
    trained = not isinstance(backbone, EMOv2Backbone) and is_trained(backbone)
    stages = stages if stages is not None else published_stages * trained
    if stages > (most := len(inner.config.depths)):
        raise ValueError(f"frozen_stages={stages} is not 0 to {most}, the stages of this backbone.")
    inner.emov2.freeze(stages, trained if statistics is None else statistics)


def _told(detector: Any, num_classes: int, backbone: EMOv2Backbone) -> Any:
    """The detector, which knows from now on what to refuse."""
    for name in ("image_mean", "image_std"):
        if len(values := getattr(detector.transform, name)) != backbone.config.num_channels:
            raise ValueError(
                f"{name}={values} is not of {backbone.config.num_channels} channels, as the backbone's are."
            )
    detector.label_count, detector.image_channels = num_classes, backbone.config.num_channels
    return detector
