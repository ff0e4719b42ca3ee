"""Parts of the paper's detectors, from the authors' logs; whole ones: `tests/eval/test_dense_table.py`."""

import pytest
import torch
from helpers.detectors import BUILDERS

from d_emo.detection import mask_rcnn, retinanet, ssdlite

# In millions, by counters of an older tool.
PUBLISHED_V1 = [
    (ssdlite, "EMOv1-1M", 2.31), (ssdlite, "EMOv1-2M", 3.34), (ssdlite, "EMOv1-5M", 6.08),
    (retinanet, "EMOv1-5M", 14.44), (mask_rcnn, "EMOv1-5M", 24.87),
]  # fmt: skip


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(autouse=True)
def on_the_meta_device():
    with torch.device("meta"):
        yield


@pytest.mark.parametrize(("build", "backbone", "millions"), PUBLISHED_V1)
def test_emov1s_detectors_have_the_papers_parameters(build, backbone, millions):
    assert round(parameters(build(backbone)) / 1e6, 2) == millions


def test_each_part_has_the_logs_parameters():
    retina, mask, ssd = (build("EMOv2-5M") for build in (retinanet, mask_rcnn, ssdlite))
    assert (parameters(retina.backbone.fpn), parameters(retina.head)) == (3_158_016, 6_463_220)
    assert (parameters(mask.rpn), parameters(mask.roi_heads)) == (593_935, 16_949_985)
    assert (parameters(ssd.backbone.extra), parameters(ssd.head)) == (403_008, 854_260)


def test_80_classes_are_80_scores_and_one_more_where_the_background_has_one():
    assert retinanet("EMOv2-1M").head.classification_head.cls_logits.out_channels == 80 * 9
    heads = mask_rcnn("EMOv2-1M").roi_heads
    assert heads.box_predictor.cls_score.out_features == 81
    assert heads.box_predictor.bbox_pred.out_features == 80 * 4
    assert heads.mask_predictor.mask_fcn_logits.out_channels == 80
    assert ssdlite("EMOv2-1M").head.classification_head.num_columns == 81


@pytest.mark.parametrize(
    ("backbone", "options", "window"),
    [
        ("EMOv2-1M", {}, 10),
        ("EMOv2-20M", {}, 10),
        ("EMOv1-1M", {}, 7),
        ("EMOv1-2M", {}, 7),
        ("EMOv1-5M", {}, 10),
        ("EMOv2-1M", {"window_size": 8}, 8),
    ],
)
@pytest.mark.parametrize("build", BUILDERS)
def test_windows_are_the_published_ones_and_grids_are_padded(build, backbone, options, window):
    stages = build(backbone, **options).backbone.backbone.emov2.stages
    attention = stages[3].blocks[1].i2rmb.attn
    assert (attention.window_size, attention.clip_window) == (window, False)
    assert attention.window(2, 3) == (window, window)  # wider than the grid
