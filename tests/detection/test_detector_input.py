"""What detectors refuse, in a line each: arguments, images, targets."""

import numpy as np
import pytest
import torch
from helpers.detectors import BUILDERS, detector, target
from torchvision import tv_tensors
from transformers import SegformerConfig

from d_emo.detection import mask_rcnn, retinanet, ssdlite
from d_emo.detection.checks import check_targets

IMAGE = torch.rand(3, 64, 80)
TWO = [IMAGE, IMAGE]


def boxed(*box):
    return [target(IMAGE), target(IMAGE, box=[float(side) for side in box])]


def changed(**parts):
    return [target(IMAGE), {**target(IMAGE), **parts}]


BAD_SCENES = [
    (False, [], None, "images are none; pass a list of at least one tensor"),
    (False, None, None, "images is a NoneType; pass a list of tensors"),
    (False, [IMAGE[0]], None, r"images\[0\] is \(64, 80\); pass a tensor \(3, H, W\)"),
    (False, IMAGE, None, r"images\[0\] is \(64, 80\)"),
    (False, [IMAGE, torch.rand(4, 64, 80)], None, r"images\[1\] is \(4, 64, 80\)"),
    (False, [torch.rand(64, 80, 3)], None, r"images\[0\] is \(64, 80, 3\)"),
    (False, [torch.rand(3, 0, 80)], None, r"images\[0\] is \(3, 0, 80\)"),
    (False, ["a.jpg"], None, r"images\[0\] is str"),
    (False, [IMAGE.numpy()], None, r"images\[0\] is ndarray"),
    (False, [(IMAGE * 255).byte()], None, r"images\[0\] is torch.uint8; pass numbers in \[0, 1\]"),
    (False, [IMAGE.double()], None, "are torch.float64, the model is torch.float32"),
    (True, TWO, None, r"targets are missing; .* else call eval\(\)"),
    (True, TWO, [target(IMAGE)], "targets are 1 for 2 images"),
    (True, TWO, [{}, {}], r"targets\[0\] has no tensor boxes and labels"),
    (True, TWO, [target(IMAGE), None], r"targets\[1\] has no tensor boxes and labels"),
    (True, TWO, changed(boxes=[[0, 0, 1, 1]]), r"targets\[1\] has no tensor boxes; pass boxes, labels"),
    (True, TWO, changed(boxes=np.ones((1, 4))), r"targets\[1\] has no tensor boxes"),
    # labels
    (True, TWO, [target(IMAGE), target(IMAGE, label=3)],
     r"targets\[1\]: labels have 3; they are 0 to 2, the background has none: subtract 1 if they begin with 1"),
    (True, TWO, [target(IMAGE, label=-1)] * 2, r"targets\[0\]: labels have -1; they are 0 to 2"),
    (True, TWO, changed(labels=torch.ones(2).long()), r"targets\[1\]: labels have the shape \(2,\), not \(1,\)"),
    (True, TWO, changed(labels=torch.tensor(1)), r"labels have the shape \(\), not \(1,\)"),
    (True, TWO, changed(labels=torch.ones(1)), r"labels are torch.float32; pass labels.long\(\)"),
    # boxes
    (True, TWO, changed(boxes=torch.ones(1, 5)), r"boxes have the shape \(1, 5\), not \(1, 4\)"),
    (True, TWO, changed(boxes=torch.ones(4)), r"boxes have the shape \(4,\), not \(4, 4\)"),
    (True, TWO, changed(boxes=torch.tensor(1.0)), r"boxes have the shape \(\), not \(0, 4\)"),
    (True, TWO, changed(boxes=torch.empty(0)), r"\(0,\), not \(0, 4\); without objects pass torch.zeros\(0, 4\)"),
    (True, TWO, changed(boxes=torch.ones(1, 4).bool()), r"boxes are torch.bool; pass numbers \(x1, y1, x2, y2\)"),
    (True, TWO, boxed(40, 4, 30, 30), r"targets\[1\]: boxes\[0\] = \(40, 4, 30, 30\) ends before it begins; boxes are "
     r"\(x1, y1, x2, y2\), corners in pixels, not \(x, y, width, height\)"),
    (True, TWO, boxed(4, 4, 4, 30), r"boxes\[0\] = \(4, 4, 4, 30\) has no width or no height; leave it out"),
    (True, TWO, boxed(4, 4, 30, 66), r"boxes\[0\] = \(4, 4, 30, 66\) is outside of the image of 64 x 80 pixels"),
    (True, TWO, boxed(-3, 4, 30, 30), r"boxes\[0\] = \(-3, 4, 30, 30\) is outside"),
    (True, TWO, boxed(100, 4, 120, 30), r"boxes\[0\] = \(100, 4, 120, 30\) is outside"),
    (True, TWO, boxed(4, float("nan"), 30, 30), r"boxes\[0\] = \(4, nan, 30, 30\) is not finite"),
    (True, TWO, boxed(4, 4, float("inf"), 30), r"boxes\[0\] = \(4, 4, inf, 30\) is not finite"),
    (True, TWO, changed(boxes=tv_tensors.BoundingBoxes([[4, 4, 30, 30]], format="XYWH", canvas_size=(64, 80))),
     "boxes are XYWH; pass"),
]  # fmt: skip
BAD_MASKS = [
    (torch.ones(1, 9, 9), r"targets\[1\]: masks have the shape \(1, 9, 9\), not \(1, 64, 80\)"),
    (torch.ones(64, 80), r"masks have the shape \(64, 80\), not \(1, 64, 80\)"),
    (torch.ones(2, 64, 80), r"masks have the shape \(2, 64, 80\)"),
    (torch.full((1, 64, 80), 255, dtype=torch.uint8), r"masks have values from 255 to 255; pass 0 and 1 \(masks > 0\)"),
    (torch.full((1, 64, 80), float("nan")), "masks have values from nan to nan"),
    (None, r"targets\[1\] has no tensor masks; pass boxes, labels, masks"),
]


