"""U-EMOv2 and the plain UNet as segmenters: by name, in transformers' classes, in training, on images of any size."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.paths import ROOT
from helpers.segmenters import awake
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

from d_emo import (
    UEMOv2Config,
    UEMOv2ForSemanticSegmentation,
    create_segmenter,
    list_segmenters,
    predict_in_windows,
)
from d_emo.models.flops import count_macs_as_published, count_parameters

NAMES = ("U-EMOv2-5M", "UNet-S5-D16")
SMALL = {"base_channels": 4, "head_dim": 4}


def small(name: str = "U-EMOv2-5M", **changes) -> UEMOv2ForSemanticSegmentation:
    return awake(create_segmenter(name, num_classes=2, **{**SMALL, **changes})).eval()


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def vessels(*shape: int) -> torch.Tensor:
    return torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "parameters", "without_auxiliary", "products", "norms"),
    [  # ../shared/golden/dense_expected.csv, 256 x 256
        ("U-EMOv2-5M", 21_397_156, 21_323_170, 56_619_172_864, 308_412_448),
        ("UNet-S5-D16", 29_064_996, 28_991_010, 50_799_313_920, 90_177_568),
    ],
)
def test_parameters_and_multiply_adds_are_the_published_ones(name, parameters, without_auxiliary, products, norms):
    with torch.device("meta"):
        model = create_segmenter(name, num_classes=2)
        plain = create_segmenter(name, num_classes=2, auxiliary=False)
        image = torch.empty(1, 3, 256, 256)
    assert (count_parameters(model), count_parameters(plain)) == (parameters, without_auxiliary)
    assert count_parameters(model.decode_head) == 41_442
    assert count_parameters(model.auxiliary_head) == 73_986
    counted = count_macs_as_published(plain, image)
    assert (counted.products, counted.norms) == (products, norms)


def test_windows_of_10_change_no_parameter_and_cost_what_the_published_file_would():
    with torch.device("meta"):
        model = create_segmenter("U-EMOv2-5M", num_classes=2, window_size=10, auxiliary=False)
        counted = count_macs_as_published(model, torch.empty(1, 3, 256, 256)).products
    assert (count_parameters(model), counted) == (21_323_170, 71_117_630_464)


def test_both_are_listed():
    assert list_segmenters("U*") == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 32, 48), (1, 16, 16), (5, 64, 16)])
def test_logits_have_the_images_size(name, channels, height, width):
    with torch.no_grad():
        output = small(name, num_channels=channels)(pixels(2, channels, height, width), output_hidden_states=True)
    assert output.logits.shape == (2, 2, height, width) and output.loss is None
    assert (output.logits[0] - output.logits[1]).std() > 1e-2 * output.logits.std()
    assert [tuple(state.shape[1:]) for state in output.hidden_states] == [
        (4 * s, height // s, width // s) for s in (16, 8, 4, 2, 1)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_training_adds_four_tenths_of_the_auxiliary_heads_loss(name):
    model, image, labels = small(name, dropout=0.0).train(), pixels(2, 3, 32, 32), vessels(2, 32, 32)
    labels[0, :4] = 255
    loss = model(image, labels=labels).loss
    *_, second, finest = model.backbone(image)  # in training, where BatchNorm sees the batch alone
    auxiliary = F.interpolate(model.auxiliary_head(second), (32, 32), mode="bilinear")
    expected = F.cross_entropy(model.decode_head(finest), labels, ignore_index=255)
    expected = expected + 0.4 * F.cross_entropy(auxiliary, labels, ignore_index=255)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    model = small(name).train()
    model(pixels(2, 3, 32, 32), labels=vessels(2, 32, 32)).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_neither_gradients_nor_statistics(name):
    results = []
    for again in (False, True):
        model = small(name, dropout=0.0).train()
        if again:
            # Its newer name is not in the oldest transformers that d_emo runs with.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model(pixels(2, 3, 32, 32), labels=vessels(2, 32, 32)).loss.backward()
        results.append([*(parameter.grad for parameter in model.parameters()), *model.buffers()])
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_folder_gives_the_same_logits_by_every_interface(name, tmp_path):
    model, image = small(name, id2label=["background", "vessel"], window_size=5), pixels(1, 3, 48, 32)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, UEMOv2Config) and (config.window_size, config.id2label[1]) == (5, "vessel")
    with torch.no_grad():
        logits = model(image).logits
        for kind in (AutoModelForSemanticSegmentation, UEMOv2ForSemanticSegmentation):
            loaded = kind.from_pretrained(tmp_path)
            assert isinstance(loaded, UEMOv2ForSemanticSegmentation) and not loaded.training
            torch.testing.assert_close(loaded(image).logits, logits, atol=0, rtol=0)


def test_a_picture_goes_through_the_pipeline_at_its_own_size(tmp_path):
    small(id2label=["background", "vessel"], image_size=64).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    picture = Image.effect_noise((90, 70), 80).convert("RGB")
    assert processor(picture, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    assert processor(picture, do_resize=False, return_tensors="pt")["pixel_values"].shape == (1, 3, 70, 90)
    segments = pipeline("image-segmentation", str(tmp_path))(picture)
    assert {segment["label"] for segment in segments} <= {"background", "vessel"}
    assert all(segment["mask"].size == (90, 70) for segment in segments)


def test_the_published_image_processor_is_of_256_pixels(tmp_path):
    create_segmenter("UNet-S5-D16", num_classes=2, **SMALL).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["size"] == {"height": 256, "width": 256}


@pytest.mark.parametrize("change", ["missing", "left over", "shape"])
def test_half_a_network_is_refused(change, tmp_path):
    small().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "backbone.decoder.3.pair.blocks.1.i2rmb.proj_out.weight"
    if change == "missing":
        del state[name]
    elif change == "left over":
        state["backbone.more.weight"] = state[name].clone()
    else:
        state[name] = state[name][:2].clone()
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"proj_out|backbone\.more") as raised:
        UEMOv2ForSemanticSegmentation.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_plain_unets_weights_do_not_become_half_a_u_emov2(tmp_path):
    small("UNet-S5-D16").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="weights"):
        UEMOv2ForSemanticSegmentation.from_pretrained(tmp_path, config=UEMOv2Config(num_labels=2, **SMALL))


@torch.no_grad()
def test_a_folder_loads_without_the_auxiliary_head_and_with_other_windows(tmp_path):
    model, image = small(), pixels(1, 3, 64, 64)
    model.save_pretrained(tmp_path)
    lean = UEMOv2ForSemanticSegmentation.from_pretrained(tmp_path, auxiliary=False)
    assert lean.auxiliary_head is None
    torch.testing.assert_close(lean(image).logits, model(image).logits, atol=0, rtol=0)
    other = UEMOv2ForSemanticSegmentation.from_pretrained(tmp_path, window_size=10)
    torch.testing.assert_close(other.state_dict(), model.state_dict(), atol=0, rtol=0)
    assert (other(image).logits - model(image).logits).abs().max() > 1e-2


def test_another_number_of_classes_makes_new_classifiers_alone(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="newly initialised"):
        other = UEMOv2ForSemanticSegmentation.from_pretrained(tmp_path, num_labels=3, ignore_mismatched_sizes=True)
    assert other.decode_head.classifier.out_channels == 3
    new = {"decode_head.classifier.", "auxiliary_head.classifier."}
    for name, tensor in other.state_dict().items():
        if not any(name.startswith(prefix) for prefix in new):
            torch.testing.assert_close(tensor, model.state_dict()[name], atol=0, rtol=0)


@torch.no_grad()
def test_convolutions_start_kaiming_normal_and_norms_at_one():
    torch.manual_seed(0)
    model = create_segmenter("U-EMOv2-5M", num_classes=2, base_channels=32, depth=3)
    for name, module in model.backbone.named_modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()
        elif isinstance(module, nn.Conv2d):
            outputs = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std() == pytest.approx((2 / outputs) ** 0.5, rel=0.1), name
        elif name.endswith("to_qkv"):
            channels = module.in_features
            queries_keys, values = module.weight.split((2 * channels, 2 * channels))
            for part in (queries_keys, values):
                assert part.std() == pytest.approx((2 / (2 * channels)) ** 0.5, rel=0.1), name
            assert (module.bias == 0).all()
        elif name.endswith("proj_out"):
            assert module.weight.std() == pytest.approx((2 / module.out_features) ** 0.5, rel=0.1), name
    assert all((scale == 1e-6).all() for name, scale in model.named_parameters() if name.endswith("layer_scale"))
    assert model.decode_head.classifier.weight.std() == pytest.approx(0.01, rel=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_images_of_any_size_are_predicted_in_windows(name):
    model, image = small(name), pixels(1, 3, 45, 71)
    logits = predict_in_windows(model, image, window=32, stride=21)
    assert logits.shape == (1, 2, 45, 71)
    with torch.no_grad():  # a corner that one window alone sees
        corner = model(image[:, :, :32, :32]).logits[:, :, :13, :20]
    torch.testing.assert_close(logits[:, :, :13, :20], corner, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_gives_nearly_the_same_logits(name):
    image, model = pixels(1, 3, 32, 32), small(name)
    with torch.no_grad():
        exact = model(image).logits
        rounded = model.bfloat16()(image.bfloat16()).logits
    assert rounded.dtype == torch.bfloat16
    assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("shape", "training", "message"),
    [
        ((1, 3, 40, 32), False, "images of 40 x 32 have sides that are no multiples of 16; .*predict_in_windows"),
        ((1, 3, 8, 8), False, "images of 8 x 8 have sides that are no multiples of 16"),
        ((1, 1, 32, 32), False, "pixel_values have 1 channels, the model takes 3"),
        ((3, 32, 32), False, r"for one image pass pixel_values\[None\]"),
        ((1, 3, 32, 32), True, "single value"),
        ((1, 3, 16, 16), True, "single value"),
    ],
)
def test_images_that_do_not_fit_are_refused_in_one_line(name, shape, training, message):
    with pytest.raises(ValueError, match=message) as raised:
        small(name).train(training)(pixels(*shape))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "segformer"}, "head='segformer'"),
        ({"head": "nonsense"}, "head='nonsense'"),
        ({"num_classes": 1}, "num_classes=1 is not a whole number from 2"),
        ({"num_classes": 3, "id2label": ["background", "vessel"]}, "num_classes=3, and id2label has 2 names"),
        ({"windowsize": 8}, "has no windowsize; did you mean window_size"),
        ({"in_channels": 1}, "has no in_channels; did you mean num_channels"),
        ({"window_size": 0}, "window_size=0 is not"),
        ({"head_dim": 48}, "head_dim=48 cuts 64 channels"),
        ({"block": "resnet"}, "block='resnet' is not one of i2rmb, conv"),
        ({"image_size": 250}, "image_size=250 is no multiple of 16"),
        ({"base_channels": 60_000}, "make more than 1e.10 parameters"),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        create_segmenter("U-EMOv2-5M", **{"num_classes": 2, **options})
    assert "\n" not in str(raised.value)


def test_the_documents_example_of_windows_runs(tmp_path, monkeypatch):
    document = (ROOT / "docs" / "dense.md").read_text()
    code = re.search(r"## U-EMOv2\n\n```python\n(.*?)```", document, flags=re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((270, 80), 80).convert("RGB").save("fundus.jpg")
    found = {}
    exec(code.replace('"U-EMOv2-5M", ', '"U-EMOv2-5M", base_channels=4, head_dim=4, '), found)
    assert found["vessels"].shape == (1, 80, 270) and found["model"].config.base_channels == 4


@pytest.mark.parametrize("name", [pytest.param(NAMES[0], marks=pytest.mark.slow), NAMES[1]])
def test_torch_export_takes_it(name):
    model, image = small(name, depth=2), pixels(2, 3, 32, 48)
    program = torch.export.export(model, (image,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image).logits, model(image).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_parts_on_several_devices_give_the_same(name, tmp_path):
    model, image = small(name), pixels(1, 3, 32, 32)
    model.save_pretrained(tmp_path)
    places = {"backbone": "cpu", "auxiliary_head": "cpu", "decode_head": "disk"}
    split = UEMOv2ForSemanticSegmentation.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offloaded"
    )
    with torch.no_grad():
        torch.testing.assert_close(split(image).logits, model(image).logits, atol=1e-5, rtol=1e-5)
