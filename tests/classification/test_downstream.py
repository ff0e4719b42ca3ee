"""EMOv2 under other people's heads: forward, backward, save and load."""

import pytest
import segmentation_models_pytorch as smp
import torch
from helpers.models import randomize
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    SegformerConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

import d_emo.timm_models  # noqa: F401
from d_emo import EMOv2Backbone, EMOv2Config, EMOv2ForImageClassification, create_classifier
from d_emo.detection import mask_rcnn, retinanet, ssdlite

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def backbone_config(**options):
    return EMOv2Config.of("EMOv2-1M", **options)


def assert_learns(model, loss):
    """A finite loss, whose gradient reaches the backbone's first layer."""
    assert torch.isfinite(loss)
    loss.backward()
    stem = [
        parameter for name, parameter in model.named_parameters() if "stem" in name and name.endswith("conv.weight")
    ]
    assert len(stem) == 1 and stem[0].grad.abs().sum() > 0


@pytest.mark.parametrize(("build", "published"), [(retinanet, 14.4e6), (mask_rcnn, 24.8e6), (ssdlite, 6.0e6)])
def test_torchvisions_detectors_train_detect_and_are_restored(tmp_path, build, published):
    """Their size with EMOv2-5M is within 4% of the paper's, whose heads come from another library."""
    with torch.device("meta"):
        assert sum(p.numel() for p in build("EMOv2-5M", 81).parameters()) == pytest.approx(published, rel=0.04)
    small = {} if build is ssdlite else {"min_size": 64, "max_size": 128}
    torch.manual_seed(0)
    model = build("EMOv2-1M", 3, **small)
    images = [torch.rand(3, 64, 80), torch.rand(3, 96, 64)]
    targets = [
        {"boxes": torch.tensor([[8.0, 8.0, 50.0, 40.0]]), "labels": torch.tensor([label]),
         "masks": torch.ones(1, *image.shape[1:], dtype=torch.uint8)}
        for label, image in zip((1, 2), images, strict=True)
    ]  # fmt: skip
    assert_learns(model, sum(model.train()(images, targets).values()))
    torch.save(model.eval().state_dict(), tmp_path / "detector.pt")
    again = build("EMOv2-1M", 3, **small).eval()
    again.load_state_dict(torch.load(tmp_path / "detector.pt", weights_only=True))
    with torch.no_grad():
        for one, other in zip(model(images), again(images), strict=True):
            assert one["boxes"].shape[1] == 4 and torch.equal(one["boxes"], other["boxes"])


def test_a_trained_classifier_goes_under_a_detector(tmp_path):
    classifier = EMOv2ForImageClassification(backbone_config(num_labels=3))
    randomize(classifier.emov2)
    classifier.save_pretrained(tmp_path)
    model = retinanet(str(tmp_path), 3)
    weights = model.backbone.backbone.emov2.state_dict()
    trained = classifier.emov2.state_dict()
    assert all(torch.equal(weights[key], trained[key]) for key in weights) and len(weights) > 100


@pytest.mark.parametrize("decoder", [smp.Unet, smp.FPN, smp.PSPNet, smp.DeepLabV3, smp.DeepLabV3Plus, smp.Segformer])
def test_segmentation_models_pytorch_takes_it_by_timms_name(tmp_path, decoder):
    torch.manual_seed(0)
    model = decoder("tu-emov2_1m", encoder_weights=None, classes=5)
    pixels = torch.randn(2, 3, 64, 64)
    assert_learns(model, model.train()(pixels).square().mean())
    model.eval()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = decoder("tu-emov2_1m", encoder_weights=None, classes=5).eval()
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    with torch.no_grad():
        answer = model(pixels)
        assert answer.shape == (2, 5, 64, 64) and torch.equal(answer, again(pixels))


def test_uper_net(tmp_path):
    config = UperNetConfig(
        backbone_config=backbone_config(out_features=STAGES), num_labels=5, hidden_size=32, auxiliary_in_channels=80
    )
    model = UperNetForSemanticSegmentation(config)
    pixels = torch.randn(2, 3, 64, 64)
    output = model(pixels, labels=torch.zeros(2, 64, 64, dtype=torch.long))
    assert output.logits.shape == (2, 5, 64, 64)
    assert_learns(model, output.loss)
    assert_restored(model, tmp_path, pixels)


