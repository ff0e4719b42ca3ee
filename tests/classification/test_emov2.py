"""The classification backbones: published outputs, counts, interfaces, import."""

import json

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from helpers.golden import golden, seeded_input, seeded_state
from helpers.models import randomize
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoBackbone, AutoImageProcessor, AutoModelForImageClassification, pipeline

import d_emo.timm_models  # noqa: F401
from d_emo import EMOv2Backbone, EMOv2Config, EMOv2ForImageClassification, create_classifier, list_classifiers
from d_emo.classification.published import import_classifier, published_state
from d_emo.classification.transformers_models import make_image_processor
from d_emo.kernels import use_backend
from d_emo.kernels.reference import Windows
from d_emo.models.flops import count_parameters
from d_emo.train import convert_emov2

GOLDEN = {"emov2_1m_224": "EMOv2-1M", "emov2_5m_224": "EMOv2-5M", "emov1_1m_224": "EMOv1-1M"}
# ../shared/reference/paper_tables.md: parameters, and millions of multiply-adds of products and convolutions at 224.
EXACT = {
    "EMOv2-1M": (1_460_844, 279.9),
    "EMOv2-2M": (2_384_312, 480.8),
    "EMOv2-5M": (5_126_440, 1025.1),
    "EMOv2-20M": (20_195_208, 3997.0),
    "EMOv2-50M": (49_815_560, 8767.3),
    "EMOv1-1M": (1_361_168, 255.2),
    "EMOv1-2M": (2_377_472, 431.9),
    "EMOv1-5M": (5_108_848, 892.2),
}


@pytest.fixture(scope="module")
def published():
    """A published EMOv2-1M: its state dictionary, a model that holds it, and what the published code gave."""
    expected = golden("emov2_1m_224")
    state = seeded_state(expected["shapes"])
    model = create_classifier("EMOv2-1M").eval()
    import_classifier(state, model)
    return state, model, expected


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", GOLDEN)
def test_published_outputs_to_1e_4(name, backend):
    expected = golden(name)
    model = create_classifier(GOLDEN[name]).eval()
    import_classifier(seeded_state(expected["shapes"]), model)
    pixels = seeded_input(expected["input_seed"], tuple(expected["input_shape"]))
    with torch.no_grad(), use_backend(backend):
        logits, stages = model(pixels), model.forward_stages(pixels)
    torch.testing.assert_close(logits[:, :16], torch.tensor(expected["logits_first_16"]), atol=1e-4, rtol=0)
    assert logits.mean().item() == pytest.approx(expected["logits_mean"], abs=1e-4)
    assert logits.std().item() == pytest.approx(expected["logits_std"], abs=1e-4)
    assert logits.topk(5).indices.tolist() == expected["top5"]
    for number, stage in enumerate(stages):
        assert list(stage.shape) == expected["stage_shapes"][f"stage{number}"]
        assert stage.mean().item() == pytest.approx(expected["stage_mean"][f"stage{number}"], abs=1e-4)
        assert stage.std().item() == pytest.approx(expected["stage_std"][f"stage{number}"], abs=1e-4)


