"""Autoencoders of every class: encoded and decoded as the class itself and Diffusers' pipelines do, opened strictly."""

import dataclasses
import json
import logging

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, UNet2DModel, VQModel
from helpers.autoencoders import CONFIGS, tiny_autoencoder
from safetensors.torch import load_file, save_file

from d_emo.images.autoencoder_kinds import KINDS
from d_emo.images.autoencoders import class_of, doubtful_scale, latent_space, open_vae, space_of
from d_emo.images.latents import decode_latents, draw_latents, encode_images, encode_posterior

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PER_CHANNEL = "AutoencoderKL per channel"
LISTED = ", ".join(KINDS)


def pictures(vae, count=2):
    """Images (count, 3, H, W) in [-1, 1]; wider than high where the class takes that."""
    side = latent_space(vae).output_size
    height, width = (side, side) if side else (16, 24)
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def by_channel(values):
    return torch.tensor(values).view(1, -1, 1, 1)


def patches(latents):
    """As Flux2Pipeline groups latents: (B, C, h, w) -> (B, 4C, h / 2, w / 2)."""
    count, channels, height, width = latents.shape
    blocks = latents.view(count, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    return blocks.reshape(count, 4 * channels, height // 2, width // 2)


def no_patches(latents):
    """The inverse of `patches`."""
    count, channels, height, width = latents.shape
    blocks = latents.view(count, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(count, channels // 4, 2 * height, 2 * width)


def encoded_by_hand(name, vae, images):
    """What models are trained on, by the calls of Diffusers' own pipelines; of a posterior, its mean."""
    if name == "AutoencoderRAE":
        return vae.encode((images + 1) / 2).latent
    if name == "AutoencoderTiny":
        return vae.encode(images).latents * vae.config.scaling_factor
    if name == "AutoencoderDC":
        return vae.encode(images).latent * vae.config.scaling_factor
    mode = vae.encode(images).latent_dist.mode()
    if name == PER_CHANNEL:
        mean, std = by_channel(vae.config.latents_mean), by_channel(vae.config.latents_std)
        return (mode - mean) * vae.config.scaling_factor / std
    if name == "AutoencoderKLFlux2":
        deviation = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        return (patches(mode) - vae.bn.running_mean.view(1, -1, 1, 1)) / deviation
    return (mode - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor


def decoded_by_hand(name, vae, latents, generator):
    """Images of latents as models draw them, in [-1, 1], by the calls of Diffusers' own pipelines."""
    if name == "AutoencoderRAE":
        return vae.decode(latents).sample * 2 - 1
    if name == "ConsistencyDecoderVAE":
        return vae.decode(latents / vae.config.scaling_factor, generator=generator).sample
    if name == PER_CHANNEL:
        mean, std = by_channel(vae.config.latents_mean), by_channel(vae.config.latents_std)
        return vae.decode(latents * std / vae.config.scaling_factor + mean).sample
    if name == "AutoencoderKLFlux2":
        deviation = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
        latents = latents * deviation + vae.bn.running_mean.view(1, -1, 1, 1)
        return vae.decode(no_patches(latents)).sample
    return vae.decode(latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)).sample


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_encoding_and_decoding_are_the_classes_own(name):
    vae = tiny_autoencoder(name)
    space, images = latent_space(vae), pictures(vae)
    latents = encode_images(vae, space, images, torch.zeros(1))
    expected = encoded_by_hand(name, vae, images)
    assert latents.shape == (2, space.channels, images.shape[2] // space.factor, images.shape[3] // space.factor)
    assert expected.std() > 0.05
    torch.testing.assert_close(latents, expected, **CLOSE)
    drawn = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    found = decode_latents(vae, space, drawn, torch.Generator().manual_seed(3))
    expected = decoded_by_hand(name, vae, drawn, torch.Generator().manual_seed(3))
    assert found.shape == images.shape and expected.std() > 0.05
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_latent_is_drawn_of_its_posterior_or_is_the_latent_itself(name):
    vae = tiny_autoencoder(name)
    space, images = latent_space(vae), pictures(vae)
    posterior = encode_posterior(vae, images)
    noise = torch.randn(posterior[:, 0].shape, generator=torch.Generator().manual_seed(4))
    assert posterior.shape[1] == (1 if space.deterministic else 2)
    drawn, mean = draw_latents(space, posterior, noise), draw_latents(space, posterior, torch.zeros(1))
    if space.deterministic:
        torch.testing.assert_close(drawn, mean, atol=0, rtol=0)
        return
    std = torch.tensor(space.std).view(1, -1, 1, 1)
    torch.testing.assert_close((drawn - mean) * std, posterior[:, 1] * noise, **CLOSE)
    assert posterior[:, 1].min() > 0


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_statistics_are_inverted(name):
    space = latent_space(tiny_autoencoder(name))
    latents = torch.randn(2, space.channels, 3, 4, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(space.restored(space.normalized(latents)), latents, **CLOSE)


def test_raes_statistics_may_be_of_every_place(tmp_path):
    """RAE's published statistics are one a channel and place."""
    generator = torch.Generator().manual_seed(6)
    mean, std = (torch.rand(1, 64, 2, 2, generator=generator) + 0.5 for _ in range(2))
    tiny_autoencoder("AutoencoderRAE", latents_mean=mean, latents_std=std).save_pretrained(tmp_path)
    vae = open_vae(str(tmp_path))
    space, images = latent_space(vae), pictures(vae)
    latents = encode_images(vae, space, images, torch.zeros(1))
    with torch.no_grad():
        plain = tiny_autoencoder("AutoencoderRAE", latents_mean=None, latents_std=None)
        raw = plain.encode((images + 1) / 2).latent * (1 + 1e-5)
    torch.testing.assert_close(latents, (raw - mean) / (std + 1e-5), **CLOSE)
    assert space.mean == (0.0,) and space.std == (1.0,)


DESCRIBED = {
    "AutoencoderKL": ((4, 2, False, None, None), "a posterior, normalised by mean 0.3 and deviation 1.429"),
    PER_CHANNEL: ((4, 2, False, None, None), "normalised by values by channel (deviations 1 to 6)"),
    "AutoencoderRAE": (
        (64, 16, True, 28, 32),
        "64 channels, factor 16, takes 28 pixels, gives 32, deterministic, normalised by itself",
    ),
    "AutoencoderDC": ((8, 2, True, None, None), "deterministic, normalised by mean 0 and deviation 2.439"),
    "AutoencoderKLFlux2": ((16, 4, False, None, None), "16 channels, factor 4, a posterior, normalised by values"),
    "AutoencoderTiny": ((4, 2, True, None, None), "deterministic"),
    "AsymmetricAutoencoderKL": ((4, 2, False, None, None), "a posterior"),
    "ConsistencyDecoderVAE": ((4, 2, False, None, None), "a posterior"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_description_says_what_an_autoencoder_does_and_survives_json(name):
    space = latent_space(tiny_autoencoder(name))
    numbers, text = DESCRIBED[name]
    assert (space.channels, space.factor, space.deterministic, space.input_size, space.output_size) == numbers
    assert space.describe().startswith(name.split()[0]) and text in space.describe()
    again = space_of(json.loads(json.dumps(dataclasses.asdict(space))))
    assert again == space and again.differences(space) == []


def test_descriptions_differ_by_class_channels_factor_and_statistics():
    spaces = {name: latent_space(tiny_autoencoder(name)) for name in CONFIGS}
    for one, space in spaces.items():
        for other, theirs in spaces.items():
            assert bool(space.differences(theirs)) == (one != other)
    space = spaces["AutoencoderKL"]
    assert space.differences(spaces[PER_CHANNEL]) == [
        "mean 0.3 -> (0.1, ... 4 values)", "std 1.42857 -> (2, ... 4 values)"
    ]  # fmt: skip
    assert "autoencoder AutoencoderKL -> AutoencoderDC" in space.differences(spaces["AutoencoderDC"])
    half = dataclasses.replace(space, std=(space.std[0] * 1.004,))
    assert not space.differences(half) and space.differences(dataclasses.replace(space, std=(space.std[0] * 1.02,)))
    measured = dataclasses.replace(spaces[PER_CHANNEL], measured_on="digits")
    assert not measured.differences(space) and "measured on digits" in measured.describe()


GIVEN = {"autoencoder": "AutoencoderKL", "channels": 4, "factor": 8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"autoencoder": "VQModel"}, "autoencoder='VQModel'"),
        ({"channels": 0}, "channels=0"),
        ({"factor": 8.5}, "factor=8.5"),
        ({"std": (0.0,)}, "std="),
        ({"std": (1.0, 2.0)}, "std has 2 values, latents have 4 channels"),
        ({"mean": (float("nan"),)}, "mean="),
        ({"pixel_range": (0, 255)}, "pixel_range="),
        ({"deterministic": "yes"}, "deterministic='yes'"),
        ({"measured_on": 3}, "measured_on=3 is not the name"),
        ({"flavour": 1}, "describes no latents"),
    ],
)  # fmt: skip
def test_a_description_is_checked(change, message):
    assert space_of(GIVEN).channels == 4
    with pytest.raises(ValueError, match=message) as refusal:
        space_of({**GIVEN, **change})
    assert "\n" not in str(refusal.value)


def test_sizes_that_an_autoencoder_does_not_make_are_refused_with_one_that_it_does():
    rae, kl = (latent_space(tiny_autoencoder(name)) for name in ("AutoencoderRAE", "AutoencoderKLFlux2"))
    assert (rae.side(32), kl.side(24)) == (2, 6)
    with pytest.raises(ValueError, match="AutoencoderRAE works at 32 pixels only; use 32"):
        rae.side(64)
    with pytest.raises(ValueError, match="not a multiple of 4, the factor of AutoencoderKLFlux2; use 24"):
        kl.side(26)


@torch.no_grad()
@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_opens_as_the_class_that_it_names_and_nothing_is_said(name, tmp_path, caplog):
    vae = tiny_autoencoder(name)
    vae.save_pretrained(tmp_path / "own")
    vae.save_pretrained(tmp_path / "pipeline" / "vae")
    diffusers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        opened = [open_vae(str(tmp_path / folder)) for folder in ("own", "pipeline")]
        half = open_vae(str(tmp_path / "own"), torch.bfloat16)
    diffusers.utils.logging.disable_propagation()
    assert not caplog.records
    assert {type(found) for found in (*opened, half)} == {type(vae)} and not opened[0].training
    space, images = latent_space(vae), pictures(vae)
    for found in opened:
        assert latent_space(found) == space
        torch.testing.assert_close(encode_posterior(found, images), encode_posterior(vae, images), **CLOSE)
    assert half.dtype == torch.bfloat16 and not space.differences(latent_space(half))
    latents = torch.randn(1, space.channels, 2, 2)
    found, whole = (decode_latents(one, space, latents, torch.Generator().manual_seed(0)) for one in (half, vae))
    assert found.dtype == torch.float32 and (found - whole).abs().mean() < 0.1 * whole.abs().mean()


@pytest.mark.parametrize("name", CONFIGS)
def test_no_class_is_filled_with_random_weights(name, tmp_path):
    tiny_autoencoder(name).save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    part = next(key for key in state if "decoder" in key and key.endswith("weight"))
    for wrong, message in (
        ({key: state[key] for key in state if key != part}, f"missing in the file: {part}"),
        ({**state, "more.weight": torch.zeros(1)}, "not in the model: more.weight"),
        ({**state, part: torch.zeros(1)}, "does not load"),
    ):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=message) as refusal:
            open_vae(str(tmp_path))
        assert "\n" not in str(refusal.value)


def others():
    """Folders of what is no autoencoder that models work with."""
    unet = UNet2DModel(8, 3, 3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    return {"VQModel": VQModel(block_out_channels=(8,), norm_num_groups=4), "UNet2DModel": unet}


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    tiny_autoencoder().save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"config.json: its VAE does not load \(it is a file, no folder\)"):
        open_vae(str(tmp_path / "vae" / "config.json"))


def test_a_class_that_is_not_supported_is_refused_with_the_list(tmp_path):
    for name, model in others().items():
        model.save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=f"is a {name}, no autoencoder .* work with: {LISTED}"):
            open_vae(str(tmp_path / name))
        with pytest.raises(ValueError, match=f"'{name}' is no autoencoder .* use {LISTED}"):
            latent_space(model)
    for name, content in {
        "wan": {"_class_name": "AutoencoderKLWan"},
        "dino": {"model_type": "dinov2", "architectures": ["Dinov2Model"]},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"is a AutoencoderKLWan, no autoencoder .*{LISTED}"):
        open_vae(str(tmp_path / "wan"))
    with pytest.raises(ValueError, match=f"is a Dinov2Model of transformers .*, no autoencoder .*{LISTED}"):
        open_vae(str(tmp_path / "dino"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (PER_CHANNEL, {"latents_mean": None}, "one of latents_mean and latents_std"),
        (PER_CHANNEL, {"latents_std": [1.0, 2.0]}, "std has 2 values, latents have 4 channels"),
        (PER_CHANNEL, {"latents_std": [1.0, 2.0, 0.0, 1.0]}, "latents_std="),
        ("AutoencoderKL", {"scaling_factor": 0}, "scaling_factor=0"),
        ("AutoencoderRAE", {"reshape_to_2d": False}, "reshape_to_2d=False"),
        ("AutoencoderRAE", {"encoder_hidden_size": 10**9}, "encoder_hidden_size=1000000000"),
        ("AutoencoderDC", {"scaling_factor": -1}, "scaling_factor=-1"),
        ("AutoencoderTiny", {"upsampling_scaling_factor": 3}, "upsampling_scaling_factor=3"),
        ("AutoencoderKLFlux2", {"batch_norm_eps": 0}, "batch_norm_eps=0"),
        ("AutoencoderKLFlux2", {"patch_size": 2}, "patch_size=2"),
        ("ConsistencyDecoderVAE", {"latent_channels": 8}, "latent_channels=8"),
    ],
)  # fmt: skip
def test_a_configuration_is_in_range_and_agrees_with_itself(name, change, message, tmp_path):
    tiny_autoencoder(name).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as refusal:
        open_vae(str(tmp_path))
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


def test_what_models_cannot_work_on_is_refused_by_name():
    with pytest.raises(ValueError, match="AutoencoderKLFlux2 groups latents by 1 x 2"):
        latent_space(tiny_autoencoder("AutoencoderKLFlux2", patch_size=(1, 2)))
    with pytest.raises(ValueError, match="takes images of 3 channels and gives 1"):
        latent_space(tiny_autoencoder("AutoencoderKL", out_channels=1))
    with pytest.raises(ValueError, match="AutoencoderTiny: it has 2 encoder_block_out_channels and 3 decoder_block"):
        latent_space(
            tiny_autoencoder("AutoencoderTiny", decoder_block_out_channels=(8,) * 3, num_decoder_blocks=(1,) * 3)
        )


def test_only_the_default_scale_beside_a_deviation_a_channel_is_doubted():
    assert not any(doubtful_scale(tiny_autoencoder(name)) for name in CONFIGS)
    text = doubtful_scale(tiny_autoencoder(PER_CHANNEL, scaling_factor=0.18215))
    assert "scaling_factor=0.18215" in text and "deviation of about 0.18." in text and '"scaling_factor": 1.0' in text
    assert not doubtful_scale(tiny_autoencoder("AutoencoderKL", scaling_factor=0.18215))


def test_derived_and_compiled_autoencoders_count_as_their_class():
    class Mine(AutoencoderKL):
        pass

    mine = Mine(**CONFIGS["AutoencoderKL"])
    assert class_of(mine) == class_of(torch.compile(mine)) == "AutoencoderKL"
    assert latent_space(torch.compile(mine)) == latent_space(tiny_autoencoder("AutoencoderKL"))
    assert class_of(tiny_autoencoder("AutoencoderKLFlux2")) == AutoencoderKLFlux2.__name__


def test_an_autoencoder_of_the_hub_is_found_in_a_pipelines_repository(tmp_path, monkeypatch):
    """`black-forest-labs/FLUX.2-dev` and others keep it in `vae/`; the Hub's cache stands for the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, subfolder in (("pipeline", "vae"), ("alone", "")):
        root = tmp_path / f"models--some--{name}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        tiny_autoencoder("AutoencoderKLFlux2").save_pretrained(root / "snapshots" / ("0" * 40) / subfolder)
        assert isinstance(open_vae(f"some/{name}"), AutoencoderKLFlux2)
    with pytest.raises(ValueError, match="some/other: neither a VAE folder nor reachable"):
        open_vae("some/other")
