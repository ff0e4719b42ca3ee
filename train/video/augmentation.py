"""Training clips: which frames of a video, and what becomes of them, drawn as a function of (seed, position).

Source: the published training log of V-EMOv2 (github:zhangzjn/EMOv2 at 582a96f, resources/Vid). Its RandAugment is
another library's; the operations here are torchvision's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from d_emo.train.data import stream
from d_emo.train.data.seeding import seeded
from d_emo.train.video.config import ClipAugmentationOptions
from d_emo.video.folders import VideoFile
from d_emo.video.reading import drawn

# Levels of RandAugment's magnitudes: from 0 to 10.
MAGNITUDES = 11
# The published short side of the frames that are augmented, over the side of the crop: 192 over 160.
SHORT_SIDE = 1.2


@dataclass(frozen=True)
class ClipAugmentation:
    """What becomes of a training video: a clip (T, 3, side, side), normalised.

    Args:
        options: crop and policy.
        frames: T; one random frame of each of as many equal parts.
        side: of the result, in pixels.
        flip: mirror at random.
        mean, std: of the normalisation.
        seed: of every draw.
    """

    options: ClipAugmentationOptions
    frames: int
    side: int
    flip: bool
    mean: Sequence[float]
    std: Sequence[float]
    seed: int
    transform: Any = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "transform", v2.Compose(self._steps()))

    def __call__(self, video: VideoFile, position: int) -> torch.Tensor:
        shares = stream.generator(self.seed, "frames", position).random(self.frames)
        clip = video.frames(self.frames, lambda count: drawn(count, self.frames, shares.tolist()))  # (T, 3, H, W)
        with seeded(self.seed, "augmentation", position):
            clip = self.transform(tv_tensors.Video(clip)).as_subclass(torch.Tensor)  # (T, 3, side, side), uint8
        if self.flip and stream.flips(self.seed, position):
            clip = clip.flip(-1)
        return v2.functional.normalize(clip.float() / 255, list(self.mean), list(self.std))

    def _steps(self) -> list[Any]:
        options = self.options
        resized = options.crop == "resized"
        short = (options.short_side or round(SHORT_SIDE * self.side)) if resized else self.side
        fill = [round(255 * value) for value in self.mean]
        operation = v2.RandAugment(1, options.rand_augment_magnitude, MAGNITUDES, fill=fill)
        return [
            v2.Resize(short, antialias=True),
            *[v2.RandomApply([operation], options.rand_augment_probability) for _ in range(options.rand_augment)],
            v2.RandomResizedCrop(self.side, scale=(options.crop_scale_min, 1.0), antialias=True)
            if resized
            else v2.CenterCrop(self.side),
        ]
