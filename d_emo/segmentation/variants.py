"""Names of the published segmenters, and the function that builds one by name.

Source: tables XI and A4 of arXiv 2412.06674, the configurations and logs of its authors (github:zhangzjn/EMOv2 at
582a96f).
"""

import fnmatch
from collections.abc import Callable
from functools import partial
from typing import Any

from d_emo.classification.backbones import dense_config, is_trained, known_name, load_backbone, normalization
from d_emo.classification.transformers_config import EMOv2Config, number_or_names, refuse_unknown
from d_emo.classification.variants import CLASSIFIERS
from d_emo.common.messages import shown
from d_emo.common.ranges import OneOf, checked
from d_emo.segmentation.ranges import HEADS, NUM_CLASSES
from d_emo.segmentation.transformers_config import OF_BACKBONE, EMOv2SegmentationConfig
from d_emo.segmentation.transformers_models import EMOv2ForSemanticSegmentation, SegmentationPreTrainedModel
from d_emo.segmentation.unet_models import UNETS, create_unet

ADE20K_CLASSES = 150
# Channels of SegFormer's head other than 288 (log of EMOv2-1M; for EMOv1-1M inferred).
SEGFORMER_CHANNELS = {"EMOv2-1M": 180, "EMOv1-1M": 180}
# What tells the published sizes apart.
SHAPE = ("version", "depths", "widths")

# Networks that are segmenters as a whole: name -> function of (`num_labels` or `id2label`, overrides).
WHOLE_NETWORKS: dict[str, Callable[[dict[str, Any], dict[str, Any]], SegmentationPreTrainedModel]] = {
    name: partial(create_unet, name) for name in UNETS
}


def list_segmenters(pattern: str = "*") -> list[str]:
    """Names that `create_segmenter` takes, optionally those matching a shell pattern such as `"EMOv2-*"`.

    Names of backbones take each of the heads "deeplabv3", "pspnet", "segformer" and "semantic_fpn".
    """
    if not isinstance(pattern, str):
        raise ValueError(f"pattern={shown(pattern)} is a {type(pattern).__name__}; pass a string such as 'EMOv2-*'.")
    return fnmatch.filter([*CLASSIFIERS, *WHOLE_NETWORKS], pattern)


@checked({"head": OneOf(HEADS)})
def create_segmenter(
    name: str, head: str = "deeplabv3", num_classes: int = ADE20K_CLASSES, **overrides: Any
) -> SegmentationPreTrainedModel:
    """Build a published segmenter: a model of transformers, whose `logits` are on the head's own grid.

    Args:
        name: one of `list_segmenters()`, for fresh weights; or the folder or Hub id of a trained classifier, whose
            weights the stages get (its last norm and its head are dropped).
        head: "deeplabv3" and "pspnet" (on stage 4, stride 32; they learn with an auxiliary head), "segformer" and
            "semantic_fpn" (on all stages, stride 4). Names that are whole networks have one of their own.
        num_classes: the background included; 150 as in ADE20K, whose label 0 is no class.
        **overrides: arguments of `EMOv2SegmentationConfig` (`auxiliary=False`, `head_channels`, `dropout`, `id2label`,
            which says itself how many classes there are) and of its `EMOv2Config` (`window_size`, `drop_path`,
            `num_channels`). Windows are 10 tokens a side unless given (EMOv1-1M and 2M: 7, EMOv1-5M and 20M: 16).
            Whole networks take those of `UEMOv2Config`.

    Raises:
        ValueError: an unknown name, head or override, with the nearest known one; a folder of another model; or a
            value out of range.
    """
    if "num_labels" in overrides:
        raise ValueError("create_segmenter has no num_labels; did you mean num_classes?")
    known = known_name("segmenter", name, list_segmenters())
    classes = number_or_names("create_segmenter", num_classes, overrides.get("id2label"), ADE20K_CLASSES, NUM_CLASSES)
    if known in WHOLE_NETWORKS:
        if head != "deeplabv3":
            raise ValueError(f"head={shown(head)} does not go with {known}, which is a whole network; leave it out.")
        return WHOLE_NETWORKS[known](classes, overrides)
    own = EMOv2SegmentationConfig.arguments() - {"backbone_config"}
    refuse_unknown("create_segmenter", overrides, {*own, *OF_BACKBONE})
    inner = {key: value for key, value in overrides.items() if key in OF_BACKBONE}
    outer = {key: value for key, value in overrides.items() if key not in OF_BACKBONE}

    backbone = dense_config(name, "segmentation", **inner)
    size = _published_size(backbone)
    if size is not None and "drop_path" not in inner:  # as published, whatever the classifier's
        backbone.drop_path = EMOv2Config.of(size).drop_path
    if head == "segformer" and size in SEGFORMER_CHANNELS:
        outer.setdefault("head_channels", SEGFORMER_CHANNELS[size])
    outer = {**normalization(name, backbone.num_channels), **outer, **classes}
    model = EMOv2ForSemanticSegmentation(EMOv2SegmentationConfig(backbone, head, **outer))
    if is_trained(name):
        model.backbone.load_state_dict(load_backbone(name, backbone).state_dict())
    return model


def _published_size(config: EMOv2Config) -> str | None:
    """The size that has this shape, whoever trained it; None if none has."""
    shapes = {size: [getattr(EMOv2Config.of(size), key) for key in SHAPE] for size in CLASSIFIERS}
    return next((size for size, shape in shapes.items() if shape == [getattr(config, key) for key in SHAPE]), None)
