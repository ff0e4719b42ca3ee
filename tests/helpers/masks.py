"""Pictures with masks, and options of a short run of the segmentation trainer."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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


CATEGORIES = [{"id": 7, "name": "sky", "isthing": 0}, {"id": 3, "name": "dog", "isthing": 1}]
# Numbers of the segments of blocks 0 and 1, with their categories.
SEGMENTS = {70_000: 7, 513: 3}


def write_panoptic(root: Path, change: Callable[[dict[str, Any]], Any] = lambda content: None) -> Path:
    """COCO's panoptic file of a picture whose block 2 has no segment, and both pictures; returns the file."""
    labels = blocks()
    numbers = np.select([labels == 0, labels == 1], [70_000, 513], 0)
    colors = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=-1).astype(np.uint8)
    for folder in ("images", "panoptic"):
        (root / folder).mkdir(parents=True)
    picture_of(labels).save(root / "images" / "one.jpg")
    PIL.Image.fromarray(colors).save(root / "panoptic" / "one.png")
    segments = [{"id": number, "category_id": category, "iscrowd": 0} for number, category in SEGMENTS.items()]
    content = {
        "images": [{"id": 5, "file_name": "one.jpg", "width": 48, "height": 40}],
        "annotations": [{"image_id": 5, "file_name": "one.png", "segments_info": segments}],
        "categories": [{**entry} for entry in CATEGORIES],
    }
    change(content)
    (root / "panoptic.json").write_text(json.dumps(content))
    return root / "panoptic.json"
