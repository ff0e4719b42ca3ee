"""Effective receptive fields: exact on convolutions, and the command on every kind of network."""

import json
import re

import numpy as np
import pytest
import torch
from helpers.classifiers import TINY_NETWORK
from helpers.made import write_classifier, write_pictures
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from d_emo import EMOv2Config, EMOv2ForImageClassification, make_image_processor
from d_emo.common.output import Progress
from d_emo.eval import receptive_field
from d_emo.eval.classification.receptive_fields import SHARES, Field, Network, look, open_branches, smallest_square


def field_of(layers, images=2, side=33, stride=None):
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randn(3, side, side, generator=generator) for _ in range(images)]

    def maps(batch):
        found = []
        for layer in layers:
            found.append(layer(found[-1] if found else batch))
        return found

    return look(Network("layers", "fresh", maps), pixels, stride, Progress(images, "image", shown=False))


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (7, 1), (3, 4)])
def test_the_field_of_a_convolution_is_its_kernel(kernel, dilation):
    reach = dilation * (kernel - 1) // 2
    field = field_of([nn.Conv2d(3, 4, kernel, padding=reach, dilation=dilation)])
    assert field.center == (16, 16) and field.side(1.0) == 2 * reach + 1
    assert torch.count_nonzero(field.contributions) == kernel**2


def test_equal_weights_share_the_field_by_area():
    conv = nn.Conv2d(3, 2, 9, padding=4)
    nn.init.constant_(conv.weight, 0.25)
    field = field_of([conv])
    sides = {share: field.side(share) for share in SHARES}
    # The smallest squares that hold 16.2, 24.3, 40.5 and 80.2 of 81 pixels.
    assert sides == {0.2: 5, 0.3: 5, 0.5: 7, 0.99: 9}
    assert field.area(0.5) == pytest.approx(49 / 33**2)


def test_an_even_grid_is_asked_right_of_its_middle_and_squares_have_even_sides():
    patches = nn.Conv2d(3, 2, 8, stride=8)
    nn.init.constant_(patches.weight, 0.5)
    field = field_of([patches], side=32)
    assert field.grid == (4, 4) and field.center == (19.5, 19.5)
    assert (field.side(1.0), field.side(0.5), field.side(0.01)) == (8, 6, 2)
    assert field.area(1.0) == pytest.approx(1 / 16)


def test_a_stack_of_means_has_the_binomial_field_that_numpy_gives():
    count, side = 12, 33
    means = [nn.AvgPool2d(3, stride=1, padding=1) for _ in range(count)]
    line = np.ones(1)
    for _ in range(count):
        line = np.convolve(line, np.ones(3) / 3)
    padded = np.zeros(side)
    padded[16 - count : 17 + count] = line
    field = field_of(means, side=side)
    expected = torch.from_numpy(np.outer(padded, padded)) * 3  # over the colours
    torch.testing.assert_close(field.contributions, expected, atol=1e-7, rtol=1e-4)
    held = [padded[16 - r : 17 + r].sum() ** 2 for r in range(17)]
    for share in SHARES:
        assert field.side(share) == 2 * next(r for r in range(17) if held[r] >= share) + 1


def test_the_last_map_of_a_stride_is_asked():
    layers = [nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(2)]
    assert [field_of(layers, side=32, stride=stride).grid for stride in (1, 2, 4, None)] == [
        (32, 32), (16, 16), (8, 8), (8, 8)
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"layers has no map of --stride 8; its maps have the strides: 1, 2, 4\.$"):
        field_of(layers, side=32, stride=8)


def test_squares_that_reach_the_border_cover_what_is_inside():
    field = torch.zeros(6, 9)
    field[4, 6] = field[0, 6] = 1
    assert smallest_square(field, (4, 6), 0.5) == 1 and smallest_square(field, (4, 6), 0.51) == 9
    lying = Field(Network("", "", list), (1, 1), field)
    assert lying.center == (2.5, 4) and lying.side(1.0) == 6 and lying.area(1.0) == pytest.approx(36 / 54)


