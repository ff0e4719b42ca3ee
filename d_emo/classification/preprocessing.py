"""How pictures become the input of the published classifiers."""

from collections.abc import Sequence

# The published evaluation: resize so that the crop is this share of the short side, bicubic.
CROP_RATIO = 0.875
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def by_channel(values: Sequence[float], channels: int) -> list[float]:
    """One number a channel; where there are others than the colours, each has their average."""
    return list(values) if len(values) == channels else [sum(values) / len(values)] * channels
