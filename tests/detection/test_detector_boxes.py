"""The boxes that detectors start from, against mmdet's formulas as written down here."""

import math

import pytest
import torch
from helpers.detectors import detector
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from d_emo.detection import mask_rcnn, retinanet, ssdlite
from d_emo.detection.boxes import at_least_float32
from d_emo.detection.heads import BoxPredictor, MaskPredictor, RoIAlignOfLevels

SIZES, STEPS, GRIDS = [48, 100, 150, 202, 253, 304, 320], [16, 32, 64, 107, 160, 320], [20, 10, 5, 3, 2, 1]


def default_boxes(size, grids, published=False):
    """SSDLite's default boxes on an image of so many pixels."""
    with torch.device("meta"):
        anchors = ssdlite("EMOv2-1M", image_size=size, boxes="published" if published else "scaled").anchor_generator
    image = ImageList(torch.empty(1, 3, size, size), [(size, size)])
    return anchors(image, [torch.empty(1, 1, side, side) for side in grids])[0]


def expected_boxes(sizes, steps, grids):
    """Six boxes a cell: two squares, and four of other aspects, none of them clipped."""
    found = []
    for level, (step, grid) in enumerate(zip(steps, grids, strict=True)):
        size, between = sizes[level], math.sqrt(sizes[level] * sizes[level + 1])
        shapes = [(size, size), (between, between)]
        for aspect in (2, 3):
            long, short = size * math.sqrt(aspect), size / math.sqrt(aspect)
            shapes += [(long, short), (short, long)]
        for row in range(grid):
            for column in range(grid):
                x, y = (column + 0.5) * step, (row + 0.5) * step
                found += [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for w, h in shapes]
    return torch.tensor(found)


@pytest.mark.parametrize("published", [True, False])
def test_ssdlites_boxes_at_320_are_the_published_ones(published):
    boxes = default_boxes(320, GRIDS, published)
    assert len(boxes) == 3234
    torch.testing.assert_close(boxes, expected_boxes(SIZES, STEPS, GRIDS), atol=1e-3, rtol=0)  # of 320 pixels


def test_at_512_they_grow_with_the_image_or_keep_the_published_pixels():
    grids = [32, 16, 8, 4, 2, 1]
    grown = expected_boxes([size * 1.6 for size in SIZES], [16, 32, 64, 128, 256, 512], grids)
    torch.testing.assert_close(default_boxes(512, grids), grown, atol=2e-3, rtol=0)
    kept = expected_boxes(SIZES, STEPS, grids)
    torch.testing.assert_close(default_boxes(512, grids, published=True), kept, atol=2e-3, rtol=0)


@pytest.mark.parametrize("size", [33, 64, 300, 500])
def test_at_any_size_there_is_a_box_for_every_output(size):
    with torch.no_grad():
        model = detector(ssdlite, image_size=size).eval()
        maps = list(model.backbone(torch.rand(1, 3, size, size)).values())
        outputs = model.head(maps)
    grids = [level.shape[-1] for level in maps]
    assert grids == model.backbone.grid_sides(size)
    boxes = default_boxes(size, grids)
    assert len(boxes) == outputs["cls_logits"].shape[1] == outputs["bbox_regression"].shape[1]
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    # Grids are rounded up, so that the last cell's centre may be beyond the image: by half a step of 16 at most.
    assert centres.min() > 0 and centres.max() < size + 8


@pytest.mark.parametrize(
    ("build", "strides", "scales"),
    [
        (retinanet, [8, 16, 32, 64, 128], [4 * 2 ** (third / 3) for third in range(3)]),
        (mask_rcnn, [4, 8, 16, 32, 64], [8]),
    ],
)
def test_anchors_are_mmdets_to_a_thousandth_of_a_pixel(build, strides, scales):
    with torch.device("meta"):
        model = build("EMOv2-1M")
    anchors = model.anchor_generator if build is retinanet else model.rpn.anchor_generator
    grids = [(math.ceil(800 / stride), math.ceil(672 / stride)) for stride in strides]
    features = [torch.empty(1, 1, *grid, dtype=torch.bfloat16) for grid in grids]
    found = anchors(ImageList(torch.empty(1, 3, 800, 672), [(800, 672)]), features)[0]
    expected = []
    for stride, (height, width) in zip(strides, grids, strict=True):
        rows = torch.arange(height).repeat_interleave(width).float() * stride
        columns = torch.arange(width).repeat(height).float() * stride
        cells = [
            (scale * stride / math.sqrt(aspect), scale * stride * math.sqrt(aspect))
            for aspect in (0.5, 1.0, 2.0)
            for scale in scales
        ]
        half = torch.tensor(cells) / 2
        centres = torch.stack([columns, rows], dim=1)[:, None]  # of whole strides, not of cells
        expected.append(torch.cat([centres - half, centres + half], dim=2).flatten(0, 1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-3, rtol=0)


def test_the_backgrounds_box_and_mask_are_zero():
    torch.manual_seed(0)
    scores, boxes = BoxPredictor(8, 5)(torch.randn(4, 8))
    assert scores.shape == (4, 6) and boxes.shape == (4, 24)
    assert (boxes[:, :4] == 0).all() and (boxes[:, 4:] != 0).all()
    masks = MaskPredictor(8, 5)(torch.randn(4, 8, 3, 3))
    assert masks.shape == (4, 6, 6, 6) and (masks[:, 0] == 0).all() and (masks[:, 1:] != 0).any()


def test_boxes_are_pooled_from_the_level_of_their_size():
    torch.manual_seed(0)
    strides = [4, 8, 16, 32]
    maps = {str(number): torch.randn(2, 3, 512 // stride, 512 // stride) for number, stride in enumerate(strides)}
    sides = [20, 111, 113, 225, 449, 500]
    levels = [0, 0, 1, 2, 3, 3]
    boxes = [torch.tensor([[5.0, 7.0, 5.0 + side, 7.0 + side] for side in sides]), torch.empty(0, 4)]
    pooled = RoIAlignOfLevels(7, strides)(maps, boxes, None)
    for box, level, found in zip(boxes[0], levels, pooled, strict=True):
        expected = roi_align(maps[str(level)], [box[None], torch.empty(0, 4)], 7, 1 / strides[level], 0, True)
        torch.testing.assert_close(found, expected[0], atol=1e-6, rtol=1e-6)
    assert RoIAlignOfLevels(7, strides)(maps, [torch.empty(0, 4)] * 2, None).shape == (0, 3, 7, 7)


def test_only_narrow_types_become_float32():
    kinds = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    wide = [at_least_float32(torch.ones(1, dtype=kind)).dtype for kind in kinds]
    assert wide == [torch.float32, torch.float32, torch.float32, torch.float64]