def test_shut_branches_are_opened_and_nothing_else():
    network = nn.ModuleDict({"scale": nn.LayerNorm(4), "other": nn.LayerNorm(4), "conv": nn.Conv2d(1, 4, 1)})
    nn.init.constant_(network["scale"].weight, 1e-6)
    nn.init.constant_(network["other"].weight, 0.7)
    before = network["conv"].weight.clone()
    assert open_branches(network) == "fresh (1 scales set to 1)"
    assert (network["scale"].weight == 1).all() and (network["other"].weight == 0.7).all()
    assert (network["scale"].bias == 0).all() and torch.equal(network["conv"].weight, before)


def test_every_kind_of_network_is_drawn_side_by_side(tmp_path, capsys):
    trained, pictures = write_classifier(tmp_path / "mine"), write_pictures(tmp_path / "pictures", side=48)
    models = ["EMOv2-1M", "EMOv1-1M", "timm:resnet10t", "timm:test_vit", str(trained)]
    output = tmp_path / "erf.png"
    receptive_field.main(["--models", *models, "--image-size", "64", "--images", str(pictures), "--num-images", "2",
                          "--output", str(output)])  # fmt: skip
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| (\S+) \| (.*?) \| (\d+ x \d+) \|.*\d+ px \(\d+\.\d%\) \|$", printed, flags=re.MULTILINE)
    assert [row[0] for row in rows] == models
    assert [row[1].split()[0] for row in rows] == ["fresh"] * 4 + ["trained"]
    assert "the field of an untrained network" in printed and "2 images" in printed
    assert output.read_bytes().startswith(b"\x89PNG")


def test_trained_networks_alone_are_not_called_untrained_and_noise_is_named(tmp_path, capsys):
    trained = str(write_classifier(tmp_path / "mine"))
    receptive_field.main(["--models", trained, "--image-size", "32", "--images", "none", "--num-images", "1",
                          "--stride", "4"])  # fmt: skip
    printed = capsys.readouterr().out
    assert "untrained" not in printed and "1 images (noise) of 32 x 32" in printed and "| 8 x 8 |" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "EMOv2-6M"], "--models: backbone 'EMOv2-6M' is unknown; did you mean EMOv2-5M"),
        (
            ["--models", "EMOv2-1M/segformer"],
            "--models: backbone 'EMOv2-1M/segformer' is unknown; did you mean EMOv2-1M",
        ),
        (["--models", "timm:resnet1"], "--models timm:resnet1: timm does not make it"),
        (["--models", "EMOv2-1M", "--stride", "8", "--images", "nowhere"], "--images nowhere: there is no such folder"),
        (
            ["--models", "timm:test_vit", "--stride", "8", "--image-size", "64"],
            "timm:test_vit has no map of --stride 8",
        ),
        (["--image-size", "16"], "--image-size"),
        (["--num-images", "0"], "--num-images"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, capsys, offline, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        receptive_field.main(arguments)
    line = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.strip()
    assert message in line and "\n" not in line


def saved_by_timm(folder):
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    config = TimmWrapperConfig(architecture="test_resnet", **labels)
    TimmWrapperForImageClassification(config).save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)


def saved_by_transformers(folder):
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    ResNetForImageClassification(ResNetConfig(**sizes)).save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)


@pytest.mark.parametrize("save", [saved_by_timm, saved_by_transformers])
def test_trained_classifiers_of_others_are_looked_at(save, tmp_path, capsys):
    save(tmp_path / "theirs")
    receptive_field.main(["--models", str(tmp_path / "theirs"), "--image-size", "64", "--num-images", "1"])
    assert f"| {tmp_path / 'theirs'} | trained | " in capsys.readouterr().out


def test_networks_without_maps_or_colours_are_refused_in_one_line(tmp_path):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32)).save_pretrained(tmp_path / "vit")
    grey = EMOv2ForImageClassification(EMOv2Config(**json.loads(TINY_NETWORK), image_size=32, num_channels=1))
    grey.save_pretrained(tmp_path / "grey")
    for name in ("vit", "grey"):
        make_image_processor(32).save_pretrained(tmp_path / name)
    refused = {"vit": "has no maps; its maps have the strides: none.", "grey": "takes images of 1 channel"}
    for name, message in refused.items():
        with pytest.raises(SystemExit) as stop:
            receptive_field.main(["--models", str(tmp_path / name), "--image-size", "32", "--num-images", "1"])
        assert message in str(stop.value.code) and "\n" not in str(stop.value.code)
