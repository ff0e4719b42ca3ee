"""A network that knows the real digits by heart: what it draws is judged without training one."""

import torch
from diffusers import ConfigMixin, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.cache_utils import CacheMixin

from d_emo import DEMOPipeline
from d_emo.eval.digits_report import real_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class DigitPainter(ModelMixin, ConfigMixin, CacheMixin):
    """The best possible flow to the digits of a class: its posterior mean is a weighted mean of them."""

    sample_shape = (8, 8)
    null_label = 10

    @register_to_config
    def __init__(self, in_channels: int = 1, num_classes: int = 10, patch_size: int = 4, learn_sigma: bool = False,
                 prediction_type: str = "flow_prediction"):  # fmt: skip
        super().__init__()
        pixels, labels = real_digits(8)
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.pixels, self.labels = torch.from_numpy(pixels), torch.from_numpy(labels)

    def forward(self, x, timestep, class_labels, return_dict):
        time = (timestep / 1000).clamp(min=1e-3)[:, None]  # 1 is noise
        flat = x.flatten(1)
        gaps = flat[:, None] - (1 - time[..., None]) * self.pixels[None]
        weights = -(gaps**2).sum(2) / (2 * time**2)
        other = (class_labels[:, None] != self.labels[None]) & (class_labels[:, None] != self.null_label)
        mean = weights.masked_fill(other, -torch.inf).softmax(1) @ self.pixels
        return (((flat - mean) / time).view_as(x),)


def digit_painter() -> DEMOPipeline:
    """A pipeline that draws real digits, by name."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    return DEMOPipeline(DigitPainter(), scheduler, id2label=list(NAMES), default_num_inference_steps=12)
