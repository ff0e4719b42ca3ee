"""U-EMOv2 and the plain UNet-S5-D16 as segmenters in the classes of transformers, and by name.

Importing this module registers them, and the first `UEMOv2Config` imports it, so that
`AutoModelForSemanticSegmentation`, `AutoImageProcessor` and `pipeline("image-segmentation")` find them after
`import d_emo`. The network itself is plain PyTorch (`unet.py`).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import SegformerImageProcessorPil
from transformers import initialization as init

from d_emo.segmentation.heads import AuxiliaryHead, DeepLabv3Head
from d_emo.segmentation.transformers_models import (
    Prediction,
    SegmentationPreTrainedModel,
    make_segmentation_processor,
    register_segmenter,
)
from d_emo.segmentation.unet import UNet
from d_emo.segmentation.unet_config import UEMOv2Config

# Source: Table XII of arXiv 2412.06674; what differs from U-EMOv2-5M, which is the configuration's default.
UNETS: dict[str, dict[str, Any]] = {"U-EMOv2-5M": {}, "UNet-S5-D16": {"block": "conv"}}


class UEMOv2ForSemanticSegmentation(SegmentationPreTrainedModel):
    """U-EMOv2 or the plain UNet under DeepLabv3's head; logits have the images' size.

    Images have sides that are multiples of 2^(depth - 1), 16 as published; `predict_in_windows` takes any.

    Attributes:
        backbone: encoder and decoder.
        decode_head: on the finest output, gives the logits.
        auxiliary_head: on the second finest, in training; None where there is none.
    """

    config_class = UEMOv2Config
    _no_split_modules = ["Pair", "UpStage", "DeepLabv3Head"]

    def __init__(self, config: UEMOv2Config):
        super().__init__(config)
        self.backbone = UNet(
            config.block,
            config.num_channels,
            config.base_channels,
            config.depth,
            config.expansion,
            config.head_dim,
            config.window_size,
            config.clip_window,
            config.kernel_size,
            config.layer_scale,
        )
        *_, second, finest = self.backbone.channels
        classes, dropout = self.config.num_labels, config.dropout
        self.decode_head = DeepLabv3Head(finest, classes, config.head_channels, dropout=dropout)
        self.auxiliary_head = (
            AuxiliaryHead(second, classes, config.auxiliary_channels, dropout) if config.auxiliary else None
        )
        self.post_init()

    def predict(self, pixel_values: torch.Tensor) -> Prediction:
        """See `SegmentationPreTrainedModel`; hidden states are the decoder's outputs, from coarse to fine."""
        outputs = self.backbone(pixel_values)
        logits = self.decode_head(outputs[-1])  # (B, K, H, W)
        auxiliary = self.auxiliary_head(outputs[-2]) if self.training and self.auxiliary_head is not None else None
        return Prediction(logits, auxiliary, outputs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """For weights that no file had: the published, which are drawn as every segmenter's heads are.

        The blocks' linear layers are 1x1 convolutions in the published code. Queries and keys are one there and values
        another, each of which counts its own outputs.
        """
        if not isinstance(module, nn.Linear):
            super()._init_weights(module)
        elif module.bias is None:
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:  # queries, keys and values, (2C + E, C)
            weight, dim = torch.empty_like(module.weight), module.in_features
            for part in weight.split((2 * dim, module.out_features - 2 * dim)):
                nn.init.kaiming_normal_(part, mode="fan_out", nonlinearity="relu")
            init.copy_(module.weight, weight)
            init.zeros_(module.bias)

    def make_image_processor(self) -> SegformerImageProcessorPil:
        """Resizes pictures to the configuration's side, 256, and normalises them.

        The published run saw crops of 256 at full resolution: for pictures as they are, pass `do_resize=False` and use
        `predict_in_windows`.
        """
        side, mean, deviation = self.config.image_size, self.config.image_mean, self.config.image_std
        return make_segmentation_processor(mean, deviation, {"height": side, "width": side})


def create_unet(name: str, classes: Mapping[str, Any], overrides: Mapping[str, Any]) -> UEMOv2ForSemanticSegmentation:
    """A network of `UNETS` with fresh weights.

    Args:
        name: of `UNETS`.
        classes: `num_labels` or `id2label`.
        overrides: arguments of `UEMOv2Config`.

    Raises:
        ValueError: an unknown override, or a value out of range.
    """
    UEMOv2Config.refuse_unknown(overrides)
    return UEMOv2ForSemanticSegmentation(UEMOv2Config(**{**UNETS[name], **overrides, **classes}))


register_segmenter(UEMOv2Config, UEMOv2ForSemanticSegmentation)
