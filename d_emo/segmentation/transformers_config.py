"""Segmenters' configurations in transformers, which `d_emo.registration` enters in `AutoConfig`.

It imports no network, no model class and no Auto class: transformers may be in the middle of importing itself.
"""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig

from d_emo.classification.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from d_emo.classification.transformers_config import RENAMED, EMOv2Config, names_by_number, numbers_by_name
from d_emo.common.messages import shown
from d_emo.common.ranges import Table, checked, take
from d_emo.segmentation.ranges import HEAD_CHANNELS, IGNORED, ON_BACKBONE, SEGMENTER, WITH_AUXILIARY

LABELS: Table = {"num_labels": SEGMENTER["num_labels"]}
# Published windows: 10 tokens a side, whatever the image, grids padded up.
WINDOW_SIZE = 10


class SegmenterConfig(PreTrainedConfig):
    """What the configurations of all segmenters share. Each has `num_channels` too.

    Args:
        dropout: probability of dropping a channel before the classifiers, in training.
        auxiliary_weight: of the auxiliary head's loss.
        semantic_loss_ignore_index: label that the loss leaves out.
        loss_over_ignored: divide the loss by all pixels, as mmsegmentation 1.2.2 does by default, instead of by those
            with a label.
        image_mean, image_std: one number a channel, in [0, 1], which images are normalised with; None for ImageNet's.
        **more: transformers' own, `num_labels` and `id2label` among them; the latter may be a list of names, and
            `label2id` follows from it. At least 2 classes; the background is one of them.

    Raises:
        ValueError: a value out of range, or names of classes that are no list.
    """

    @checked(SEGMENTER)
    def __init__(
        self,
        dropout: float = 0.1,
        auxiliary_weight: float = 0.4,
        semantic_loss_ignore_index: int = IGNORED,
        loss_over_ignored: bool = False,
        image_mean: Any = None,
        image_std: Any = None,
        **more: Any,
    ):
        # The Auto classes find a model by its configuration, so that the models are registered before there is one.
        # Not before: this module is imported in the middle of transformers' own import.
        import_module("d_emo.segmentation.transformers_models")
        if more.get("id2label") is not None:
            more["id2label"] = names_by_number(more["id2label"])
            more["label2id"] = more.get("label2id") or numbers_by_name(more["id2label"])
        super().__init__(**more)
        self.dropout = dropout
        self.auxiliary_weight = auxiliary_weight
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        self.loss_over_ignored = loss_over_ignored
        self.image_mean = list(image_mean or IMAGENET_MEAN)
        self.image_std = list(image_std or IMAGENET_STD)

    def __setattr__(self, name: str, value: Any) -> None:
        # `from_pretrained(folder, id2label=...)` sets them on a configuration that is there.
        value = take(type(self).__name__, {name: value}, LABELS)[name]
        if name == "id2label" and value is not None:
            value = names_by_number(value)
            take(type(self).__name__, {"num_labels": len(value)}, LABELS)
            super().__setattr__("label2id", numbers_by_name(value))
        super().__setattr__(name, value)


class EMOv2SegmentationConfig(SegmenterConfig):
    """Configuration of a segmenter on EMOv1 or EMOv2; `create_segmenter` builds the published ones.

    Args:
        backbone_config: an `EMOv2Config` or what it is saved as; None for EMOv2-5M with windows of 10.
        head: "deeplabv3", "pspnet", "segformer" or "semantic_fpn".
        head_channels: of the head; None for the published (256, 256, 288, 128; SegFormer's on 1M is 180, which
            `create_segmenter` knows).
        auxiliary: learn with a second head on stage 3; None for the published: with "deeplabv3" and "pspnet".
        auxiliary_channels: of that head.
        pyramid_channels: of "semantic_fpn"'s feature pyramid.
        **more: see `SegmenterConfig`.

    Raises:
        ValueError: a value out of range, or names of classes that are no list.
    """

    model_type = "emov2_segmentation"
    sub_configs = {"backbone_config": EMOv2Config}

    @checked(ON_BACKBONE)
    def __init__(
        self,
        backbone_config: Any = None,
        head: str = "deeplabv3",
        head_channels: int | None = None,
        auxiliary: bool | None = None,
        auxiliary_channels: int = 256,
        pyramid_channels: int = 256,
        **more: Any,
    ):
        self.backbone_config = _backbone(backbone_config)
        self.head = head
        self.head_channels = head_channels or HEAD_CHANNELS[head]
        self.auxiliary = head in WITH_AUXILIARY if auxiliary is None else auxiliary
        if self.auxiliary and len(self.backbone_config.widths) < 2:
            raise ValueError("auxiliary=True needs a backbone of two stages or more; pass auxiliary=False.")
        self.auxiliary_channels = auxiliary_channels
        self.pyramid_channels = pyramid_channels
        super().__init__(**more)

    @property
    def num_channels(self) -> int:
        """Channels of the images, as the backbone's."""
        return self.backbone_config.num_channels


def _backbone(config: Any) -> EMOv2Config:
    if config is None:
        return EMOv2Config(window_size=WINDOW_SIZE)
    if isinstance(config, EMOv2Config):
        return config
    if not isinstance(config, Mapping) or config.get("model_type", EMOv2Config.model_type) != EMOv2Config.model_type:
        raise ValueError(f"backbone_config is {shown(config)}; pass an EMOv2Config, or what one is saved as.")
    return EMOv2Config.from_dict(dict(config))


def arguments_of(*configurations: type[PreTrainedConfig]) -> set[str]:
    """Names of the arguments that configurations of these classes take, transformers' own left out."""
    return {name for kind in configurations for name in inspect.signature(kind).parameters} - {"more"}


def check_overrides(owner: str, overrides: Iterable[str], known: Iterable[str]) -> None:
    """Refuse arguments that a network does not have.

    Args:
        owner: what the message begins with.
        overrides: names of arguments.
        known: names that it has; what every configuration of transformers says is known too.

    Raises:
        ValueError: an unknown name, with the nearest known one.
    """
    names, shared = sorted(known), PreTrainedConfig()
    for override in overrides:
        if override in names or (override != "num_labels" and not callable(getattr(shared, override, print))):
            continue
        renamed = {**RENAMED, "num_labels": "num_classes"}.get(override)
        near = [renamed] if renamed else difflib.get_close_matches(override, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}."
        raise ValueError(f"{owner} has no {override}; {hint}")
