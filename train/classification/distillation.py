"""A trained teacher whose answers a classifier learns beside the labels (soft distillation, arXiv 1503.02531)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoModelForImageClassification

from d_emo.common.messages import first_line
from d_emo.common.saved_folders import LOADING_ERRORS
from d_emo.train.classification.config import DistillationOptions

TIMM = "timm:"


class Teacher:
    """A frozen classifier; every process has its own.

    Args:
        options: names it, tau, weight.
        num_classes: K, which must be its own.
        mean, std: how the student's images are normalised.

    Raises:
        ValueError: it does not load, or has other classes.
    """

    def __init__(self, options: DistillationOptions, num_classes: int, mean: Sequence[float], std: Sequence[float]):
        assert options.teacher is not None
        self.options = options
        try:
            self.network, own_mean, own_std = _open(options.teacher)
        except LOADING_ERRORS as error:
            raise ValueError(f"--teacher {options.teacher} does not load ({first_line(error)}).") from error
        self.network = self.network.eval().requires_grad_(False)
        # From the student's normalisation to the teacher's: x * std + mean is the image in [0, 1].
        ratio = torch.tensor(std) / torch.tensor(own_std)
        self.scale = ratio.view(1, 3, 1, 1)
        self.shift = ((torch.tensor(mean) - torch.tensor(own_mean)) / torch.tensor(own_std)).view(1, 3, 1, 1)
        with torch.no_grad():
            side = options.teacher_resolution or 224
            classes = self._answer(torch.zeros(1, 3, side, side)).shape[-1]
        if classes != num_classes:
            raise ValueError(
                f"--teacher {options.teacher} has {classes} classes, the data {num_classes}; choose another teacher."
            )

    def to(self, device: torch.device) -> "Teacher":
        """Move it."""
        self.network.to(device)
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)
        return self

    @torch.no_grad()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """The student's images (B, 3, H, W) -> logits (B, K)."""
        images = images * self.scale + self.shift
        if self.options.teacher_resolution:
            side = self.options.teacher_resolution
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False)
        return self._answer(images)

    def loss(self, student: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """weight * tau^2 * mean KL(teacher, student), both softened by tau.

        Args:
            student: logits (B, K).
            images: what they were computed from.
        """
        tau = self.options.teacher_tau
        wanted = F.log_softmax(self.logits(images).float() / tau, dim=-1)  # (B, K)
        given = F.log_softmax(student.float() / tau, dim=-1)  # (B, K)
        divergence = F.kl_div(given, wanted, reduction="batchmean", log_target=True)
        return self.options.teacher_weight * tau**2 * divergence

    def _answer(self, images: torch.Tensor) -> torch.Tensor:
        output = self.network(images)
        return output if isinstance(output, torch.Tensor) else output.logits


def _open(name: str) -> tuple[Any, Sequence[float], Sequence[float]]:
    """The network, and the mean and deviation of its images in [0, 1]."""
    if name.startswith(TIMM):
        import timm

        network: Any = timm.create_model(name.removeprefix(TIMM), pretrained=True)
        data = timm.data.resolve_model_data_config(network)
        return network, data["mean"], data["std"]
    network = AutoModelForImageClassification.from_pretrained(name)
    processor: Any = AutoImageProcessor.from_pretrained(name)
    if hasattr(processor, "data_config"):  # transformers' wrapper of timm
        return network, processor.data_config["mean"], processor.data_config["std"]
    if not processor.do_normalize:
        return network, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    if processor.do_rescale and abs(processor.rescale_factor * 255 - 1) > 1e-6:
        raise ValueError(f"it rescales pixels by {processor.rescale_factor}, not 1/255; choose another teacher")
    return network, processor.image_mean, processor.image_std
