"""Segmenters in the classes of transformers: what all share, and those on EMOv2's stages.

Importing this module registers them, and the first `EMOv2SegmentationConfig` imports it, so that
`AutoModelForSemanticSegmentation`, `AutoImageProcessor` and `pipeline("image-segmentation")` find them after
`import d_emo`.
"""

import os
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    SegformerImageProcessor,
    SegformerImageProcessorPil,
)
from transformers import initialization as init
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import SemanticSegmenterOutput
from transformers.utils import IMAGE_PROCESSOR_NAME

from d_emo.classification.checks import check_pixels
from d_emo.classification.loading import StrictLoading
from d_emo.classification.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from d_emo.classification.transformers_models import EMOv2Backbone, EMOv2Config
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
from d_emo.segmentation.transformers_config import EMOv2SegmentationConfig, SegmenterConfig

# The published evaluation's: the short side, and the long one at most.
SHORT_SIDE, LONG_SIDE = 512, 2048


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


class SegmentationPreTrainedModel(StrictLoading, PreTrainedModel):
    """What all segmenters share: checks, loss, output, initialisation, saving.

    A derived class makes `decode_head` and `auxiliary_head` (None where there is none), ends its `__init__` with
    `post_init()`, and has `predict` and `first_layer`.
    """

    config_class: Any = SegmenterConfig
    config: Any
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
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
        """(B, C, H, W), normalised and checked -> logits, and in training the auxiliary head's."""
        raise NotImplementedError

    def first_layer(self) -> nn.Module:
        """The convolution that takes the images."""
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
            labels, a mean over pixels with a label (0 where no pixel has one); in training `auxiliary_weight` times
            the auxiliary head's is added.

        Raises:
            ValueError: images of another shape or type, labels that are no classes of this model, or a batch of one
                image in training where the head averages each whole image.
        """
        check_pixels(pixel_values, self.first_layer())
        classes, ignored = self.config.num_labels, self.config.semantic_loss_ignore_index
        if labels is not None:
            check_labels(labels, pixel_values, classes, ignored)
        predicted = self.predict(pixel_values)
        loss = None
        if labels is not None:
            loss = self._loss(predicted.logits, labels)
            if predicted.auxiliary is not None:
                loss = loss + self.config.auxiliary_weight * self._loss(predicted.auxiliary, labels)
        output = SemanticSegmenterOutput(
            loss=loss,
            logits=predicted.logits,
            hidden_states=tuple(predicted.hidden_states)
            if self._wants(output_hidden_states, "output_hidden_states")
            else None,
        )
        return output if self._wants(return_dict, "return_dict") else output.to_tuple()

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy at the labels' size; a mean over those with a label, or over all pixels."""
        resized = F.interpolate(logits.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        # Wide before it is compared: an 8-bit 156 "equals" -100.
        ignored, labels = self.config.semantic_loss_ignore_index, labels.to(logits.device).long()
        total = F.cross_entropy(resized, labels, ignore_index=ignored, reduction="sum")
        if self.config.loss_over_ignored:
            return total / labels.numel()
        return total / (labels != ignored).sum().clamp(min=1)

    def _wants(self, chosen: bool | None, name: str) -> bool:
        return bool(getattr(self.config, name, False) if chosen is None else chosen)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """For weights that no file had: mmsegmentation's, and torchvision's in the feature pyramid."""
        if isinstance(module, Classifier):
            init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.Conv2d) and module.bias is None:
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=1)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            for name, buffer in module.named_buffers(recurse=False):
                (init.ones_ if name == "running_var" else init.zeros_)(buffer)

    def make_image_processor(self) -> SegformerImageProcessorPil:
        """The published evaluation's preprocessing: see `make_segmentation_processor`."""
        return make_segmentation_processor(self.config.image_mean, self.config.image_std)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **options: Any) -> None:
        """Save the model; and an image processor for its images, unless the folder has one.

        Without it `pipeline("image-segmentation", folder)` would not know how to prepare a picture. It is for images
        of three channels; models of others are saved without one.

        Args:
            save_directory: folder.
            *args, **options: see transformers.

        Raises:
            ValueError: it is no path, or a file.
        """
        if not isinstance(save_directory, str | os.PathLike) or not str(save_directory):
            raise ValueError(f"save_directory={save_directory!r} is no path of a folder.")
        folder = Path(save_directory)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"save_directory={str(folder)!r} is a file; pass a folder.")
        writes = options.get("is_main_process", args[0] if args else True)
        if writes and self.config.num_channels == 3 and not (folder / IMAGE_PROCESSOR_NAME).exists():
            # Before the model, which may be uploaded with all that is in the folder.
            folder.mkdir(parents=True, exist_ok=True)
            self.make_image_processor().save_pretrained(folder)
        super().save_pretrained(save_directory, *args, **options)


class EMOv2ForSemanticSegmentation(SegmentationPreTrainedModel):
    """EMOv1's or EMOv2's stages under one of four decode heads (tables XI and A4 of arXiv 2412.06674).

    Attributes:
        backbone: the stages.
        neck: "semantic_fpn"'s feature pyramid, None in the others.
        decode_head: gives the logits.
        auxiliary_head: on stage 3, in training; None where there is none.
    """

    config_class = EMOv2SegmentationConfig
    base_model_prefix = "backbone"
    # A head's branches meet in one tensor, on one device.
    _no_split_modules = [
        *EMOv2Backbone._no_split_modules, "DeepLabv3Head", "PSPHead", "SegformerHead", "SemanticFPNHead",
        "AuxiliaryHead", "FeaturePyramidNetwork",
    ]  # fmt: skip

    def __init__(self, config: EMOv2SegmentationConfig):
        super().__init__(config)
        self.backbone = EMOv2Backbone(config.backbone_config)
        widths = list(config.backbone_config.widths)
        classes, dropout = int(config.num_labels or 0), config.dropout
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

    def first_layer(self) -> nn.Module:
        """See `SegmentationPreTrainedModel`."""
        return self.backbone.emov2.stem.conv

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
    image_mean: Sequence[float] = IMAGENET_MEAN, image_std: Sequence[float] = IMAGENET_STD
) -> SegformerImageProcessorPil:
    """The published evaluation's preprocessing on ADE20K, as transformers' SegFormer has it.

    Short side 512, long side at most 2048, ratio kept. Pictures of different ratios
    make no batch then: take them one by one, or pass `size={"height": 512, "width": 512}`. ADE20K's labels, whose 0 is
    no class, need `do_reduce_labels=True`; `post_process_semantic_segmentation` gives maps of the pictures' sizes.

    Args:
        image_mean, image_std: one number a channel, of values in [0, 1].
    """
    return SegformerImageProcessorPil(
        size={"shortest_edge": SHORT_SIDE, "longest_edge": LONG_SIDE},
        resample=PILImageResampling.BILINEAR,
        image_mean=list(image_mean),
        image_std=list(image_std),
        do_convert_rgb=True,
    )


# exist_ok: a reload makes new classes.
AutoModelForSemanticSegmentation.register(EMOv2SegmentationConfig, EMOv2ForSemanticSegmentation, exist_ok=True)
AutoImageProcessor.register(
    EMOv2SegmentationConfig, slow_image_processor_class=SegformerImageProcessorPil,
    fast_image_processor_class=SegformerImageProcessor, exist_ok=True,
)  # fmt: skip
