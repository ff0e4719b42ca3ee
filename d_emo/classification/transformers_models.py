"""EMOv2 in the classes of transformers: configuration, classifier, backbone, image processor.

Importing `d_emo` registers them, so that `AutoModelForImageClassification`, `AutoBackbone`, `AutoImageProcessor` and
`pipeline("image-classification")` find them. The network itself is plain PyTorch (`emov2.py`).
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BitImageProcessor,
    BitImageProcessorPil,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutputWithNoAttention

from d_emo.classification.emov2 import EMOBlock, EMOv2
from d_emo.classification.variants import classifier_config

# The published evaluation: resize so that the crop is this share of the short side, bicubic.
CROP_RATIO = 0.875
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# What a configuration says of the network; arguments of `EMOv2`.
NETWORK_ARGUMENTS = (
    "version", "depths", "widths", "expansions", "head_dims", "kernel_sizes", "stem_dim", "window_size", "clip_window",
    "attention_type", "attending_stages", "local", "dilation", "arrangement", "norms", "activations", "layer_scale",
    "drop_path", "output_stride",
)  # fmt: skip


class EMOv2Config(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of an EMOv1 or EMOv2 network; `EMOv2Config.of("EMOv2-5M")` gives the published sizes.

    Args:
        image_size: side of the images that it is for, in pixels.
        num_channels: of the images.
        out_features, out_indices: stages that `EMOv2Backbone` returns, of "stem", "stage1" to "stage4".
        **more: transformers' own, `num_labels` and `id2label` among them.

    The others are those of `EMOv2`.
    """

    model_type = "emov2"

    def __init__(
        self,
        version: int = 2,
        depths: Any = (3, 3, 9, 3),
        widths: Any = (48, 72, 160, 288),
        expansions: Any = (2.0, 3.0, 4.0, 4.0),
        head_dims: Any = (16, 24, 32, 32),
        kernel_sizes: Any = (5, 5, 5, 5),
        num_channels: int = 3,
        stem_dim: int | None = None,
        window_size: int = 7,
        clip_window: bool = False,
        attention_type: str = "spanning",
        attending_stages: Any = (3, 4),
        local: str = "conv",
        dilation: int = 1,
        arrangement: str = "cascaded",
        norms: Any = ("batch", "batch", "layer", "layer"),
        activations: Any = ("silu", "silu", "gelu", "gelu"),
        layer_scale: float | None = 1e-6,
        drop_path: float = 0.05,
        output_stride: int = 32,
        image_size: int = 224,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **more: Any,
    ):
        super().__init__(**more)
        self.version = version
        self.depths = list(depths)
        self.widths = list(widths)
        self.expansions = list(expansions)
        self.head_dims = list(head_dims)
        self.kernel_sizes = list(kernel_sizes)
        self.num_channels = num_channels
        self.stem_dim = stem_dim
        self.window_size = window_size
        self.clip_window = clip_window
        self.attention_type = attention_type
        self.attending_stages = list(attending_stages)
        self.local = local
        self.dilation = dilation
        self.arrangement = arrangement
        self.norms = list(norms)
        self.activations = list(activations)
        self.layer_scale = layer_scale
        self.drop_path = drop_path
        self.output_stride = output_stride
        self.image_size = image_size
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, len(self.depths) + 1))]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @classmethod
    def of(cls, name: str, image_size: int = 224, **overrides: Any) -> "EMOv2Config":
        """The configuration of a published size.

        Args:
            name: one of `d_emo.list_classifiers()`.
            image_size: side of the images, which decides the window.
            **overrides: any argument of the configuration.

        Raises:
            ValueError: the name is unknown.
        """
        return cls(**{**classifier_config(name, image_size), "image_size": image_size, **overrides})

    def build(self, num_classes: int) -> EMOv2:
        """The network, with fresh weights."""
        return EMOv2(
            **{name: getattr(self, name) for name in NETWORK_ARGUMENTS},
            num_classes=num_classes,
            in_channels=self.num_channels,
        )


class EMOv2PreTrainedModel(PreTrainedModel):
    """What both models share: names and initialisation."""

    config_class = EMOv2Config
    base_model_prefix = "emov2"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["EMOBlock", "StemV1", "StemV2"]
    supports_gradient_checkpointing = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The network's own initialisation (`emov2.initialize`) for weights that no file had."""
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=5**0.5)  # PyTorch's own
            if module.bias is not None:
                bound = (module.weight[0].numel()) ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
            for name, buffer in module.named_buffers(recurse=False):
                (init.ones_ if name == "running_var" else init.zeros_)(buffer)
        elif isinstance(module, EMOBlock) and module.layer_scale is not None:
            init.constant_(module.layer_scale, self.config.layer_scale)


class EMOv2ForImageClassification(EMOv2PreTrainedModel):
    """EMOv1 or EMOv2 with its classifier."""

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
        """
        stages = self.emov2.forward_stages(pixel_values)
        normed = self.emov2.norm(stages[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, C, h, w)
        logits = self.emov2.forward_head(normed)  # (B, num_labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        output = ImageClassifierOutputWithNoAttention(
            loss=loss, logits=logits, hidden_states=tuple(stages) if wanted else None
        )
        return output if return_dict is not False else output.to_tuple()


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
        output = BackboneOutput(feature_maps=maps, hidden_states=tuple(stages) if output_hidden_states else None)
        return output if return_dict is not False else output.to_tuple()


def make_image_processor(image_size: int = 224, crop_ratio: float = CROP_RATIO) -> BitImageProcessorPil:
    """The published evaluation's preprocessing: bicubic resize, centre crop of 0.875, ImageNet's mean and deviation.

    Args:
        image_size: side of what the model sees.
        crop_ratio: it is this share of the resized image's short side.
    """
    return BitImageProcessorPil(
        size={"shortest_edge": round(image_size / crop_ratio)},
        crop_size={"height": image_size, "width": image_size},
        resample=PILImageResampling.BICUBIC,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        do_convert_rgb=True,
    )


def register_with_transformers() -> None:
    """Make transformers' Auto classes know these. Safe to call again."""
    AutoConfig.register(EMOv2Config.model_type, EMOv2Config, exist_ok=True)
    AutoModelForImageClassification.register(EMOv2Config, EMOv2ForImageClassification, exist_ok=True)
    AutoBackbone.register(EMOv2Config, EMOv2Backbone, exist_ok=True)
    AutoImageProcessor.register(
        EMOv2Config, slow_image_processor_class=BitImageProcessorPil, fast_image_processor_class=BitImageProcessor,
        exist_ok=True,
    )  # fmt: skip