def macs(model, side=224) -> float:
    """Millions of multiply-adds of products and convolutions for an image."""
    counter = FlopCounterMode(display=False)
    with use_backend("reference"), counter, torch.no_grad():
        model.eval()(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() / 2e6


@pytest.fixture
def windows_counted_twice(monkeypatch):
    """As in the published code: a grid that is one window is attended to twice. Here it is done once, and doubled."""

    def of(attention_type, dim, num_heads, window, grid):
        return Windows(dim, num_heads, *window, int(attention_type != "remote"), int(attention_type != "neighborhood"))

    monkeypatch.setattr(Windows, "of", of)


@pytest.mark.parametrize(("name", "expected"), EXACT.items())
def test_counts_are_the_published_ones(name, expected, windows_counted_twice):
    parameters, published_macs = expected
    model = create_classifier(name)
    assert count_parameters(model) == parameters
    assert macs(model) == pytest.approx(published_macs, rel=1e-3)


@pytest.mark.parametrize(("side", "expected"), [(256, 1393.5), (512, 5573.2)])
def test_other_resolutions_count_as_published(side, expected, windows_counted_twice):
    assert macs(create_classifier("EMOv2-5M", image_size=side), side) == pytest.approx(expected, rel=1e-3)


def test_the_largest_emov1_has_nearly_the_published_size():
    """20.5M in the paper's table; its exact definition was not published with it."""
    assert count_parameters(create_classifier("EMOv1-20M")) == pytest.approx(20.5e6, rel=0.02)


@pytest.mark.parametrize("name", list_classifiers())
def test_every_size_learns_in_all_its_parameters(name):
    scale = 1.0 if "v2" in name else None
    model = randomize(create_classifier(name, num_classes=3, layer_scale=scale, drop_path=0.0)).train()
    model(torch.randn(2, 3, 64, 64)).logsumexp(-1).sum().backward()
    without = [key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    # A bias before BatchNorm, or of keys before a softmax, changes nothing; rounding decides whether it is zero.
    assert [key for key in without if key != "stem.conv.bias"] == []


@pytest.mark.parametrize("side", [(224, 224), (200, 264), (33, 47)])
def test_any_image_size_runs_and_gradients_flow(side):
    model = create_classifier("EMOv2-1M", num_classes=3)
    pixels = torch.randn(2, 3, *side, requires_grad=True)
    model(pixels).sum().backward()
    assert pixels.grad is not None and torch.isfinite(pixels.grad).all() and pixels.grad.any()


def test_the_head_is_apart_and_can_be_replaced():
    model = create_classifier("EMOv2-1M").eval()
    pixels = torch.randn(1, 3, 64, 64)
    features = model.forward_features(pixels)
    assert features.shape == (1, 180, 2, 2)
    torch.testing.assert_close(model.forward_head(features), model(pixels))
    assert model.forward_head(features, pre_logits=True).shape == (1, 180)
    model.reset_classifier(5)
    assert model(pixels).shape == (1, 5)
    model.reset_classifier(0)
    assert model(pixels).shape == (1, 180)


def test_stochastic_depth_drops_whole_branches_in_training_only():
    model = create_classifier("EMOv2-1M", num_classes=3, drop_path=0.9, layer_scale=1.0)
    rates = [block.drop_path.probability for stage in model.stages for block in stage.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.9) and rates == sorted(rates)
    pixels = torch.randn(2, 3, 64, 64)
    model.eval()
    torch.testing.assert_close(model(pixels), model(pixels))
    drop = model.stages[3].blocks[-1].drop_path.train()
    seen = torch.cat([drop(torch.ones(100, 1, 1, 1)) for _ in range(20)]).flatten()
    assert set(seen.round(decimals=3).tolist()) == {0.0, 10.0} and seen.mean().item() == pytest.approx(1, abs=0.3)


def test_unknown_names_and_values_are_refused():
    with pytest.raises(ValueError, match=r"classifier 'EMOv2-6M' is unknown; did you mean EMOv2-5M"):
        create_classifier("EMOv2-6M")
    for overrides, message in (
        ({"version": 3}, "EMOv2: version=3 is not one of 1, 2"),
        ({"attention_type": "global"}, "attention_type='global' is not one of none"),
        ({"widths": (32, 48)}, r"widths=\[32, 48\] has 2 entries, depths has 4"),
        ({"local": "dense"}, "local='dense' is not one of"),
        ({"kernel_sizes": (5, 4, 5, 5)}, r"kernel_sizes=\(5, 4, 5, 5\) is not a list of 1 to 8 values, each an odd"),
        ({"activations": ("relu",) * 4}, r"activations=\('relu', .* each one of gelu, silu"),
    ):
        with pytest.raises(ValueError, match=message):
            create_classifier("EMOv2-5M", **overrides)


# ---- transformers and timm -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    """A saved classifier with its processor."""
    path = tmp_path_factory.mktemp("emov2")
    model = EMOv2ForImageClassification(EMOv2Config.of("EMOv2-1M", num_labels=1000))
    model.emov2.load_state_dict(published[1].state_dict())
    model.save_pretrained(path)
    make_image_processor(224).save_pretrained(path)
    return path


def test_auto_classes_load_what_was_saved(published, folder):
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert isinstance(model, EMOv2ForImageClassification) and not model.training
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        output = model(pixel_values=pixels, labels=torch.tensor([1, 2]), output_hidden_states=True)
        torch.testing.assert_close(output.logits, published[1](pixels))
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([1, 2]))
    torch.testing.assert_close(output.loss, expected)
    assert len(output.hidden_states) == 5


def test_an_image_goes_through_the_pipeline_offline(published, folder):
    classify = pipeline("image-classification", model=str(folder))
    picture = PIL.Image.fromarray(np.random.RandomState(0).randint(0, 255, (300, 280, 3), dtype=np.uint8))
    found = classify(picture, top_k=3)
    pixels = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        best = published[1](pixels).softmax(-1)[0].topk(3)
    assert [entry["label"] for entry in found] == [f"LABEL_{index}" for index in best.indices.tolist()]
    assert [entry["score"] for entry in found] == pytest.approx(best.values.tolist(), abs=2e-3)


@pytest.mark.parametrize("side", [224, 512])
def test_the_processor_is_torchvisions_evaluation_transform(side):
    from torchvision import transforms

    picture = PIL.Image.fromarray(np.random.RandomState(0).randint(0, 255, (611, 700, 3), dtype=np.uint8))
    reference = transforms.Compose([
        transforms.Resize(round(side / 0.875), interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(side),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])  # fmt: skip
    found = make_image_processor(side)(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(found, reference(picture), atol=1e-5, rtol=0)


def test_a_backbone_takes_a_classifiers_weights(published, folder):
    backbone = EMOv2Backbone.from_pretrained(folder, out_features=["stage1", "stage4"]).eval()
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        maps, stages = backbone(pixels).feature_maps, published[1].forward_stages(pixels)
    assert backbone.channels == [32, 180] and backbone.out_feature_channels["stage2"] == 48
    torch.testing.assert_close(maps[0], stages[1])
    torch.testing.assert_close(maps[1], stages[4])
    assert isinstance(AutoBackbone.from_config(EMOv2Config.of("EMOv2-1M")), EMOv2Backbone)


def test_a_fresh_model_is_initialised_as_the_network_is():
    torch.manual_seed(0)
    model = EMOv2ForImageClassification(EMOv2Config.of("EMOv2-5M", num_labels=10))
    assert model.emov2.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.emov2.stages[2].blocks[1].layer_scale.unique().tolist() == pytest.approx([1e-6])
    plain = create_classifier("EMOv2-5M", num_classes=10)
    for (name, a), (_, b) in zip(model.emov2.state_dict().items(), plain.state_dict().items(), strict=True):
        if a.numel() > 2000:
            assert a.std().item() == pytest.approx(b.std().item(), rel=0.2), name
        elif not a.is_floating_point() or a.std() == 0:
            torch.testing.assert_close(a, b, msg=name)


def test_other_classes_get_a_new_head_that_is_initialised(folder):
    model = EMOv2ForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    head = model.emov2.head.weight
    assert head.shape == (3, 180) and 0.01 < head.std().item() < 0.03
    assert model.config.num_labels == 3


def test_timm_creates_classifiers_and_feature_maps():
    assert set(timm.list_models("emov*")) == {name.lower().replace("-", "_") for name in list_classifiers()}
    model = timm.create_model("emov2_1m", num_classes=7, drop_path_rate=0.1)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)
    assert timm.data.resolve_model_data_config(model)["crop_pct"] == 0.875
    for name in ("emov2_5m", "emov1_1m"):
        features = timm.create_model(name, features_only=True, out_indices=(0, 2, 4))
        maps = features(torch.randn(1, 3, 64, 64))
        assert [m.shape[1] for m in maps] == features.feature_info.channels()
        assert [64 // m.shape[2] for m in maps] == features.feature_info.reduction() == [2, 8, 32]


# ---- import --------------------------------------------------------------------------------------------------------


def convert(*arguments):
    convert_emov2.main([str(argument) for argument in arguments])


def test_full_checkpoints_become_folders_that_load(published, tmp_path, capsys):
    state, _, expected = published
    raw = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"net": raw, "net_E": state, "epoch": 300}, tmp_path / "full.pth")
    torch.save(state, tmp_path / "bare.pth")
    convert(tmp_path / "full.pth", "--output-dir", tmp_path / "averaged")
    convert(tmp_path / "full.pth", "--output-dir", tmp_path / "raw", "--weights", "raw")
    convert(tmp_path / "bare.pth", "--output-dir", tmp_path / "bare", "--image-size", 256)
    assert "EMOv2-1M, 1000 classes, averaged weights" in capsys.readouterr().out
    pixels = seeded_input(expected["input_seed"], tuple(expected["input_shape"]))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "averaged")
    with torch.no_grad():
        logits = loaded(pixels).logits
    torch.testing.assert_close(logits[:, :16], torch.tensor(expected["logits_first_16"]), atol=1e-4, rtol=0)
    assert loaded.config.id2label[207] == "golden retriever"
    bias = AutoModelForImageClassification.from_pretrained(tmp_path / "raw").emov2.head.bias
    torch.testing.assert_close(bias, state["head.bias"] + 1)
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    assert config["window_size"] == 8 and config["image_size"] == 256
    assert AutoImageProcessor.from_pretrained(tmp_path / "bare").crop_size["height"] == 256


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.module.", "emov2.", ""])
def test_names_may_have_any_wrappers_prefix(published, tmp_path, prefix):
    own = published[1].state_dict() if prefix == "emov2." else published[0]
    torch.save({"epoch": 3, "state_dict": {prefix + name: tensor for name, tensor in own.items()}}, tmp_path / "w.pth")
    convert(tmp_path / "w.pth", "--output-dir", tmp_path / "out")
    loaded = EMOv2ForImageClassification.from_pretrained(tmp_path / "out").emov2.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in published[1].state_dict().items())


