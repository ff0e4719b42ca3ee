"""Segmenters' configurations in transformers, which `d_emo.registration` enters in `AutoConfig`.

It imports no network, no model class and no Auto class: transformers may be in the middle of importing itself.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from transformers import PreTrainedConfig

from d_emo.classification.preprocessing import IMAGENET_MEAN, IMAGENET_STD, by_channel
from d_emo.classification.ranges import DENSE_WINDOW
from d_emo.classification.transformers_config import NETWORK_ARGUMENTS, EMOv2Config, NamedClasses
from d_emo.common.messages import shown
from d_emo.common.ranges import checked
from d_emo.segmentation.ranges import HEAD_CHANNELS, IGNORED, ON_BACKBONE, SEGMENTER, WITH_AUXILIARY

# What a segmenter has from its backbone.
OF_BACKBONE = (*NETWORK_ARGUMENTS, "num_channels", "image_size")


class SegmenterConfig(NamedClasses, PreTrainedConfig):
    """What the configurations of all segmenters share. Each sets `num_channels` before.

    Args:
        dropout: probability of dropping a channel before the classifiers, in training.
        auxiliary_weight: of the auxiliary head's loss.
        semantic_loss_ignore_index: label that the loss leaves out.
        loss_over_ignored: divide the loss by all pixels, as mmsegmentation 1.2.2 does by default, instead of by those
            with a label.
        dice_weight: how much of Dice's loss is added to the cross-entropy (see `losses.dice_loss`); 0 as in the paper's
            runs. For classes of few pixels, such as vessels: mmsegmentation's runs on these add 3.
        image_mean, image_std: one number a channel, in [0, 1], which images are normalised with; None for ImageNet's,
            averaged where there are other channels than three.
        **more: transformers' own, `num_labels` and `id2label` among them; the latter may be a list of names, and
            `label2id` follows from it. At least 2 classes; the background is one of them.

    Raises:
        ValueError: a value out of range, or names of classes that are no list.
    """

    num_channels: int
    class_rules = {"num_labels": SEGMENTER["num_labels"]}

    @checked(SEGMENTER)
    def __init__(
        self,
        dropout: float = 0.1,
        auxiliary_weight: float = 0.4,
        semantic_loss_ignore_index: int = IGNORED,
        loss_over_ignored: bool = False,
        dice_weight: float = 0.0,
        image_mean: Any = None,
        image_std: Any = None,
        **more: Any,
    ):
        # The Auto classes find a model by its configuration, so that the models are registered before there is one.
        # Not before: this module is imported in the middle of transformers' own import.
        import_module("d_emo.segmentation.transformers_models")
        super().__init__(**self.named(more))
        self.dropout = dropout
        self.auxiliary_weight = auxiliary_weight
        self.semantic_loss_ignore_index = semantic_loss_ignore_index
        self.loss_over_ignored = loss_over_ignored
        self.dice_weight = dice_weight
        self.image_mean = list(image_mean or by_channel(IMAGENET_MEAN, self.num_channels))
        self.image_std = list(image_std or by_channel(IMAGENET_STD, self.num_channels))


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
        self.num_channels = self.backbone_config.num_channels
        self.head = head
        self.head_channels = head_channels or HEAD_CHANNELS[head]
        self.auxiliary = head in WITH_AUXILIARY if auxiliary is None else auxiliary
        if self.auxiliary and len(self.backbone_config.widths) < 2:
            raise ValueError("auxiliary=True needs a backbone of two stages or more; pass auxiliary=False.")
        self.auxiliary_channels = auxiliary_channels
        self.pyramid_channels = pyramid_channels
        super().__init__(**more)

    def __setattr__(self, name: str, value: Any) -> None:
        # Here they would change nothing.
        if name in OF_BACKBONE and value != (there := getattr(self.backbone_config, name)):
            raise ValueError(
                f"{name}={shown(value)} is for the backbone, which has {shown(there)}; pass it in backbone_config, or "
                "to create_segmenter."
            )
        super().__setattr__(name, value)


def _backbone(config: Any) -> EMOv2Config:
    if config is None:
        return EMOv2Config(window_size=DENSE_WINDOW)
    if isinstance(config, EMOv2Config):
        return config
    if not isinstance(config, Mapping) or config.get("model_type", EMOv2Config.model_type) != EMOv2Config.model_type:
        raise ValueError(f"backbone_config is {shown(config)}; pass an EMOv2Config, or what one is saved as.")
    return EMOv2Config.from_dict(dict(config))
