"""Detectors train, detect, are restored and learn; labels are 0 to K - 1 on both sides."""

import copy

import pytest
import torch
from helpers.detectors import BUILDERS, CLASSES, coco_scenes, detector, target, trained_folder
from torch import nn
from torchvision.models.detection import roi_heads
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import box_iou

from d_emo import EMOv2Config, EMOv2ForImageClassification, make_image_processor
from d_emo.detection import mask_rcnn, retinanet, ssdlite


@pytest.mark.parametrize("build", BUILDERS)
def test_detectors_train_detect_and_are_restored(tmp_path, build):
    model = detector(build, "EMOv2-1M")
    images = [torch.rand(3, 64, 80), torch.rand(3, 96, 64)]
    targets = [target(image, label=label) for image, label in zip(images, (0, 2), strict=True)]
    loss = sum(model.train()(images, targets).values())
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert torch.isfinite(loss) and not without
    assert model.backbone.backbone.emov2.stem.conv.weight.grad.abs().sum() > 0
    torch.save(model.eval().state_dict(), tmp_path / "detector.pt")
    again = detector(build, "EMOv2-1M").eval()
    again.load_state_dict(torch.load(tmp_path / "detector.pt", weights_only=True))
    with torch.no_grad():
        for one, other in zip(model(images), again(images), strict=True):
            assert one["boxes"].shape[1] == 4 and torch.equal(one["boxes"], other["boxes"])


@pytest.mark.parametrize("build", BUILDERS)
def test_a_trained_classifier_goes_under_a_detector_with_the_published_window(tmp_path, build):
    folder = trained_folder(tmp_path, window_size=4, clip_window=True)
    trained = EMOv2ForImageClassification.from_pretrained(folder).emov2.state_dict()
    torch.manual_seed(0)
    inner = build(folder, CLASSES).backbone.backbone.emov2
    weights = inner.state_dict()
    assert all(torch.equal(weights[key], trained[key]) for key in weights) and len(weights) > 60
    attention = inner.stages[3].blocks[1].i2rmb.attn
    assert (attention.window_size, attention.clip_window) == (10, False)


