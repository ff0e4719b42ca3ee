"""Backbones for dense heads: the published windows, whatever the classifier's, and one line for what is none."""

import subprocess
import sys

import pytest
import torch
from helpers.models import randomize

from d_emo import EMOv2Config, EMOv2ForImageClassification
from d_emo.classification.backbones import normalization, open_backbone

NARROW = {"depths": (1, 1, 2, 2), "widths": (16, 16, 32, 32), "head_dims": (8, 8, 16, 16)}


@pytest.mark.parametrize(
    ("name", "detection", "segmentation"),
    [("EMOv2-1M", 10, 10), ("EMOv2-50M", 10, 10), ("EMOv1-1M", 7, 7), ("EMOv1-2M", 7, 7), ("EMOv1-5M", 10, 16)],
)
def test_windows_are_the_published_ones_of_the_task(name, detection, segmentation):
    with torch.device("meta"):
        for task, window in (("detection", detection), ("segmentation", segmentation)):
            assert open_backbone(name, ("stage4",), task).config.window_size == window
        assert open_backbone(name, ("stage4",), window_size=5).config.window_size == 5


def test_a_trained_one_keeps_its_weights_and_gets_the_window(tmp_path):
    config = EMOv2Config.of("EMOv2-1M", 64, num_labels=3, num_channels=5, **NARROW)
    classifier = EMOv2ForImageClassification(config)
    randomize(classifier.emov2)
    classifier.save_pretrained(tmp_path)
    backbone = open_backbone(tmp_path, ["stage2", "stage4"])
    attention = backbone.emov2.stages[2].blocks[1].i2rmb.attn
    assert (attention.window_size, attention.clip_window) == (10, False)
    trained = classifier.emov2.state_dict()
    assert all(torch.equal(weights, trained[name]) for name, weights in backbone.emov2.state_dict().items())
    maps = backbone(torch.rand(1, 5, 40, 72)).feature_maps
    assert [tuple(level.shape) for level in maps] == [(1, 16, 5, 9), (1, 32, 2, 3)]
    assert len(normalization(tmp_path, 5)["image_mean"]) == 5  # it has no image processor


def test_one_that_was_saved_in_half_precision_is_float32_as_its_heads_are(tmp_path):
    classifier = EMOv2ForImageClassification(EMOv2Config.of("EMOv2-1M", 64, num_labels=3, **NARROW)).bfloat16()
    classifier.save_pretrained(tmp_path)
    assert {weights.dtype for weights in open_backbone(tmp_path, ["stage4"]).parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": 3}, "backbone 3 is unknown; pass a classifier's folder, or one of EMOv2-1M"),
        ({"name": "EMOv2-6M"}, "backbone 'EMOv2-6M' is unknown; did you mean EMOv2-5M"),
        ({"name": "some/body"}, "backbone='some/body' does not load as an EMOv2 .*for fresh weights one of EMOv2-1M"),
        ({"stages": ("stage9",)}, r"stages=\('stage9',\) is not a list of 1 to 9 values, each one of stem, stage1"),
        ({"stages": ()}, r"stages=\(\) is not a list of 1"),
        ({"stages": "stage4"}, "stages='stage4' is not a list"),
        ({"task": "pose"}, "task='pose' is not one of detection, segmentation"),
        ({"window_size": 0}, "window_size=0 is not None or a whole number from 1"),
        ({"window_size": True}, "window_size=True"),
    ],
)
def test_what_is_no_backbone_is_refused_in_a_line(arguments, message, offline):
    with pytest.raises(ValueError, match=message) as caught:
        open_backbone(**{"name": "EMOv2-1M", "stages": ("stage4",), **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_torchvision_is_not_needed():
    code = "import sys; sys.modules['torchvision'] = None\nimport d_emo.classification.backbones"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
