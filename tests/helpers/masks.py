"""Pictures with masks, and options of a short run of the segmentation trainer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image

# A real network of 10,000 parameters, everything else as a user would run it.
NETWORK = (
    '{"depths": [1, 1, 2, 1], "widths": [8, 8, 16, 16], "head_dims": [8, 8, 8, 8], "drop_path": 0.2, "window_size": 4, '
    '"head_channels": 8, "auxiliary_channels": 8, "layer_scale": 1.0}'
)
TINY = ["--model-config", NETWORK, "--crop-size", "32", "--global-batch-size", "4", "--log-every", "1",
        "--report-to", "none", "--num-workers", "0", "--lr-warmup-steps", "0"]  # fmt: skip
# Of the classes of `blocks`.
COLORS = np.array([[30, 60, 90], [200, 40, 40], [40, 200, 40]], dtype=np.uint8)


def blocks(seed: int = 0, size: tuple[int, int] = (48, 40), classes: int = 3) -> np.ndarray:
    """Class ids (H, W) uint8: rectangles on class 0, every class among them."""
    generator, (width, height) = np.random.default_rng(seed), size
    labels = np.zeros((height, width), dtype=np.uint8)
    for number in (*range(1, classes), *range(1, classes)):
        left, top = generator.integers(0, width - 16), generator.integers(0, height - 16)
        labels[top : top + generator.integers(8, 16), left : left + generator.integers(8, 16)] = number
    labels[:2, : 2 * classes] = np.repeat(np.arange(classes), 2)
    return labels


def picture_of(labels: np.ndarray) -> PIL.Image.Image:
    """A picture in which every class has its colour."""
    return PIL.Image.fromarray(COLORS[labels % len(COLORS)])


def write_masks(root: Path, names: Sequence[str] = ("a", "b", "c", "d"), size: tuple[int, int] = (48, 40)) -> Path:
    """root/images/NAME.png and root/masks/NAME.png of three classes; returns root."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for seed, name in enumerate(names):
        labels = blocks(seed, size)
        picture_of(labels).save(root / "images" / f"{name}.png")
        PIL.Image.fromarray(labels).save(root / "masks" / f"{name}.png")
    return root
