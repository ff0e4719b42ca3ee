"""Augmentation for classifiers: timm's transforms and mixup, drawn as a function of (seed, position)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
import torch.nn.functional as F

from d_emo.common.messages import first_line
from d_emo.train.classification.config import AugmentationOptions
from d_emo.train.data.seeding import seeded

try:
    from timm.data import Mixup, create_transform
    from torchvision import transforms
except ImportError as error:
    raise ImportError("training classifiers needs timm's augmentation; pip install 'd-emo[train]'.") from error


@dataclass(frozen=True)
class Augmentation:
    """What becomes of a training image: (3, side, side), normalised.

    Args:
        options: crop, policy, erasing.
        side: of the result, in pixels.
        flip: mirror at random.
        mean, std: of the normalisation.
        seed: of every draw.
    """

    options: AugmentationOptions
    side: int
    flip: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    transform: Any = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "transform", self._make())

    def __call__(self, image: PIL.Image.Image, position: int) -> torch.Tensor:
        with seeded(self.seed, "augmentation", position):
            return self.transform(image.convert("RGB"))

    def _make(self) -> Any:
        options, flip = self.options, 0.5 if self.flip else 0.0
        try:
            crop, policy, final = create_transform(
                self.side,
                is_training=True,
                scale=(options.crop_scale_min, 1.0),
                hflip=flip,
                color_jitter=options.color_jitter,
                auto_augment=options.policy,
                interpolation=options.crop_interpolation,
                mean=self.mean,
                std=self.std,
                re_prob=options.random_erasing,
                re_mode="pixel",
                separate=True,
            )
        except (AssertionError, KeyError, ValueError, AttributeError) as error:
            raise ValueError(
                f"--auto-augment {options.auto_augment}: timm does not know it ({first_line(error)}); name one such as "
                "rand-m9-mstd0.5-inc1."
            ) from error
        if options.crop != "resized":
            steps = [
                transforms.Resize(self.side, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(self.side)
                if options.crop == "center"
                else transforms.RandomCrop(self.side, padding=self.side // 8, padding_mode="reflect"),
            ]
            crop = transforms.Compose([*steps, transforms.RandomHorizontalFlip(flip)])
        return transforms.Compose([crop, policy, final])


class Targets:
    """Class ids to the distributions that are learned: smoothed, and mixed together with the images.

    Args:
        options: mixup, CutMix and smoothing.
        num_classes: K.
        seed: of every draw.
    """

    def __init__(self, options: AugmentationOptions, num_classes: int, seed: int):
        self.smoothing = options.label_smoothing
        self.num_classes = num_classes
        self.seed = seed
        self.mixup = None
        if options.mixup or options.cutmix:
            self.mixup = Mixup(
                options.mixup, options.cutmix, label_smoothing=options.label_smoothing, num_classes=num_classes
            )

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, positions: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, H, W) and ids (B,) -> images, mixed with each other, and targets (B, K).

        Images are mixed in pairs, for which B must be even.
        """
        if self.mixup is not None:
            with seeded(self.seed, "mixup", positions[0]):
                return self.mixup(images, labels)
        targets = F.one_hot(labels, self.num_classes).float()  # (B, K)
        return images, targets * (1 - self.smoothing) + self.smoothing / self.num_classes
