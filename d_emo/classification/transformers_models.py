"""EMOv2 in the classes of transformers: classifier, features, backbone, image processor.

Importing this module registers them, and the first `EMOv2Config` imports it, so that `AutoModelForImageClassification`,
`AutoBackbone`, `AutoImageProcessor` and `pipeline("image-classification")` find them after `import d_emo`. The network
itself is plain PyTorch (`emov2.py`).
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForImageClassification,
    BitImageProcessorPil,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
)
from transformers.utils import IMAGE_PROCESSOR_NAME

from d_emo.classification.checks import check_labels
from d_emo.classification.image_processors import register_image_processor
from d_emo.classification.loading import StrictLoading
from d_emo.classification.preprocessing import CROP_RATIO, IMAGENET_MEAN, IMAGENET_STD
from d_emo.classification.transformers_config import NETWORK_ARGUMENTS, EMOv2Config
from d_emo.common.block_ranges import SIDE
from d_emo.common.ranges import Real, Table, checked

PROCESSOR: Table = {"image_size": SIDE, "crop_ratio": Real(0, 1, positive=True)}


def _resized_fits(values: Mapping[str, Any]) -> str:
    resized = round(values["image_size"] / values["crop_ratio"])
    return f"crop_ratio={values['crop_ratio']} resizes images to {resized} pixels" if resized > SIDE.high else ""


class EMOv2PreTrainedModel(StrictLoading, PreTrainedModel):
    """What our models in transformers share: names, initialisation, and a processor saved beside the weights."""

    config_class: Any = EMOv2Config
    base_model_prefix = "emov2"
    main_input_name = "pixel_values"
    input_modalities: Any = ["image"]
    _no_split_modules = ["EMOBlock", "StemV1", "StemV2"]
    # Each stage checks for itself, in a way that leaves BatchNorm's statistics exact; options of PyTorch's own
    # function (`gradient_checkpointing_kwargs`) change nothing.
    supports_gradient_checkpointing = True

    def wants(self, chosen: bool | None, name: str) -> bool:
        """A choice of `forward`, or the configuration's where there is none."""
        return bool(getattr(self.config, name, False) if chosen is None else chosen)

    def processors(self) -> dict[str, Callable[[], Any]]:
        """What prepares the model's input, by the name of the file that a folder has it in: functions that make it."""
        return {}

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **options: Any) -> None:
        """Save the model; and what prepares its input, unless the folder has it.

        Without it pipelines would not know what to do with a picture or a video. transformers' processors are for
        three channels; models of others are saved without one.

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
        if options.get("is_main_process", args[0] if args else True) and self.config.num_channels == 3:
            for name, make in self.processors().items():
                if not (folder / name).exists():
                    # Before the model, which may be uploaded with all that is in the folder.
                    folder.mkdir(parents=True, exist_ok=True)
                    make().save_pretrained(folder)
        super().save_pretrained(save_directory, *args, **options)

    def classified(
        self,
        network: Any,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None,
        output_hidden_states: bool | None,
        return_dict: bool | None,
    ) -> ImageClassifierOutputWithNoAttention | tuple:
        """What a classifier's `forward` returns, of a network with stages, norm and head."""
        stages = network.forward_stages(pixel_values)
        logits = network.forward_head(network.normed(stages[-1]))  # (B, num_labels)
        loss = None
        if labels is not None:
            check_labels(labels, len(logits), self.config.num_labels or 0, self.config.problem_type)
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = ImageClassifierOutputWithNoAttention(
            loss=loss,
            logits=logits,
            hidden_states=tuple(stages) if self.wants(output_hidden_states, "output_hidden_states") else None,
        )
        return output if self.wants(return_dict, "return_dict") else output.to_tuple()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The network's own initialisation (`emov2.initialize`) for weights that no file had."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            init.kaiming_uniform_(module.weight, a=5**0.5)  # PyTorch's own
            if module.bias is not None:
                bound = (module.weight[0].numel()) ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d | nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            for name, buffer in module.named_buffers(recurse=False):
                (init.ones_ if name == "running_var" else init.zeros_)(buffer)
        elif isinstance(scale := getattr(module, "layer_scale", None), nn.Parameter):
            init.constant_(scale, self.config.layer_scale)


