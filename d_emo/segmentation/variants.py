"""Names of the published segmenters, and the function that builds one by name.

Source: tables XI and A4 of arXiv 2412.06674, the configurations and logs of its authors (github:zhangzjn/EMOv2 at
582a96f).
"""

import difflib
import fnmatch
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from d_emo.classification.backbones import dense_window, normalization
from d_emo.classification.transformers_config import NETWORK_ARGUMENTS, EMOv2Config, number_or_names
from d_emo.classification.transformers_models import EMOv2Backbone
from d_emo.classification.variants import CLASSIFIERS
from d_emo.common.messages import first_line, nearest, shown
from d_emo.segmentation.ranges import HEADS, SEGMENTER
from d_emo.segmentation.transformers_config import (
    EMOv2SegmentationConfig,
    SegmenterConfig,
    arguments_of,
    check_overrides,
)
from d_emo.segmentation.transformers_models import EMOv2ForSemanticSegmentation, SegmentationPreTrainedModel
from d_emo.segmentation.unet_models import UNETS, create_unet

ADE20K_CLASSES = 150
# Channels of SegFormer's head other than 288 (log of EMOv2-1M; for EMOv1-1M inferred).
SEGFORMER_CHANNELS = {"EMOv2-1M": 180, "EMOv1-1M": 180}
# What may differ from a trained classifier's configuration: no weight depends on it.
FREE = ("window_size", "clip_window", "drop_path", "output_stride", "image_size")
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
    known = _known(name)
    classes = number_or_names(
        "create_segmenter", num_classes, overrides.get("id2label"), ADE20K_CLASSES, SEGMENTER["num_classes"]
    )
    if known in WHOLE_NETWORKS:
        if head != "deeplabv3":
            raise ValueError(f"head={shown(head)} does not go with {known}, which is a whole network; leave it out.")
        return WHOLE_NETWORKS[known](classes, overrides)
    _check_head(head)
    of_backbone = {*NETWORK_ARGUMENTS, "num_channels", "image_size"}
    own = arguments_of(EMOv2SegmentationConfig, SegmenterConfig) - {"backbone_config"}
    check_overrides("create_segmenter", overrides, {*own, *of_backbone})
    inner = {key: value for key, value in overrides.items() if key in of_backbone}
    outer = {key: value for key, value in overrides.items() if key not in of_backbone}
    outer.update(classes)

    trained: EMOv2Backbone | None = None
    size: str | None = known
    if known:
        backbone = EMOv2Config.of(known, **{**_published(EMOv2Config.of(known)), **inner})
    else:
        backbone, trained, size = _trained(name, inner)
        outer = {**normalization(name, backbone.num_channels), **outer}
    if head == "segformer" and size in SEGFORMER_CHANNELS:
        outer.setdefault("head_channels", SEGFORMER_CHANNELS[size])
    model = EMOv2ForSemanticSegmentation(EMOv2SegmentationConfig(backbone, head, **outer))
    if trained is not None:
        model.backbone.load_state_dict(trained.state_dict())
    return model


def _known(name: Any) -> str:
    """A published name as it is; empty for a folder and for what may be a Hub id.

    Raises:
        ValueError: it is none of these.
    """
    names = list_segmenters()
    if isinstance(name, str | os.PathLike) and str(name) and "\0" not in str(name):
        if Path(name).is_dir():
            return ""
        if str(name) in names:
            return str(name)
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
            return ""
    hint = nearest(name, names, f"pass a classifier's folder, or one of {', '.join(names)}.")
    raise ValueError(f"segmenter {shown(name)} is unknown; {hint}")


def _check_head(head: Any) -> None:
    if isinstance(head, str) and head in HEADS:
        return
    spelled = {known.replace("_", ""): known for known in HEADS}
    plain = str(head).lower().replace("_", "").replace("-", "")
    close = [spelled[near] for near in difflib.get_close_matches(plain, spelled, n=2, cutoff=0.5)]
    close += [known for near, known in spelled.items() if len(plain) > 2 and plain in near and known not in close]
    hint = f"did you mean {', '.join(close)}?" if close else f"choose from {', '.join(HEADS)}."
    raise ValueError(f"head={shown(head)} is unknown; {hint}")


def _trained(name: Any, overrides: dict[str, Any]) -> tuple[EMOv2Config, EMOv2Backbone, str | None]:
    """A trained classifier's configuration for segmentation, its stages, and which published size it is, if one.

    Raises:
        ValueError: there is no such folder, it holds something else, or the weights do not fit the overrides.
    """
    try:
        stored = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"segmenter {shown(str(name))} does not load ({first_line(error)}); pass the folder or Hub id of a trained "
            f"classifier, or one of {', '.join(list_segmenters())}."
        ) from error
    if not isinstance(stored, EMOv2Config):
        of_ours = isinstance(stored, SegmenterConfig)
        remedy = "open it with AutoModelForSemanticSegmentation.from_pretrained" if of_ours else "pass a classifier's"
        raise ValueError(f"segmenter {shown(str(name))} holds a model of the type {stored.model_type!r}; {remedy}.")
    said = {key: getattr(stored, key) for key in (*NETWORK_ARGUMENTS, "num_channels", "image_size")}
    for key, value in overrides.items():
        if key not in FREE and (list(value) if isinstance(value, tuple) else value) != said[key]:
            raise ValueError(
                f"{key}={shown(value)} does not fit the weights of {name}, which has {shown(said[key])}; leave it out."
            )
    size = next((size for size in CLASSIFIERS if _shape(EMOv2Config.of(size)) == _shape(stored)), None)
    published = _published(stored)
    if size is not None:
        published["drop_path"] = CLASSIFIERS[size].get("drop_path", EMOv2Config().drop_path)
    config = EMOv2Config(**{**said, **published, **overrides})
    return config, EMOv2Backbone.from_pretrained(name, config=config), size


def _published(config: EMOv2Config) -> dict[str, Any]:
    """Windows as published, in grids padded up to them."""
    return {"window_size": dense_window(config, "segmentation"), "clip_window": False}


def _shape(config: EMOv2Config) -> list[Any]:
    return [getattr(config, key) for key in SHAPE]
