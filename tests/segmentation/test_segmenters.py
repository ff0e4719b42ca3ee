"""Segmenters by name: the published counts, trained classifiers under heads, and what is refused."""

import itertools
import re

import PIL.Image
import pytest
import torch
from helpers.models import randomize
from helpers.paths import ROOT
from helpers.segmenters import HEADS, TINY, pixels
from transformers import BitImageProcessor

from d_emo import (
    EMOv2Backbone,
    EMOv2Config,
    EMOv2ForImageClassification,
    create_segmenter,
    list_classifiers,
    list_segmenters,
)

# Table XI's systems: parameters with and without the auxiliary head, as the published logs print them.
PUBLISHED = {
    ("deeplabv3", "1M"): (5_829_928, 5_606_546),
    ("deeplabv3", "2M"): (6_973_996, 6_658_454),
    ("deeplabv3", "5M"): (10_373_420, 9_965_718),
    ("deeplabv3", "20M"): (26_838_348, 26_062_006),
    ("semantic_fpn", "1M"): (5_371_026, 5_371_026),
    ("semantic_fpn", "2M"): (6_289_814, 6_289_814),
    ("semantic_fpn", "5M"): (8_986_774, 8_986_774),
    ("semantic_fpn", "20M"): (23_995_574, 23_995_574),
    ("segformer", "1M"): (1_499_234, 1_499_234),
    ("segformer", "2M"): (2_676_118, 2_676_118),
    ("segformer", "5M"): (5_378_454, 5_378_454),
    ("segformer", "20M"): (20_399_798, 20_399_798),
    ("pspnet", "1M"): (4_502_312, 4_278_930),
    ("pspnet", "2M"): (5_564_460, 5_248_918),
    ("pspnet", "5M"): (8_603_436, 8_195_734),
    ("pspnet", "20M"): (24_413_004, 23_636_662),
}
BACKBONES = {"1M": 1_279_484, "2M": 2_182_912, "5M": 4_836_864, "20M": 19_745_312}
# Head, neck, auxiliary head.
PARTS = {
    ("deeplabv3", "5M"): (5_128_854, 0, 407_702),
    ("pspnet", "5M"): (3_358_870, 0, 407_702),
    ("segformer", "1M"): (219_750, 0, 0),
    ("segformer", "2M"): (493_206, 0, 0),
    ("segformer", "5M"): (541_590, 0, 0),
    ("segformer", "20M"): (654_486, 0, 0),
    ("semantic_fpn", "1M"): (1_643_158, 2_448_384, 0),
    ("semantic_fpn", "2M"): (1_643_158, 2_463_744, 0),
    ("semantic_fpn", "5M"): (1_643_158, 2_506_752, 0),
    ("semantic_fpn", "20M"): (1_643_158, 2_607_104, 0),
}


def on_meta(*arguments, **options):
    """A segmenter without memory."""
    with torch.device("meta"):
        return create_segmenter(*arguments, **options)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters()) if module is not None else 0


# ---- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "size"), PUBLISHED)
def test_parameters_are_the_logs(head, size):
    model = on_meta(f"EMOv2-{size}", head)
    whole, without = PUBLISHED[head, size]
    assert (count(model), count(model) - count(model.auxiliary_head)) == (whole, without)
    assert count(model.backbone) == BACKBONES[size]
    assert model.backbone.config.window_size == 10 and not model.backbone.config.clip_window
    if (head, size) in PARTS:
        parts = (model.decode_head, model.neck, model.auxiliary_head)
        assert tuple(count(part) for part in parts) == PARTS[head, size]


@pytest.mark.parametrize(
    ("name", "head", "millions", "window"),
    [
        ("EMOv1-1M", "deeplabv3", 5.65, 7),
        ("EMOv1-2M", "deeplabv3", 6.97, 7),
        ("EMOv1-5M", "deeplabv3", 10.36, 16),
        ("EMOv1-1M", "pspnet", 4.38, 7),
        ("EMOv1-2M", "pspnet", 5.56, 7),
        ("EMOv1-5M", "pspnet", 8.59, 16),
        ("EMOv1-1M", "semantic_fpn", 5.28, 7),
        ("EMOv1-2M", "semantic_fpn", 6.28, 7),
        ("EMOv1-5M", "semantic_fpn", 8.97, 16),
    ],
)
def test_emov1s_systems_have_the_papers_parameters_with_the_auxiliary_head(name, head, millions, window):
    """To two decimals, cut or rounded as the older counter did."""
    model = on_meta(name, head)
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.01)
    assert model.backbone.config.window_size == window


def test_every_listed_name_is_built():
    assert set(list_classifiers()) <= set(list_segmenters())
    assert list_segmenters("EMOv2-5*") == ["EMOv2-5M", "EMOv2-50M"]
    for name, head in zip(list_classifiers(), itertools.cycle(HEADS), strict=False):
        model = on_meta(name, head)
        assert model.decode_head.classifier.out_channels == 150 and (model.auxiliary_head is None) == (head[0] == "s")
    assert model.backbone.config.window_size == 16  # EMOv1-20M's was not published: EMOv1-5M's


