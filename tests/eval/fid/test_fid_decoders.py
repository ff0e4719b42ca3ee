"""Which decoder a score is drawn with: the model's own, another of the same latents, never one of others."""

import argparse
import json

import pytest
import torch
from accelerate import Accelerator
from helpers.autoencoders import CONFIGS, tiny_autoencoder
from helpers.models import tiny_model
from helpers.pipelines import dit_scheduler

from d_emo import DEMOPipeline
from d_emo.eval.fid import command
from d_emo.eval.fid.protocol import SD_LATENTS, SamplingSettings, preset_changes
from d_emo.eval.fid.sampling import ManifestError, apply_settings, image_shape, make_manifest, sample_images
from d_emo.images.autoencoders import latent_space

SETTINGS = SamplingSettings(num_images=3, steps=3, sampler="ddpm")


def pipeline_around(name):
    vae = tiny_autoencoder(name)
    space = latent_space(vae)
    model = tiny_model(in_channels=space.channels, sample_size=32 // space.factor, num_classes=3,
                       patch_size=1 if space.factor == 16 else 2)  # fmt: skip
    pipeline = DEMOPipeline(model, dit_scheduler(), vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", CONFIGS)
def test_samples_of_every_autoencoder_are_drawn_and_do_not_depend_on_their_batch(name, tmp_path):
    pipeline, accelerator = pipeline_around(name), Accelerator(cpu=True)
    assert image_shape(pipeline) == (32, 32, 3)
    first, other = (sample_images(pipeline, SETTINGS, tmp_path / str(batch), accelerator, batch) for batch in (1, 3))
    assert first.shape == (3, 32, 32, 3)
    difference = abs(first.read(0, 3).astype(int) - other.read(0, 3).astype(int))
    assert difference.max() <= 1 and first.read(0, 3).std() > 5


def test_a_decoder_of_other_latents_is_refused_by_name(tmp_path):
    for name in CONFIGS:
        tiny_autoencoder(name).save_pretrained(tmp_path / name)
    tiny_autoencoder("AutoencoderKL", seed=1).save_pretrained(tmp_path / "twin")
    pipeline = pipeline_around("AutoencoderKL")
    for name in CONFIGS:
        if name != "AutoencoderKL":
            with pytest.raises(ValueError, match=r"--vae .* is another autoencoder .* -> .*; leave --vae out"):
                apply_settings(pipeline, "", SamplingSettings(vae=str(tmp_path / name), sampler="ddim"))
    own = pipeline.vae.decoder.conv_in.weight
    apply_settings(pipeline, "", SamplingSettings(vae=str(tmp_path / "twin"), sampler="ddim"))
    assert not torch.equal(pipeline.vae.decoder.conv_in.weight, own)


def options(**given):
    empty = dict.fromkeys((*command.SETTINGS, "preset"))
    return argparse.Namespace(**{**empty, "num_images": 3, **given})


@pytest.mark.parametrize("name", ["AutoencoderRAE", "AutoencoderKL"])
def test_a_presets_decoder_is_left_out_for_models_of_other_latents_and_the_score_says_so(name, tmp_path, offline):
    pipeline_around(name).save_pretrained(tmp_path)
    preset, settings, pipeline = command.prepare(str(tmp_path), options(preset="dit-400k"))
    assert settings.vae is None and type(pipeline.vae).__name__ == name
    assert "vae: stabilityai/sd-vae-ft-mse -> None" in preset_changes(settings, preset)
    with pytest.raises(ValueError, match=r"--vae .*neither a VAE folder nor"):
        command.prepare(str(tmp_path), options(preset="dit-400k", vae="nowhere"))


def test_a_presets_decoder_goes_with_models_of_its_latents(tmp_path, monkeypatch):
    layout = {"block_out_channels": (8,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
              "up_block_types": ("UpDecoderBlock2D",) * 4, "scaling_factor": 0.18215, "shift_factor": None}  # fmt: skip
    own, mse = (tiny_autoencoder("AutoencoderKL", seed=seed, **layout) for seed in (0, 1))
    assert not SD_LATENTS.differences(latent_space(own))
    DEMOPipeline(tiny_model(sample_size=4, num_classes=3), dit_scheduler(), vae=own).save_pretrained(tmp_path / "model")
    mse.save_pretrained(tmp_path / "stabilityai" / "sd-vae-ft-mse")
    monkeypatch.chdir(tmp_path)
    preset, settings, pipeline = command.prepare(str(tmp_path / "model"), options(preset="dit-400k"))
    assert not preset_changes(settings, preset)
    torch.testing.assert_close(pipeline.vae.state_dict(), mse.state_dict())


def test_samples_say_which_latents_they_were_drawn_from(tmp_path):
    pipeline, accelerator = pipeline_around("AutoencoderDC"), Accelerator(cpu=True)
    assert make_manifest(pipeline, SETTINGS)["latent_space"]["autoencoder"] == "AutoencoderDC"
    sample_images(pipeline, SETTINGS, tmp_path, accelerator, 3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    pipeline.register_to_config(latent_space={**pipeline.config.latent_space, "std": (0.5,), "measured_on": "digits"})
    with pytest.raises(ManifestError, match=r"latent_space.measured_on '' -> 'digits'; latent_space.std"):
        sample_images(pipeline, SETTINGS, tmp_path, accelerator, 3)
    pipeline.transformer.register_to_config(norm_eps=1e-3)  # the same weights, another network
    with pytest.raises(ManifestError, match=r"transformer_config.norm_eps 1e-06 -> 0.001"):
        sample_images(pipeline, SETTINGS, tmp_path, accelerator, 3)
    # Samples of before there was more than one class of autoencoder.
    del manifest["latent_space"], manifest["transformer_config"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert len(sample_images(pipeline, SETTINGS, tmp_path, accelerator, 3)) == 3