@pytest.mark.parametrize("build", BUILDERS)
def test_mixed_sizes_greys_images_without_objects_and_images_of_a_pixel(build):
    images = [torch.rand(3, 64, 80), torch.rand(1, 33, 47), torch.rand(3, 1, 1)]
    model = detector(build).train()
    tiny = {**target(images[2]), "boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0]])}
    for boxes in ((0, 0), (1, 2)):
        targets = [target(image, n) for image, n in zip(images, boxes, strict=False)]
        losses = model(images, [*targets, tiny if boxes[0] else target(images[2], 0)])
        assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        model.eval()
        found = model(images)
        assert len(found) == 3 and all(one["boxes"].shape[1] == 4 for one in found)
        grey = images[1]
        torch.testing.assert_close(model([grey])[0]["boxes"], model([grey.expand(3, -1, -1)])[0]["boxes"])
        batch = torch.rand(2, 3, 64, 64)
        assert torch.equal(model(batch)[1]["boxes"], model(list(batch))[1]["boxes"])


def classes_of(model):
    """The layer that makes scores, by bias: (A * K,) or, with the background in front, (A * (1 + K),)."""
    if hasattr(model, "roi_heads"):
        return [model.roi_heads.box_predictor.cls_score]
    head = model.head.classification_head
    return [head.cls_logits] if hasattr(head, "cls_logits") else [block[-1] for block in head.module_list]


@torch.no_grad()
def prefer(model, label, background):
    """Give one class the largest scores everywhere."""
    for layer in classes_of(model):
        layer.weight.zero_()
        layer.bias.view(-1, CLASSES + background).fill_(-2.0)[:, label + background] = 2.0


@pytest.mark.parametrize(("build", "background"), [(retinanet, 0), (mask_rcnn, 1), (ssdlite, 1)])
@pytest.mark.parametrize("label", [0, 2])
def test_labels_begin_with_0_in_targets_and_in_results(build, background, label):
    model = detector(build)
    prefer(model, label, background)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    with torch.no_grad():
        for one in model.eval()(images):
            assert len(one["labels"]) and (one["labels"][: len(one["labels"]) // 4 + 1] == label).all()
        losses = {}
        for other in range(CLASSES):
            torch.manual_seed(0)  # of proposals
            found = model.train()(images, [target(image, label=other) for image in images])
            losses[other] = found["loss_classifier" if build is mask_rcnn else "classification"].item()
    assert min(losses, key=losses.get) == label and len(set(losses.values())) > 1


@pytest.mark.parametrize("build", BUILDERS)
def test_one_class_is_enough(build):
    model = detector(build, num_classes=1)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    sum(model.train()(images, [target(image, label=0) for image in images]).values()).backward()
    with torch.no_grad():
        assert all((one["labels"] == 0).all() for one in model.eval()(images))


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("whole", [False, True])
def test_bfloat16_trains_and_finds_boxes_in_float32(build, whole):
    model = detector(build)
    images = [torch.rand(3, 64, 80), torch.rand(3, 64, 80)]
    if whole:
        model, images = model.bfloat16(), [image.bfloat16() for image in images]
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        losses = model.train()(images, [target(image) for image in images])
        sum(losses.values()).backward()
        assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
        with torch.no_grad():
            assert all(one["boxes"].dtype == torch.float32 for one in model.eval()(images))


@pytest.mark.parametrize("build", BUILDERS)
def test_targets_are_left_as_they_were_and_whole_numbers_are_boxes(build):
    image = torch.rand(3, 64, 64)
    given = {**target(image), "boxes": torch.tensor([[4, 4, 30, 30]]), "keypoints": "of somebody else", "area": 1}
    before = copy.deepcopy(given)
    detector(build).train()([image, image], [given, given])
    assert given.keys() == before.keys()
    assert torch.equal(given["boxes"], before["boxes"]) and torch.equal(given["labels"], before["labels"])


def test_published_test_settings_are_the_defaults():
    with torch.device("meta"):
        retina, mask, ssd = (build("EMOv2-1M") for build in BUILDERS)
    assert (retina.score_thresh, retina.nms_thresh, retina.detections_per_img) == (0.05, 0.5, 100)
    assert retina.topk_candidates == 1000
    heads, proposals = mask.roi_heads, mask.rpn
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    proposals.eval()
    assert (proposals.pre_nms_top_n(), proposals.post_nms_top_n(), proposals.nms_thresh) == (1000, 1000, 0.7)
    proposals.train()
    assert (proposals.pre_nms_top_n(), proposals.post_nms_top_n()) == (2000, 1000)
    for model in (retina, mask):
        assert (model.transform.min_size, model.transform.max_size) == ((800,), 1333)
    assert (ssd.score_thresh, ssd.nms_thresh, ssd.topk_candidates, ssd.detections_per_img) == (0.02, 0.45, 1000, 200)
    assert ssd.transform.fixed_size == (320, 320)


def test_retinanets_coarser_levels_come_from_stage_4_and_have_no_activation():
    model = detector(retinanet)
    pixels = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        levels = model.eval().backbone(pixels)
        stage4 = model.backbone.backbone(pixels).feature_maps[-1]
        extra = model.backbone.fpn.extra_blocks
        p6 = nn.functional.conv2d(stage4, extra.p6.weight, extra.p6.bias, stride=2, padding=1)
        assert (p6 < 0).any()
        torch.testing.assert_close(levels["p6"], p6)
        torch.testing.assert_close(levels["p7"], extra.p7(p6))
    assert [level.shape[-1] for level in levels.values()] == [32, 16, 8, 4, 2] and model.backbone.strides[-1] == 128


def test_retinanets_losses_are_sums_over_the_batch_by_its_anchors_on_objects():
    model = detector(retinanet, frozen_stages=4).train()  # an image's features do not depend on the others
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    targets = [target(images[0]), target(images[1], box=(4.0, 4.0, 60.0, 60.0))]
    on_objects = []

    def counting(anchors, targets):
        quality = box_iou(targets["boxes"], anchors)
        on_objects.append((model.proposal_matcher(quality) >= 0).sum())

    model.anchor_generator.register_forward_hook(
        lambda _, __, anchors: [counting(some, given) for some, given in zip(anchors, asked, strict=True)] and None
    )
    with torch.no_grad():
        each = []
        for image, given in zip(images, targets, strict=True):
            asked = [given]
            each.append(model([image], [given]))
        asked = targets
        both = model(images, targets)
    first, second = on_objects[:2]
    assert first != second and min(first, second) > 0
    for name, loss in both.items():
        expected = (first * each[0][name] + second * each[1][name]) / (first + second)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_mask_r_cnns_losses_are_torchvisions_but_for_l1_and_masks_of_0_and_1(monkeypatch):
    model = detector(mask_rcnn).train()
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 64)]
    targets = [target(images[0], 2), target(images[1], 0)]
    targets[0]["masks"][:, :15] = 0

    def losses():
        torch.manual_seed(1)  # of samples
        with torch.no_grad():
            return model(images, targets)

    ours = losses()
    cut = roi_heads.project_masks_on_boxes

    def binary(masks, boxes, matched, side):
        # Half a pixel down and right in torchvision's coordinates is what `aligned` leaves out.
        return (cut(masks, boxes - 0.5, matched, side) >= 0.5).to(boxes.dtype)

    l1 = nn.functional.l1_loss
    monkeypatch.setattr(nn.functional, "smooth_l1_loss", lambda a, b, beta, reduction: l1(a, b, reduction=reduction))
    monkeypatch.setattr(roi_heads, "project_masks_on_boxes", binary)
    model.rpn.__class__, model.roi_heads.__class__ = RegionProposalNetwork, RoIHeads
    theirs = losses()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-6)
        assert ours[name] > 0