def test_drop_path_is_the_published():
    published = {"EMOv2-1M": 0.04036, "EMOv2-2M": 0.05, "EMOv2-5M": 0.05, "EMOv2-20M": 0.1}
    assert {name: on_meta(name).backbone.config.drop_path for name in published} == published


def test_the_documents_example_runs(tmp_path, monkeypatch):
    document = (ROOT / "docs" / "dense.md").read_text()
    code = re.search(r"## Segmentation\n\n```python\n(.*?)```", document, flags=re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (64, 48), (90, 120, 150)).save("photo.jpg")
    found = {}
    exec(code, found)
    assert {entry["label"] for entry in found["masks"]} <= {"sky", "sea", "sand"}
    assert found["masks"][0]["mask"].size == (64, 48)


# ---- choices ---------------------------------------------------------------------------------------------------------


def test_overrides_reach_backbone_head_and_classes():
    model = on_meta(
        "EMOv2-1M", "pspnet", auxiliary=False, head_channels=32, dropout=0.3, window_size=8, drop_path=0.2,
        num_channels=5, id2label=["sky", "sea"], image_mean=[0.5] * 5, layer_scale=0.1,
    )  # fmt: skip
    assert model.auxiliary_head is None and model.decode_head.bottleneck.conv.out_channels == 32
    assert model.decode_head.dropout.p == 0.3 and model.config.id2label == {0: "sky", 1: "sea"}
    config = model.backbone.config
    assert (config.window_size, config.drop_path, config.num_channels, config.layer_scale) == (8, 0.2, 5, 0.1)
    assert model.backbone.emov2.stem.conv.in_channels == model.config.num_channels == 5
    assert model.decode_head.classifier.out_channels == 2
    assert on_meta("EMOv2-1M", "segformer", head_channels=288).config.head_channels == 288
    assert on_meta("EMOv2-1M", "segformer", auxiliary=True).auxiliary_head is not None


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("EMOv2-5",), {}, r"segmenter 'EMOv2-5' is unknown; did you mean EMOv2-5M"),
        (("emov2_5m",), {}, r"segmenter 'emov2_5m' is unknown; did you mean EMOv2-5M"),
        (("resnet",), {}, r"segmenter 'resnet' is unknown; pass a classifier's folder, or one of EMOv2-1M"),
        (("",), {}, r"segmenter '' is unknown"),
        ((None,), {}, r"segmenter None is unknown"),
        (("EMOv2-1M", "fpn"), {}, r"head='fpn' is not one of deeplabv3, pspnet, segformer, semantic_fpn"),
        (("EMOv2-1M", 3), {}, r"head=3 is not one of deeplabv3"),
        (("EMOv2-1M", "pspnet", 1), {}, r"num_classes=1 is not a whole number from 2 .*a single object has 2"),
        (("EMOv2-1M", "pspnet", 0), {}, r"num_classes=0 is not a whole number from 2"),
        (("EMOv2-1M", "pspnet", 300), {}, r"semantic_loss_ignore_index=255 is one of the 300 classes; choose another"),
        (("EMOv2-1M",), {"window": 8}, r"create_segmenter has no window; did you mean window_size\?"),
        (("EMOv2-1M",), {"in_channels": 1}, r"has no in_channels; did you mean num_channels\?"),
        (("EMOv2-1M",), {"num_labels": 3}, r"has no num_labels; did you mean num_classes\?"),
        (("EMOv2-1M",), {"auxilary": False}, r"has no auxilary; did you mean auxiliary\?"),
        (("EMOv2-1M",), {"to_dict": 1}, r"has no to_dict; it has activations"),
        (("EMOv2-1M",), {"id2label": ["a"]}, r"num_labels=1 is not a whole number from 2"),
        (("EMOv2-1M", "pspnet", 7), {"id2label": ["a", "b"]}, r"num_classes=7, and id2label has 2 names"),
        (("EMOv2-1M",), {"dropout": 1.0}, r"dropout=1.0 is not a number from 0 and below 1"),
        (("EMOv2-1M",), {"head_channels": 0}, r"head_channels=0 is not None or a whole number"),
        (("EMOv2-1M",), {"window_size": 0}, r"window_size=0 is not a whole number from 1"),
        (("EMOv2-1M",), {"auxiliary": "no"}, r"auxiliary='no' is not None or True or False"),
        (("EMOv2-1M",), {"image_mean": [0.5]}, r"image_mean=\[0.5\] has 1 values; pass one a channel, 3"),
        (("EMOv2-1M",), {"image_std": [0.0]}, r"image_std=\[0.0\] is not None or a list"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_refused_in_one_line(arguments, options, message):
    with pytest.raises(ValueError, match=message) as refusal:
        on_meta(*arguments, **options)
    assert "\n" not in str(refusal.value)


def test_what_the_published_optimizer_leaves_out_of_weight_decay_are_the_backbones_norms():
    """Names with "norm"; the heads' BatchNorms decay, and what learns ten times as fast is in `decode_head`."""
    for head in HEADS:
        model = on_meta("EMOv2-1M", head)
        norms = torch.nn.BatchNorm2d | torch.nn.LayerNorm
        within = [f"backbone.{name}" for name, module in model.backbone.named_modules() if isinstance(module, norms)]
        expected = {f"{name}.{part}" for name in within for part in ("weight", "bias")}
        assert {name for name, _ in model.named_parameters() if "norm" in name} == expected
        parts = {name.split(".")[0] for name, _ in model.named_parameters()}
        assert parts - {"neck", "auxiliary_head"} == {"backbone", "decode_head"}


def test_more_classes_than_255_take_another_ignored_label():
    model = on_meta("EMOv2-1M", "pspnet", 300, semantic_loss_ignore_index=-100)
    assert model.config.num_labels == 300 and model.config.semantic_loss_ignore_index == -100


def test_patterns_of_names_are_strings():
    with pytest.raises(ValueError, match="pattern=3 is a int"):
        list_segmenters(3)


# ---- trained classifiers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier's folder, and the classifier."""
    folder = tmp_path_factory.mktemp("classifier")
    model = randomize(EMOv2ForImageClassification(EMOv2Config(**{**TINY, "window_size": 7}, num_labels=4))).eval()
    model.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("head", ["pspnet", "segformer"])
def test_a_trained_classifier_goes_under_a_head(trained, head):
    folder, classifier = trained
    model = create_segmenter(folder, head, 5).eval()
    config = model.backbone.config
    assert (config.window_size, config.clip_window, config.widths) == (10, False, TINY["widths"])
    assert model.config.num_labels == 5 and config.num_labels == 2  # the classifier's classes stay behind
    own = EMOv2Backbone.from_pretrained(folder, out_features=["stage1", "stage4"]).state_dict()
    torch.testing.assert_close(model.backbone.state_dict(), own)
    assert not any(".head." in name or "emov2.norm" in name for name in model.state_dict())
    same = create_segmenter(str(folder), head, 5, window_size=7).eval()
    with torch.no_grad():
        stages = same(pixels(), output_hidden_states=True).hidden_states
        torch.testing.assert_close(list(stages), classifier.emov2.forward_stages(pixels()))


def test_the_head_is_fresh_and_small(trained):
    folder, _ = trained
    head = create_segmenter(folder, "pspnet", 5).decode_head.requires_grad_(False)
    assert 0.005 < head.classifier.weight.std() < 0.02 and not head.classifier.bias.any()
    assert head.bottleneck.bn.weight.eq(1).all()
    fan_out = head.bottleneck.conv.weight[:, 0].numel()
    assert head.bottleneck.conv.weight.std() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_the_published_size_of_a_folder_is_recognised(tmp_path):
    config = EMOv2Config.of("EMOv2-1M", image_size=256, drop_path=0.3, num_labels=2)
    EMOv2ForImageClassification(config).save_pretrained(tmp_path)
    model = create_segmenter(tmp_path, "segformer")
    assert count(model) == PUBLISHED["segformer", "1M"][0]
    assert (model.backbone.config.drop_path, model.backbone.config.window_size) == (0.04036, 10)


def test_pictures_are_normalised_as_the_classifiers_were(trained, tmp_path):
    _, classifier = trained
    BitImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    classifier.save_pretrained(tmp_path)
    processor = create_segmenter(tmp_path, "pspnet", 5).make_image_processor()
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and list(processor.image_std) == [0.4, 0.5, 0.6]
    assert list(create_segmenter(tmp_path, image_mean=[0.5] * 3).make_image_processor().image_mean) == [0.5] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_channels": 1}, r"num_channels=1 does not fit the weights of .*, which has 3; leave it out"),
        ({"depths": (1, 1, 1, 1)}, r"depths=\(1, 1, 1, 1\) does not fit the weights"),
        ({"layer_scale": None}, r"layer_scale=None does not fit the weights"),
    ],
)
def test_a_folder_refuses_another_network(trained, options, message):
    with pytest.raises(ValueError, match=message):
        create_segmenter(trained[0], **options)


def test_other_folders_are_refused(trained, tmp_path, offline):
    with pytest.raises(ValueError, match=r"backbone='.*' does not load as an EMOv2 \(.*; pass a folder or Hub id of a"):
        create_segmenter(tmp_path)
    with pytest.raises(
        ValueError, match=r"backbone='some/body' does not load as an EMOv2 \(.*; pass a folder or Hub id"
    ):
        create_segmenter("some/body")
    create_segmenter(trained[0], "pspnet", 5).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a model of the type 'emov2_segmentation'\); pass a folder"):
        create_segmenter(tmp_path)
    (trained[0] / "model.safetensors").rename(tmp_path / "model.safetensors")
    try:
        with pytest.raises(ValueError, match=r"does not load as an EMOv2 \(.*no file") as refusal:
            create_segmenter(trained[0])
        assert "\n" not in str(refusal.value)
    finally:
        (tmp_path / "model.safetensors").rename(trained[0] / "model.safetensors")
