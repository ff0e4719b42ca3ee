"""What becomes of a training picture and its mask: random scale, crop, mirror image and colours, alike for both.

Source: the authors' configurations (github:zhangzjn/EMOv2 at 582a96f), run in mmsegmentation 1.2.2. Mirror images,
colours and normalisation are torchvision's; its saturation blends with grey where mmsegmentation's scales that of HSV.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import torch

from d_emo.images.decode import MAX_SIDE, UnreadableImageError
from d_emo.images.mask_files import IGNORED
from d_emo.images.pixels import LabelledPicture
from d_emo.train.data.seeding import seeded
from d_emo.train.segmentation.config import SegmentationAugmentationOptions

try:
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional as F
except ImportError as error:
    raise ImportError("training segmenters needs torchvision; pip install 'd-emo[train]'.") from error

# How often a crop that one class fills is drawn again.
REDRAWN = 10
# Published: additive, of values 0 to 255; factors; shares of the circle of hues (18 of 180).
BRIGHTNESS, FACTORS, HUE = 32 / 255, (0.5, 1.5), 0.1
PROBABILITY = 0.5


class PhotometricDistortion(v2.Transform):
    """Brightness, contrast, saturation and hue of floats in [0, 1], each with a probability of a half.

    Contrast comes first or last, at random; values are cut off at 0 and 1 after every step.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw: what is None is left as it is."""

        def drawn(low: float, high: float) -> float | None:
            on, value = torch.rand(()).item() < PROBABILITY, torch.empty(()).uniform_(low, high).item()
            return value if on else None

        return {
            "brightness": drawn(-BRIGHTNESS, BRIGHTNESS),
            "contrast": drawn(*FACTORS),
            "contrast_first": torch.rand(()).item() < PROBABILITY,
            "saturation": drawn(*FACTORS),
            "hue": drawn(-HUE, HUE),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Change a picture; masks stay as they are."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        image = inpt.as_subclass(torch.Tensor)
        if params["brightness"] is not None:
            image = (image + params["brightness"]).clamp(0, 1)
        contrast, first = params["contrast"], params["contrast_first"]
        if contrast is not None and first:
            image = (image * contrast).clamp(0, 1)
        if params["saturation"] is not None:
            image = F.adjust_saturation(image, params["saturation"])
        if params["hue"] is not None:
            image = F.adjust_hue(image, params["hue"])
        if contrast is not None and not first:
            image = (image * contrast).clamp(0, 1)
        return tv_tensors.wrap(image, like=inpt)


@dataclass(frozen=True)
class SegmentationAugmentation:
    """A picture with labels to what is learned from: (3, S, S) float32, normalised, and (S, S) uint8.

    Args:
        options: scale, crop, mirror image, colours.
        side: S.
        mean, std: of the normalisation, of values in [0, 1].
        seed: of every draw.
    """

    options: SegmentationAugmentationOptions
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    transform: Any = field(init=False, repr=False)

    def __post_init__(self):
        steps = [
            v2.RandomHorizontalFlip(0.5 if self.options.random_flip else 0.0),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            *([PhotometricDistortion()] if self.options.photometric else []),
            v2.Normalize(self.mean, self.std),
        ]
        object.__setattr__(self, "transform", v2.Compose(steps))

    def __call__(self, picture: LabelledPicture, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        with seeded(self.seed, "augmentation", position):
            image, labels = self.scaled_crop(picture)
            pixels, mask = self.transform(
                tv_tensors.Image(torch.from_numpy(np.array(image)).permute(2, 0, 1)),
                tv_tensors.Mask(torch.from_numpy(np.array(labels))),
            )
            # Zeros are the mean colour, and what lies there is not learned.
            short = [0, 0, self.side - labels.width, self.side - labels.height]  # left, top, right, bottom
            pixels, mask = F.pad(pixels, short, fill=0), F.pad(mask, short, fill=IGNORED)
        return pixels.as_subclass(torch.Tensor).contiguous(), mask.as_subclass(torch.Tensor).contiguous()

    def scaled_crop(self, picture: LabelledPicture) -> tuple[PIL.Image.Image, PIL.Image.Image]:
        """A random part of the randomly scaled picture, at most S x S, and its labels.

        Only the part is resized, not the picture. A part that one class fills is drawn again.
        """
        image, labels = picture.image, PIL.Image.fromarray(picture.labels.astype(np.uint8))
        width, height = self.scaled_size(picture)
        for _ in range(1 + REDRAWN):
            box = self.drawn_box(width, height)
            part = _resized_part(labels, box, (width, height), PIL.Image.Resampling.NEAREST)
            if not _filled_by_one(np.asarray(part), self.options.crop_max_share):
                break
        return _resized_part(image, box, (width, height), PIL.Image.Resampling.BILINEAR), part

    def scaled_size(self, picture: LabelledPicture) -> tuple[int, int]:
        """Width and height of the whole picture, scaled at random.

        Raises:
            UnreadableImageError: a side would be beyond what pictures may have.
        """
        options = self.options
        factor = torch.empty(()).uniform_(options.scale_min, options.scale_max).item()
        width, height = picture.image.size
        if options.short_side is not None and options.longest is not None:
            factor *= min(options.short_side / min(width, height), options.longest / max(width, height))
        scaled = max(1, round(width * factor)), max(1, round(height * factor))
        if max(scaled) > MAX_SIDE:
            raise UnreadableImageError(
                f"{picture.name}: {width} x {height} pixels would become {scaled[0]} x {scaled[1]}; make it smaller, "
                "or choose --short-side or --scale-max."
            )
        return scaled

    def drawn_box(self, width: int, height: int) -> tuple[int, int, int, int]:
        """A random part of a picture of that size: left, top, right, bottom."""
        left, top = (int(torch.randint(max(0, side - self.side) + 1, ()).item()) for side in (width, height))
        return left, top, min(width, left + self.side), min(height, top + self.side)


def _resized_part(
    image: PIL.Image.Image, box: tuple[int, int, int, int], size: tuple[int, int], resample: PIL.Image.Resampling
) -> PIL.Image.Image:
    """What lies in a box of the picture resized to `size`."""
    left, top, right, bottom = box
    if size == image.size:
        return image.crop(box)
    across, down = image.width / size[0], image.height / size[1]
    part = (left * across, top * down, min(image.width, right * across), min(image.height, bottom * down))
    return image.resize((right - left, bottom - top), resample, box=part)


def _filled_by_one(labels: np.ndarray, most: float) -> bool:
    """Whether one class fills that share of the labelled pixels or more, or nothing is labelled."""
    if most >= 1:
        return False
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return (counts > 0).sum() < 2 or counts.max() / counts.sum() >= most