def test_a_detector_normalises_as_its_backbone_was_trained(tmp_path):
    for channels, mean in ((3, [0.1, 0.2, 0.3]), (1, [0.2]), (4, [0.2] * 4), (5, [0.2] * 5)):
        folder = tmp_path / str(channels)
        processor = make_image_processor(64)
        processor.image_mean, processor.image_std = [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]
        processor.save_pretrained(folder)
        config = EMOv2Config.of("EMOv2-1M", num_labels=3, num_channels=channels)
        EMOv2ForImageClassification(config).save_pretrained(folder)
        model = retinanet(str(folder), 3, min_size=64, max_size=96).eval()
        assert model.transform.image_mean == pytest.approx(mean)
        with torch.no_grad():
            assert len(model([torch.rand(1, 64, 64), torch.rand(channels, 64, 64)])) == 2
        with pytest.raises(ValueError, match=rf"images\[0\] is \(2, 64, 64\); pass a tensor \({channels}, H, W\)"):
            model([torch.rand(2, 64, 64)])
    assert retinanet(str(tmp_path / "1"), 3, image_mean=[0.9], image_std=[1.0]).transform.image_mean == [0.9]
    assert retinanet("EMOv2-1M", 3).transform.image_mean == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "side", "steps", "rate"),
    [(ssdlite, 192, 150, 1e-3), (retinanet, 192, 80, 3e-4), (mask_rcnn, 128, 100, 1e-3)],
)
def test_photos_are_learned_by_heart(build, side, steps, rate, shared, tmp_path):
    """Two photos of COCO with two large objects each: the loss falls, and all four are found with their labels."""
    size = {"image_size": side} if build is ssdlite else {"min_size": side, "max_size": side}
    if build is mask_rcnn:
        size |= {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 50, "box_batch_size_per_image": 32}
    images, targets, classes = coco_scenes(shared, ("000000000072", "000000000073"), side)
    folder = trained_folder(tmp_path, widths=[16, 32, 64, 96], layer_scale=1.0, drop_path=0.0)
    torch.manual_seed(0)
    model = build(folder, classes, frozen_stages=0, fixed_statistics=False, **size).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    history = []
    for _ in range(steps):
        loss = sum(model(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-5:]) < 0.5 * sum(history[:5])
    with torch.no_grad():
        found = model.eval()(images)
    for one, wanted in zip(found, targets, strict=True):
        right = one["labels"] == wanted["labels"][0]
        assert len(right) and right[0]  # the surest
        assert (box_iou(wanted["boxes"], one["boxes"][right]).amax(1) > 0.5).all()  # a box for each object
        if build is mask_rcnn:
            mask = one["masks"][0] > 0.5  # (1, H, W)
            shared_pixels = (mask & wanted["masks"]).sum((1, 2)) / (mask | wanted["masks"]).sum((1, 2))
            assert shared_pixels.max() > 0.5