def test_emov1_is_told_by_its_tensors(tmp_path, capsys):
    torch.save(seeded_state(golden("emov1_1m_224")["shapes"]), tmp_path / "v1.pth")
    convert(tmp_path / "v1.pth", "--output-dir", tmp_path / "v1")
    assert "EMOv1-1M" in capsys.readouterr().out
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "v1").config.version == 1


def test_weights_that_do_not_fit_are_refused(published, tmp_path):
    state = published[0]
    for change, message in (
        ({"extra.weight": torch.zeros(1)}, "unknown tensor extra.weight"),
        ({"stage1.0.mystery.weight": torch.zeros(1)}, "unknown tensor stage1.0.mystery.weight"),
    ):
        with pytest.raises(ValueError, match=message):
            published_state({**state, **change})
    short = {name: tensor for name, tensor in state.items() if name != "stage2.0.proj.conv.weight"}
    with pytest.raises(ValueError, match=r"missing \['stages.1.blocks.0.i2rmb.proj_out.weight'\]"):
        import_classifier(short, create_classifier("EMOv2-1M"))
    torch.save(short, tmp_path / "short.pth")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    part = {name: tensor for name, tensor in state.items() if name != "stage3.1.eops.0.v.conv.weight"}
    torch.save(part, tmp_path / "part.pth")
    names = tmp_path / "names.txt"
    names.write_text("a\nb")
    torch.save(state, tmp_path / "good.pth")
    for arguments, message in (
        (("short.pth",), "its tensors fit none of EMOv2-1M"),
        (("other.pth",), "unknown tensor weight"),
        (("absent.pth",), "there is no such file"),
        (("good.pth", "--class-names", names), "2 names for 1000 classes"),
        (("good.pth", "--image-size", 0), "^2$"),  # argparse's code; the line is the parser's
        (("part.pth",), r"stage3.1.eops.0.v.conv.weight is missing among"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert(tmp_path / arguments[0], *arguments[1:], "--output-dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
