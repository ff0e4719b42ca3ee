"""The boxes that detectors start from, where the published runs have them (mmdet 3.3.0's formulas).

Boxes are (x1, y1, x2, y2) in pixels. They are float32 at least: in bfloat16 the columns of a wide image would be 8
pixels apart.
"""

from collections.abc import Sequence

import torch
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator

# RetinaNet: 4 strides wide, and two sizes between a level and the next; Mask R-CNN's proposals: 8 strides wide.
RETINANET_SCALES = (4.0, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))
PROPOSAL_SCALES = (8.0,)
HEIGHT_TO_WIDTH = (0.5, 1.0, 2.0)

# SSDLite at 320 pixels (the authors' configuration): sizes of the boxes by map, the last one beyond them, and the
# distance of their centres; also those of the published run at 512 pixels.
PUBLISHED_SIDE = 320
PUBLISHED_SIZES = (48, 100, 150, 202, 253, 304, 320)
PUBLISHED_STEPS = (16, 32, 64, 107, 160, 320)
SSDLITE_ASPECTS = (2, 3)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, in float32 where it has fewer bits (autocast)."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class LevelAnchors(AnchorGenerator):
    """Anchors of exact sizes, at the pyramid's own strides.

    torchvision's own are rounded to whole pixels, and their distance is the image's side over the grid's: 114 pixels
    instead of 128 on the coarsest level of an image of 800.

    Args:
        strides: of the levels, in pixels.
        scales: sides of square anchors, in strides.
    """

    def __init__(self, strides: Sequence[int], scales: Sequence[float]):
        sizes = tuple(tuple(stride * scale for scale in scales) for stride in strides)
        super().__init__(sizes, (HEIGHT_TO_WIDTH,) * len(sizes))
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008  # whatever the default device
    ) -> torch.Tensor:
        """Around (0, 0), of areas `scales` squared and heights of `aspect_ratios` widths, (R * S, 4)."""
        side = torch.tensor(scales, dtype=torch.float64, device=device)
        root = torch.tensor(aspect_ratios, dtype=torch.float64, device=device).sqrt()[:, None]  # (R, 1)
        width, height = (side / root).flatten(), (side * root).flatten()  # (R * S,)
        return (torch.stack([-width, -height, width, height], dim=1) / 2).to(dtype)

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move them to a device; they stay float32 where the features are less."""
        super().set_cell_anchors(torch.promote_types(dtype, torch.float32), device)

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        """Anchors of each level, (h * w * A, 4); torchvision's `strides`, worked out of the sizes, are not used."""
        return super().grid_anchors(grid_sizes, [[stride, stride] for stride in self.strides])


class DefaultBoxes(DefaultBoxGenerator):
    """torchvision's default boxes, in float32 where the features are less."""

    def _grid_default_boxes(
        self, grid_sizes: list[list[int]], image_size: list[int], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        return super()._grid_default_boxes(grid_sizes, image_size, torch.promote_types(dtype, torch.float32))


def ssdlite_boxes(image_size: int, grid_sides: Sequence[int], published: bool) -> DefaultBoxes:
    """Six maps' boxes: squares of two sizes and four of other aspects in each cell, unclipped as mmdet's.

    Args:
        image_size: side of the image in pixels.
        grid_sides: cells along it, by map.
        published: the pixels that the published run at 320 has, whatever the size; as the published run at 512 does.
            Else they grow with the image, and the centres are those of the cells. At 320 both are the same.
    """
    grows = 1 if published else image_size / PUBLISHED_SIDE
    steps = list(PUBLISHED_STEPS) if published else [round(image_size / side) for side in grid_sides]
    scales = [size * grows / image_size for size in PUBLISHED_SIZES]
    return DefaultBoxes([list(SSDLITE_ASPECTS)] * len(steps), scales=scales, steps=steps, clip=False)