def test_detr_freezes_the_norms_and_sees_the_same_features(tmp_path):
    options = {"num_labels": 3, "num_queries": 5, "encoder_layers": 1, "decoder_layers": 1, "d_model": 32,
               "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
               "decoder_ffn_dim": 32}  # fmt: skip
    config = DetrConfig(backbone_config=backbone_config(out_features=["stage4"]), **options)
    model = DetrForObjectDetection(config)
    plain = randomize(EMOv2Backbone(config.backbone_config))
    inner = model.model.backbone.model
    inner.load_state_dict(plain.state_dict(), strict=False)  # frozen norms count no batches
    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = plain.eval()(pixels).feature_maps[0]
        # Another formula for the same norm; logits of random weights are of order 1.
        torch.testing.assert_close(inner.eval()(pixels).feature_maps[0], expected, atol=1e-4, rtol=1e-4)
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    output = model.train()(pixels, labels=labels)
    assert output.logits.shape == (1, 5, 4)
    assert_learns(model, output.loss)
    assert_restored(model, tmp_path, pixels)


def assert_restored(model, folder, pixels):
    """A saved and loaded model gives the same logits."""
    model.eval().save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(model(pixels).logits, again(pixels).logits)


def test_segformers_head():
    backbone = EMOv2Backbone(backbone_config(out_features=STAGES))
    head = SegformerDecodeHead(SegformerConfig(hidden_sizes=backbone.channels, decoder_hidden_size=32, num_labels=5))
    logits = head(backbone(torch.randn(2, 3, 64, 64)).feature_maps)
    assert logits.shape == (2, 5, 16, 16)
    assert_learns(backbone, logits.square().mean())


@pytest.mark.parametrize(
    ("output_stride", "sides", "dilations"),
    [
        (32, [32, 16, 8, 4, 2], [1, 1, 1, 1]),
        (16, [32, 16, 8, 4, 4], [1, 1, 1, 2]),
        (8, [32, 16, 8, 8, 8], [1, 1, 2, 4]),
    ],
)
def test_the_output_stride_keeps_the_grid_and_dilates(output_stride, sides, dilations):
    model = create_classifier("EMOv2-1M", image_size=64, output_stride=output_stride)
    maps = model.forward_stages(torch.randn(1, 3, 64, 64))
    assert [stage.shape[-1] for stage in maps] == sides
    assert [stage.blocks[1].i2rmb.conv.dilation[0] for stage in model.stages] == dilations
    published = create_classifier("EMOv2-1M", image_size=64)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in published.state_dict().items()
    }


def test_an_unknown_output_stride_is_refused():
    with pytest.raises(ValueError, match="output_stride=4 is not one of 8, 16, 32"):
        create_classifier("EMOv2-1M", output_stride=4)


# ---- detectors: odd batches and wrong arguments ----------------------------------------------------------------------

BUILDERS = [retinanet, mask_rcnn, ssdlite]


def detector(build, **options):
    """A small detector with random weights, and the scene that it is tested on."""
    small = {"image_size": 64} if build is ssdlite else {"min_size": 64, "max_size": 96}
    if build is mask_rcnn:  # few candidates
        small |= {"rpn_post_nms_top_n_train": 8, "rpn_post_nms_top_n_test": 8, "box_batch_size_per_image": 8}
    torch.manual_seed(0)
    return build("EMOv2-1M", 3, **{**small, **options})


def target(image, boxes=1, label=1):
    """So many boxes in an image."""
    height, width = image.shape[1:]
    return {"boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]).repeat(boxes, 1), "labels": torch.full((boxes,), label),
            "masks": torch.ones(boxes, height, width, dtype=torch.uint8)}  # fmt: skip


@pytest.mark.parametrize("build", BUILDERS)
def test_detectors_take_mixed_sizes_greys_and_images_without_objects(build):
    images = [torch.rand(3, 64, 80), torch.rand(1, 33, 47), torch.rand(3, 90, 40)]
    model = detector(build).train()
    for boxes in ((0, 0, 0), (1, 0, 2)):
        losses = model(images, [target(image, n) for image, n in zip(images, boxes, strict=True)])
        assert all(torch.isfinite(loss) for loss in losses.values())
    sum(losses.values()).backward()
    with torch.no_grad():
        model.eval()
        found = model(images)
        assert len(found) == 3 and all(one["boxes"].shape[1] == 4 for one in found)
        grey = images[1]
        torch.testing.assert_close(model([grey])[0]["boxes"], model([grey.expand(3, -1, -1)])[0]["boxes"])