class EMOv2Model(EMOv2PreTrainedModel):
    """EMOv1 or EMOv2 without its classifier: features of images. A classifier's folder loads; its head is left out."""

    _keys_to_ignore_on_load_unexpected = [r"emov2\.head\..*"]

    def __init__(self, config: EMOv2Config):
        super().__init__(config)
        self.emov2 = config.build(0)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple:
        """(B, 3, H, W), normalised -> the last stage's output, normalised, (B, C, H / 32, W / 32), and its mean (B, C).

        Args:
            pixel_values: (B, 3, H, W), normalised.
            output_hidden_states: return the outputs of stem and stages, (B, C, H / 2^i, W / 2^i).
            return_dict: False for a plain tuple.
        """
        stages = self.emov2.forward_stages(pixel_values)
        features = self.emov2.normed(stages[-1])  # (B, C, h, w)
        output = BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=features,
            pooler_output=self.emov2.forward_head(features, pre_logits=True),  # (B, C)
            hidden_states=tuple(stages) if self.wants(output_hidden_states, "output_hidden_states") else None,
        )
        return output if self.wants(return_dict, "return_dict") else output.to_tuple()


class EMOv2ForImageClassification(EMOv2PreTrainedModel):
    """EMOv1 or EMOv2 with its classifier."""

    # The loss is a mean over the batch: transformers' Trainer divides it by the number of accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: EMOv2Config):
        super().__init__(config)
        self.emov2 = config.build(config.num_labels or 0)
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> ImageClassifierOutputWithNoAttention | tuple:
        """Logits, and the loss where labels are given.

        Args:
            pixel_values: (B, 3, H, W), normalised.
            labels: (B,) class ids, or (B, num_labels) for several labels an image; see `config.problem_type`.
            output_hidden_states: return the outputs of stem and stages, (B, C, H / 2^i, W / 2^i).
            return_dict: False for a plain tuple.

        Raises:
            ValueError: images of another shape or type, or labels that are no classes of this model.
        """
        return self.classified(self.emov2, pixel_values, labels, output_hidden_states, return_dict)

    def processors(self) -> dict[str, Callable[[], Any]]:
        """See `EMOv2PreTrainedModel`."""
        return {IMAGE_PROCESSOR_NAME: lambda: make_image_processor(self.config.image_size)}


class EMOv2Backbone(BackboneMixin, EMOv2PreTrainedModel):
    """The stages of EMOv1 or EMOv2 as feature maps, for detection and segmentation heads.

    `EMOv2Backbone.from_pretrained(classifier_folder, out_features=[...])` takes a classifier's weights; its final norm
    and head are left out.
    """

    has_attentions = False
    _keys_to_ignore_on_load_unexpected = [r"emov2\.(norm|head)\..*"]

    def __init__(self, config: EMOv2Config):
        super().__init__(config)
        self.emov2 = config.build(0)
        self.emov2.drop_final_norm()  # feature maps are the stages' own
        self.num_features = [self.emov2.stem_dim, *config.widths]
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **_: Any,
    ) -> BackboneOutput | tuple:
        """(B, 3, H, W) -> the chosen stages' outputs, (B, C, H / 2^i, W / 2^i) with i from 1 (stem) to 5."""
        stages = self.emov2.forward_stages(pixel_values)
        maps: Any = tuple(
            stage for name, stage in zip(self.stage_names, stages, strict=True) if name in self.out_features
        )
        wanted = self.wants(output_hidden_states, "output_hidden_states")
        output = BackboneOutput(feature_maps=maps, hidden_states=tuple(stages) if wanted else None)
        return output if self.wants(return_dict, "return_dict") else output.to_tuple()


@checked(PROCESSOR, _resized_fits)
def make_image_processor(image_size: int = 224, crop_ratio: float = CROP_RATIO) -> BitImageProcessorPil:
    """The published evaluation's preprocessing: bicubic resize, centre crop of 0.875, ImageNet's mean and deviation.

    Args:
        image_size: side of what the model sees.
        crop_ratio: it is this share of the resized image's short side, above 0 and up to 1.

    Raises:
        ValueError: a value out of range.
    """
    return BitImageProcessorPil(
        size={"shortest_edge": round(image_size / crop_ratio)},
        crop_size={"height": image_size, "width": image_size},
        resample=PILImageResampling.BICUBIC,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        do_convert_rgb=True,
    )


# exist_ok: a reload makes new classes.
AutoModel.register(EMOv2Config, EMOv2Model, exist_ok=True)
AutoModelForImageClassification.register(EMOv2Config, EMOv2ForImageClassification, exist_ok=True)
AutoBackbone.register(EMOv2Config, EMOv2Backbone, exist_ok=True)
register_image_processor(EMOv2Config, "Bit")

__all__ = [
    "NETWORK_ARGUMENTS",
    "EMOv2Backbone",
    "EMOv2Config",
    "EMOv2ForImageClassification",
    "EMOv2Model",
    "EMOv2PreTrainedModel",
    "make_image_processor",
]