@pytest.mark.parametrize("build", BUILDERS)
def test_scenes_that_do_not_fit_are_refused_in_a_line(build):
    model = detector(build)
    for training, images, targets, message in BAD_SCENES:
        with pytest.raises(ValueError, match=message) as caught:
            model.train(training)(images, targets)
        assert "\n" not in str(caught.value)


def test_masks_that_do_not_fit_are_refused_in_a_line():
    model = detector(mask_rcnn).train()
    for masks, message in BAD_MASKS:
        with pytest.raises(ValueError, match=message) as caught:
            model(TWO, changed(masks=masks))
        assert "\n" not in str(caught.value)


def test_ssdlite_refuses_to_train_on_one_image():
    with pytest.raises(ValueError, match="leaves BatchNorm a single value to train on; pass 2 images or more"):
        detector(ssdlite).train()([IMAGE], [target(IMAGE)])


@pytest.mark.parametrize("build", [retinanet, mask_rcnn])
def test_an_image_that_resizing_leaves_nothing_of_is_refused(build):
    with pytest.raises(ValueError, match=r"images\[1\] has 1 x 200 pixels, .* longer side is 96 \(max_size\); crop it"):
        detector(build).eval()([IMAGE, torch.rand(3, 1, 200)])


@pytest.mark.parametrize("build", BUILDERS)
def test_boxes_may_end_a_pixel_beyond_the_image_and_masks_are_of_any_type(build):
    box = [-0.5, 0.0, 80.4, 64.9]
    for masks in (torch.ones(1, 64, 80).bool(), torch.ones(1, 64, 80), torch.ones(1, 64, 80).long()):
        given = {**target(IMAGE, box=box), "masks": masks}
        losses = detector(build).train()(TWO, [given, given])
        assert all(torch.isfinite(loss) for loss in losses.values())
    boxes = tv_tensors.BoundingBoxes([[4, 4, 30, 30]], format="XYXY", canvas_size=(64, 80))
    detector(build).train()(TWO, changed(boxes=boxes))


