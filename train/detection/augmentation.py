"""Augmentation of pictures with their objects by torchvision.transforms.v2, drawn as a function of (seed, position).

As published for SSDLite (the authors' configuration, mmdet 3.3.0): zoom out, IoU crop, resize without the ratio, flip,
distortion of colours; for RetinaNet and Mask R-CNN the flip alone, as the detector itself resizes. Differences of
torchvision's: brightness is multiplied by 0.875 to 1.125, where mmdet adds up to 32 of 255; aspects of IoU crops are
0.5 to 2 of the picture's own, as are mmdet's of pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from d_emo.images.coco import Scene
from d_emo.train.data.batches import Batch, Sample
from d_emo.train.data.seeding import seeded
from d_emo.train.detection.config import DetectionAugmentationOptions

# mmdet's additive 32 of 255 as a factor of mid-grey, its contrast and saturation, and its hue of 18 of 360 degrees.
BRIGHTNESS, CONTRAST, SATURATION, HUE = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5), (-0.05, 0.05)
ZOOM_OUT = 4.0
# Objects that are cut down to less than a pixel are no objects.
LEAST_SIDE = 1.0


@dataclass(frozen=True)
class Augmentation:
    """A scene at a position of the stream -> picture (3, H, W) uint8, and its objects as a detector learns them.

    Crowds are left out: nobody says how many objects they are.

    Args:
        options: what is done.
        side: of the result in pixels, where pictures are squeezed into a square (SSDLite); None: the detector resizes.
        mean: what the canvas of zooming out is filled with, per channel in [0, 1].
        masks: whether masks are learned.
        seed: of every draw.
    """

    options: DetectionAugmentationOptions
    side: int | None
    mean: Sequence[float]
    masks: bool
    seed: int
    transform: Any = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "transform", v2.Compose(self._steps()))

    @property
    def zoom(self) -> float:
        """--zoom-out, resolved."""
        return self.options.zoom_out or (ZOOM_OUT if self.side else 1.0)

    def describe(self) -> str:
        """What is on, for people."""
        square = self.side is not None
        named = {
            f"zoom out to {self.zoom:g}": self.zoom > 1,
            "IoU crop": _or(self.options.iou_crop, square),
            "flip": self.options.random_flip,
            "photometric": _or(self.options.photometric, square),
        }
        return ", ".join(name for name, on in named.items() if on) or "none"

    def __call__(self, scene: Scene, position: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        learned = ~scene.crowd
        pixels = torch.from_numpy(np.array(scene.image)).permute(2, 0, 1)  # (3, H, W) uint8
        target: dict[str, Any] = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(scene.boxes[learned]), format="XYXY", canvas_size=tuple(pixels.shape[1:])
            ),
            "labels": torch.from_numpy(scene.labels[learned]),
        }
        if self.masks:
            assert scene.masks is not None
            target["masks"] = tv_tensors.Mask(torch.from_numpy(scene.masks[learned]))
        with seeded(self.seed, "augmentation", position):
            pixels, target = self.transform(tv_tensors.Image(pixels), target)
        plain = {name: values.as_subclass(torch.Tensor).contiguous() for name, values in target.items()}
        if self.masks:
            plain = _with_pixels(plain)
        return pixels.as_subclass(torch.Tensor).contiguous(), plain

    def _steps(self) -> list[Any]:
        square, steps = self.side is not None, []
        if self.zoom > 1:
            fill = {tv_tensors.Image: [round(255 * value) for value in self.mean], "others": 0}
            steps.append(v2.RandomZoomOut(fill=fill, side_range=(1.0, self.zoom), p=0.5))
        if _or(self.options.iou_crop, square):
            steps.append(v2.RandomIoUCrop())
        if square:  # as the detector itself resizes, so that training and validation see the same pixels
            steps.append(v2.Resize((self.side, self.side), antialias=False))
        if self.options.random_flip:
            steps.append(v2.RandomHorizontalFlip(0.5))
        if _or(self.options.photometric, square):
            steps.append(v2.RandomPhotometricDistort(BRIGHTNESS, CONTRAST, SATURATION, HUE))
        steps.append(v2.ClampBoundingBoxes())
        steps.append(v2.SanitizeBoundingBoxes(min_size=LEAST_SIDE, labels_getter=_labels))
        return steps


def joined(samples: Sequence[Sample]) -> Batch:
    """A batch of pictures of any sizes: lists of (3, H, W) uint8 and of targets."""
    images, targets, positions, bad_images = zip(*samples, strict=True)
    return Batch(
        images=list(images),
        labels=list(targets),
        positions=list(positions),
        bad_images=[message for messages in bad_images for message in messages],
    )


def _or(chosen: bool | None, published: bool) -> bool:
    return published if chosen is None else chosen


def _labels(sample: Any) -> torch.Tensor:
    return sample[1]["labels"]


def _with_pixels(target: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without objects of whose mask no pixel is left."""
    kept = target["masks"].flatten(1).any(dim=1)
    return {name: values[kept] for name, values in target.items()}