IMAGE = torch.rand(3, 64, 80)
BAD_SCENES = [
    (False, [], None, "images are none; pass a list of at least one tensor"),
    (False, None, None, "images is a NoneType; pass a list of tensors"),
    (False, [IMAGE[0]], None, r"images\[0\] is \(64, 80\); pass a tensor \(3, H, W\)"),
    (False, [IMAGE, torch.rand(4, 64, 80)], None, r"images\[1\] is \(4, 64, 80\)"),
    (False, [torch.rand(3, 0, 80)], None, r"images\[0\] is \(3, 0, 80\)"),
    (False, ["a.jpg"], None, r"images\[0\] is str"),
    (False, [(IMAGE * 255).byte()], None, r"images\[0\] is torch.uint8; pass numbers in \[0, 1\]"),
    (True, [IMAGE, IMAGE], None, r"targets are missing; .* else call eval\(\)"),
    (True, [IMAGE, IMAGE], [target(IMAGE)], "targets are 1 for 2 images"),
    (True, [IMAGE, IMAGE], [{}, {}], r"targets\[0\] has no tensor boxes and labels"),
    (True, [IMAGE, IMAGE], [target(IMAGE, label=3)] * 2, r"labels are \[3\], the detector's classes 0 to 2"),
    (True, [IMAGE, IMAGE], [target(IMAGE, label=-1)] * 2, r"labels are \[-1\]"),
    (True, [IMAGE, IMAGE], [{**target(IMAGE), "labels": torch.ones(2).long()}] * 2, r"labels have the shape \(2,\)"),
    (
        True,
        [IMAGE, IMAGE],
        [{**target(IMAGE), "labels": torch.ones(1)}] * 2,
        r"labels are torch.float32; pass",
    ),
    (True, [IMAGE, IMAGE], [{**target(IMAGE), "boxes": torch.ones(1, 5)}] * 2, r"boxes have the shape \(1, 5\)"),
]


@pytest.mark.parametrize("build", BUILDERS)
def test_detectors_refuse_scenes_that_do_not_fit(build):
    model = detector(build)
    for training, images, targets, message in BAD_SCENES:
        with pytest.raises(ValueError, match=message):
            model.train(training)(images, targets)
    if build is mask_rcnn:
        with pytest.raises(ValueError, match=r"masks have the shape \(1, 9, 9\), not \(1, 64, 80\)"):
            model([IMAGE], [{**target(IMAGE), "masks": torch.ones(1, 9, 9)}])
    if build is ssdlite:
        with pytest.raises(ValueError, match="leaves BatchNorm a single value to train on; pass 2 images or more"):
            model([IMAGE], [target(IMAGE)])


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("EMOv2-6M", 3), {}, "backbone='EMOv2-6M' does not load as an EMOv2 .* or for fresh weights one of EMOv2-1M"),
        ((3, 3), {}, "backbone=3 is no name of a backbone"),
        (("", 3), {}, "backbone='' is no name"),
        (("EMOv2-1M", 0), {}, "num_classes=0 is not a whole number from 2"),
        (("EMOv2-1M", "3"), {}, "num_classes='3'"),
        (("EMOv2-1M", float("nan")), {}, "num_classes=nan"),
        (("EMOv2-1M", 3), {"image_meen": [0.0]}, "has no option image_meen; did you mean image_mean"),
        (("EMOv2-1M", 3), {"xyz": 1}, "has no option xyz; it has"),
    ],
)
def test_detectors_refuse_wrong_arguments(build, arguments, options, message, offline):
    with pytest.raises(ValueError, match=message) as caught:
        build(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_other_models_are_no_backbones(tmp_path):
    SegformerConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="it holds a model of the type 'segformer'"):
        retinanet(str(tmp_path), 3)


def test_a_detector_normalises_as_its_backbone_was_trained(tmp_path):
    from d_emo import make_image_processor

    for channels, mean in ((3, [0.1, 0.2, 0.3]), (1, [0.2]), (4, [0.2] * 4)):
        folder = tmp_path / str(channels)
        processor = make_image_processor(64)
        processor.image_mean, processor.image_std = [0.1, 0.2, 0.3], [0.5, 0.5, 0.5]
        processor.save_pretrained(folder)
        EMOv2ForImageClassification(backbone_config(num_labels=3, num_channels=channels)).save_pretrained(folder)
        model = retinanet(str(folder), 3, min_size=64, max_size=96).eval()
        assert model.transform.image_mean == pytest.approx(mean)
        with torch.no_grad():
            assert len(model([torch.rand(1, 64, 64), torch.rand(channels, 64, 64)])) == 2
        with pytest.raises(ValueError, match=rf"images\[0\] is \(2, 64, 64\); pass a tensor \({channels}, H, W\)"):
            model([torch.rand(2, 64, 64)])
    assert retinanet(str(tmp_path / "1"), 3, image_mean=[0.9], image_std=[1.0]).transform.image_mean == [0.9]
    assert retinanet("EMOv2-1M", 3).transform.image_mean == pytest.approx([0.485, 0.456, 0.406])
