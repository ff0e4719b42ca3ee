"""Segmenters in the classes of transformers: what all share, and those on EMOv2's stages.

Importing this module registers them, and the first `EMOv2SegmentationConfig` imports it, so that
`AutoModelForSemanticSegmentation`, `AutoImageProcessor` and `pipeline("image-segmentation")` find them after
`import d_emo`.
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForSemanticSegmentation,
    SegformerImageProcessorPil,
)
from transformers import initialization as init
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import IMAGE_PROCESSOR_NAME

from d_emo.classification.image_processors import register_image_processor
from d_emo.classification.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from d_emo.classification.transformers_models import EMOv2Backbone, EMOv2Config, EMOv2PreTrainedModel
from d_emo.segmentation.checks import check_ignored, check_labels, check_normalization
from d_emo.segmentation.heads import (
    AuxiliaryHead,
    Classifier,
    DeepLabv3Head,
    PSPHead,
    SegformerHead,
    SemanticFPNHead,
    feature_pyramid,
)
from d_emo.segmentation.losses import cross_entropy, dice_loss
from d_emo.segmentation.transformers_config import EMOv2SegmentationConfig, SegmenterConfig

# The published evaluation's on ADE20K: the short side, and the long one at most.
ADE20K_SIDES = {"shortest_edge": 512, "longest_edge": 2048}


class Prediction(NamedTuple):
    """What a segmenter makes of images.

    Attributes:
        logits: (B, K, h, w), the head's own output.
        auxiliary: the auxiliary head's, (B, K, h', w'), in training; None where there is none.
        hidden_states: maps (B, C, h, w) that `output_hidden_states=True` returns.
    """

    logits: torch.Tensor
    auxiliary: torch.Tensor | None = None
    hidden_states: Sequence[torch.Tensor] = ()


class SegmentationPreTrainedModel(EMOv2PreTrainedModel):
    """What all segmenters share: checks, loss, output, initialisation, image processor.

    A derived class makes `backbone`, `decode_head` and `auxiliary_head` (None where there is none), ends its `__init__`
    with `post_init()`, and has `predict`.
    """

    config_class: Any = SegmenterConfig
    config: Any
    base_model_prefix = "backbone"
    task_weights = re.compile(r"(decode_head|auxiliary_head)\.classifier\.")
    # `from_pretrained(folder, auxiliary=False)`, for inference.
    _keys_to_ignore_on_load_unexpected = [r"auxiliary_head\..*"]
    # The loss is a mean over the batch: transformers' Trainer divides it by the number of accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: Any):
        super().__init__(config)
        check_ignored(config.num_labels, config.semantic_loss_ignore_index)
        check_normalization(config.image_mean, config.image_std, config.num_channels)

    def predict(self, pixel_values: torch.Tensor) -> Prediction:
        """(B, C, H, W), normalised -> logits, and in training the auxiliary head's. Refuses other images."""
        raise NotImplementedError

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> SemanticSegmenterOutput | tuple:
        """Logits on the head's own grid, and the loss where labels are given.

        Args:
            pixel_values: (B, C, H, W), normalised, of any size.
            labels: (B, H, W) class ids from 0 to `num_labels` - 1, or `config.semantic_loss_ignore_index` (255) where
                nothing is known; finer or coarser ones of the same proportions are taken too.
            output_hidden_states: return the maps that the heads are given, and those before.
            return_dict: False for a plain tuple.

        Returns:
            `logits` (B, num_labels, H / stride, W / stride), and `loss`: cross-entropy with the logits resized to the
            labels, a mean over pixels with a label (0 where no pixel has one), and `dice_weight` times Dice's; in
            training `auxiliary_weight` times the auxiliary head's is added.

        Raises:
            ValueError: images of another shape or type, labels that are no classes of this model, or a batch of one
                image in training where the head averages each whole image.
        """
        predicted = self.predict(pixel_values)
        loss = None
        if labels is not None:
            check_labels(labels, pixel_values, self.config.num_labels, self.config.semantic_loss_ignore_index)
            loss = self._loss(predicted.logits, labels)
            if predicted.auxiliary is not None:
                loss = loss + self.config.auxiliary_weight * self._loss(predicted.auxiliary, labels)
        output = SemanticSegmenterOutput(
            loss=loss,
            logits=predicted.logits,
            hidden_states=tuple(predicted.hidden_states)
            if self.wants(output_hidden_states, "output_hidden_states")
            else None,
        )
        return output if self.wants(return_dict, "return_dict") else output.to_tuple()

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """At the labels' size: cross-entropy, and as much of Dice as the configuration says."""
        config = self.config
        resized = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        # A byte would be compared with -100 as with 156.
        ignored, labels = config.semantic_loss_ignore_index, labels.to(logits.device, torch.int64)
        loss = cross_entropy(resized, labels, ignored, config.loss_over_ignored)
        return loss + config.dice_weight * dice_loss(resized, labels, ignored) if config.dice_weight else loss

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """For weights that no file had: mmsegmentation's; the backbone has its own."""
        if not isinstance(module, nn.Conv2d):
            super()._init_weights(module)
            return
        if isinstance(module, Classifier):
            init.normal_(module.weight, std=0.01)
        elif module.bias is None:  # of a unit
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:  # of the feature pyramid
            init.xavier_uniform_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)

    def make_image_processor(self) -> SegformerImageProcessorPil:
        """The published evaluation's preprocessing: see `make_segmentation_processor`."""
        return make_segmentation_processor(self.config.image_mean, self.config.image_std)

    def processors(self) -> dict[str, Callable[[], Any]]:
        """See `EMOv2PreTrainedModel`."""
        return {IMAGE_PROCESSOR_NAME: self.make_image_processor}


