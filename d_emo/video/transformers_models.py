"""V-EMOv2 in the classes of transformers: classifier and video processor.

Importing this module registers them, and the first `VEMOv2Config` imports it, so that
`AutoModelForVideoClassification`, `AutoVideoProcessor`, `AutoImageProcessor` and `pipeline("video-classification")`
find them after `import d_emo`. The network itself is plain PyTorch (`v_emov2.py`).
"""

import re
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    AutoModelForVideoClassification,
    VideoMAEImageProcessorPil,
)
from transformers.image_utils import PILImageResampling
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention
from transformers.utils import IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME, is_torchvision_available

from d_emo.classification.image_processors import register_image_processor
from d_emo.classification.transformers_models import EMOv2PreTrainedModel
from d_emo.video.transformers_config import VEMOv2Config


class VEMOv2ForVideoClassification(EMOv2PreTrainedModel):
    """V-EMOv2 with its classifier; the plain network is `v_emov2`."""

    config_class = VEMOv2Config
    base_model_prefix = "v_emov2"
    input_modalities = "video"
    task_weights = re.compile(r"v_emov2\.head\.")
    _no_split_modules = ["VideoBlock", "VideoStem"]
    # The loss is a mean over the batch: transformers' Trainer divides it by the number of accumulated batches.
    accepts_loss_kwargs = False

    def __init__(self, config: VEMOv2Config):
        super().__init__(config)
        self.v_emov2 = config.build(config.num_labels or 0)
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
            pixel_values: (B, T, C, H, W), normalised; any number of frames from 1 on, any size.
            labels: (B,) class ids, or (B, num_labels) for several labels a clip; see `config.problem_type`.
            output_hidden_states: return the outputs of stem and stages, (B, O, T', H / 2^i, W / 2^i).
            return_dict: False for a plain tuple.

        Raises:
            ValueError: clips of another shape or type, or labels that are no classes of this model.
        """
        return self.classified(self.v_emov2, pixel_values, labels, output_hidden_states, return_dict)

    def processors(self) -> dict[str, Callable[[], Any]]:
        """See `EMOv2PreTrainedModel`; both need torchvision."""
        if not is_torchvision_available():
            return {}
        from d_emo.video.processing import make_video_processor

        side = self.config.image_size
        return {
            VIDEO_PROCESSOR_NAME: lambda: make_video_processor(side, self.config.num_frames),
            IMAGE_PROCESSOR_NAME: lambda: make_frame_processor(side),
        }


def make_frame_processor(image_size: int) -> VideoMAEImageProcessorPil:
    """`make_video_processor` for frames that somebody has chosen, which is what AutoImageProcessor finds."""
    from d_emo.video.processing import DEVIATION, MEAN, sizes

    return VideoMAEImageProcessorPil(
        resample=PILImageResampling.BILINEAR, image_mean=[MEAN] * 3, image_std=[DEVIATION] * 3, **sizes(image_size)
    )


# exist_ok: a reload makes new classes.
AutoModelForVideoClassification.register(VEMOv2Config, VEMOv2ForVideoClassification, exist_ok=True)
register_image_processor(VEMOv2Config, "VideoMAE")
if is_torchvision_available():
    from d_emo.video import processing as processing  # registers itself

__all__ = ["VEMOv2Config", "VEMOv2ForVideoClassification"]