def test_values_elsewhere_than_on_the_cpu_are_not_looked_at():
    """On a GPU that would wait for it; tensors of the meta device have no values to look at."""
    elsewhere = {name: part.to("meta") for name, part in target(IMAGE, label=9).items()}
    check_targets([elsewhere], [IMAGE], 3, masks=True)
    with pytest.raises(ValueError, match="labels have the shape"):
        check_targets([{**elsewhere, "labels": elsewhere["labels"][None]}], [IMAGE], 3, masks=True)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("EMOv2-6M", 3), {}, "backbone 'EMOv2-6M' is unknown; did you mean EMOv2-5M"),
        ((3, 3), {}, "backbone 3 is unknown; pass a classifier's folder, or one of EMOv2-1M"),
        (("", 3), {}, "backbone '' is unknown"),
        ((None, 3), {}, "backbone None is unknown"),
        (("EMOv2-1M", 0), {}, r"num_classes=0 is not a whole number from 1 .*the background is not counted"),
        (("EMOv2-1M", True), {}, "num_classes=True is not a whole number"),
        (("EMOv2-1M", "3"), {}, "num_classes='3'"),
        (("EMOv2-1M", 3.0), {}, "num_classes=3.0"),
        (("EMOv2-1M", float("nan")), {}, "num_classes=nan"),
        (("EMOv2-1M", 3), {"window_size": 0}, "window_size=0 is not None or a whole number from 1"),
        (("EMOv2-1M", 3), {"frozen_stages": -1}, "frozen_stages=-1 is not None or a whole number from 0"),
        (("EMOv2-1M", 3), {"frozen_stages": True}, "frozen_stages=True"),
        (("EMOv2-1M", 3), {"fixed_statistics": 1}, "fixed_statistics=1 is not None or True or False"),
        (("EMOv2-1M", 3), {"image_meen": [0.0]}, "has no option image_meen; did you mean image_mean"),
        (("EMOv2-1M", 3), {"xyz": 1}, "has no option xyz; it has"),
    ],
)
def test_wrong_arguments_are_refused_in_a_line(build, arguments, options, message, offline):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as caught:
        build(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (retinanet, {"score_thresh": 2}, "retinanet: score_thresh=2 is not a number from 0 to 1"),
        (retinanet, {"min_size": 0}, "min_size=0 is not a whole number from 1"),
        (retinanet, {"min_size": [640, -1]}, r"min_size=\[640, -1\] is not a list"),
        (retinanet, {"image_mean": [0.5]}, r"image_mean=\[0.5\] is not of 3 channels"),
        (retinanet, {"image_std": [0.0, 1.0, 1.0]}, r"image_std=\[0.0, 1.0, 1.0\] is not a list"),
        (retinanet, {"anchor_generator": "mine"}, "anchor_generator='mine' is no AnchorGenerator"),
        (retinanet, {"fixed_size": (0, 64)}, r"fixed_size=\(0, 64\) is not a list of 2 to 2 values"),
        (retinanet, {"detections_per_img": 0.5}, "detections_per_img=0.5 is not a whole number"),
        (mask_rcnn, {"box_nms_thresh": float("nan")}, "box_nms_thresh=nan is not a number from 0 to 1"),
        (mask_rcnn, {"box_predictor": None}, "mask_rcnn has no option box_predictor"),
        (ssdlite, {"image_size": 0}, "image_size=0 is not a whole number from 1"),
        (ssdlite, {"boxes": "big"}, "boxes='big' is not one of scaled, published"),
        (ssdlite, {"size": (64, 64)}, "ssdlite has no option size"),
        (ssdlite, {"min_size": 64}, "ssdlite has no option min_size"),
    ],
)
def test_wrong_options_are_refused_in_a_line(build, options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as caught:
        build("EMOv2-1M", **options)
    assert "\n" not in str(caught.value)


def test_several_sizes_of_training_images_are_taken():
    assert list(retinanet("EMOv2-1M", 3, min_size=(64, 96), max_size=128).transform.min_size) == [64, 96]


def test_other_models_are_no_backbones(tmp_path):
    SegformerConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it holds a model of the type 'segformer'"):
        retinanet(str(tmp_path), 3)