class EMOv2ForSemanticSegmentation(SegmentationPreTrainedModel):
    """EMOv1's or EMOv2's stages under one of four decode heads (tables XI and A4 of arXiv 2412.06674).

    Attributes:
        backbone: the stages.
        neck: "semantic_fpn"'s feature pyramid, None in the others.
        decode_head: gives the logits.
        auxiliary_head: on stage 3, in training; None where there is none.
    """

    config_class = EMOv2SegmentationConfig
    # A head's branches meet in one tensor, on one device.
    _no_split_modules = [
        *EMOv2Backbone._no_split_modules, "DeepLabv3Head", "PSPHead", "SegformerHead", "SemanticFPNHead",
        "AuxiliaryHead", "FeaturePyramidNetwork",
    ]  # fmt: skip

    def __init__(self, config: EMOv2SegmentationConfig):
        super().__init__(config)
        self.backbone = EMOv2Backbone(config.backbone_config)
        widths = list(config.backbone_config.widths)
        classes, dropout = self.config.num_labels, config.dropout
        made: dict[str, Any] = {"num_classes": classes, "channels": config.head_channels, "dropout": dropout}
        self.neck = feature_pyramid(widths, config.pyramid_channels) if config.head == "semantic_fpn" else None
        self.decode_head: nn.Module
        if config.head == "deeplabv3":
            self.decode_head = DeepLabv3Head(widths[-1], **made)
        elif config.head == "pspnet":
            self.decode_head = PSPHead(widths[-1], **made)
        elif config.head == "segformer":
            self.decode_head = SegformerHead(widths, **made)
        else:
            self.decode_head = SemanticFPNHead(config.pyramid_channels, levels=len(widths), **made)
        self.auxiliary_head = (
            AuxiliaryHead(widths[-2], classes, config.auxiliary_channels, dropout) if config.auxiliary else None
        )
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **options: Any) -> Any:
        """transformers' `from_pretrained`, strict; a classifier's folder is for `create_segmenter`.

        Raises:
            ValueError: the folder holds another model, or weights are missing, left over or of other shapes.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **options)
        except ValueError as error:
            if f"model_type {EMOv2Config.model_type!r}" not in str(error):
                raise
            name = pretrained_model_name_or_path
            raise ValueError(f"{name} holds no decode head; put one on it: create_segmenter({str(name)!r}).") from error

    def predict(self, pixel_values: torch.Tensor) -> Prediction:
        """See `SegmentationPreTrainedModel`; hidden states are those of stem and stages, (B, C, H / 2^i, W / 2^i)."""
        maps = self.backbone(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        _, *stages = maps
        auxiliary = self.auxiliary_head(stages[-2]) if self.training and self.auxiliary_head is not None else None
        if self.neck is not None:
            levels = self.neck(OrderedDict((str(number), stage) for number, stage in enumerate(stages)))
            logits = self.decode_head(list(levels.values()))  # (B, K, H / 4, W / 4)
        elif self.config.head == "segformer":
            logits = self.decode_head(stages)  # (B, K, H / 4, W / 4)
        else:
            logits = self.decode_head(stages[-1])  # (B, K, H / 32, W / 32)
        return Prediction(logits, auxiliary, maps)


def make_segmentation_processor(
    image_mean: Sequence[float] = IMAGENET_MEAN,
    image_std: Sequence[float] = IMAGENET_STD,
    size: Mapping[str, int] = ADE20K_SIDES,
) -> SegformerImageProcessorPil:
    """The published evaluation's preprocessing on ADE20K, as transformers' SegFormer has it.

    Short side 512, long side at most 2048, ratio kept. Pictures of different ratios make no batch then: take them one
    by one, or pass `size={"height": 512, "width": 512}`. ADE20K's labels, whose 0 is no class, need
    `do_reduce_labels=True`; `post_process_semantic_segmentation` gives maps of the pictures' sizes.

    Args:
        image_mean, image_std: one number a channel, of values in [0, 1].
        size: "shortest_edge" and "longest_edge", or "height" and "width", in pixels.
    """
    return SegformerImageProcessorPil(
        size=dict(size),
        resample=PILImageResampling.BILINEAR,
        image_mean=list(image_mean),
        image_std=list(image_std),
        do_convert_rgb=True,
    )


def register_segmenter(config: type[SegmenterConfig], model: type[SegmentationPreTrainedModel]) -> None:
    """Make transformers' Auto classes and pipeline find a segmenter; again after a reload, which makes new classes."""
    AutoModelForSemanticSegmentation.register(config, model, exist_ok=True)
    register_image_processor(config, "Segformer")


register_segmenter(EMOv2SegmentationConfig, EMOv2ForSemanticSegmentation)
