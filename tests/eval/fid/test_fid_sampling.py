"""Sampling at scale: image i is image i, whatever the batch, the processes or the kills."""

import json
from importlib import metadata

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)
from helpers.pipelines import tiny_pipeline
from helpers.processes import kill_when
from safetensors.torch import save_file

import d_emo
from d_emo import (
    DEMOPipeline,
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchODESolverScheduler,
    FlowMatchSDEHeunScheduler,
)
from d_emo.eval.fid import sampling
from d_emo.eval.fid.protocol import (
    FT_MSE,
    PRESETS,
    SamplingSettings,
    make_sampler,
    preset_changes,
    with_settings,
)
from d_emo.eval.fid.sampling import (
    ManifestError,
    apply_settings,
    load_pipeline,
    sample_images,
    sample_labels,
)
from d_emo.pipelines.samplers import image_generator

FEW = {"steps": 10, "sampler": "fast"}


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(sampling, "SHARD_SIZE", 5)


def draw(pipeline, folder, accelerator, batch_size=4, **settings):
    return sample_images(pipeline, SamplingSettings(**{**FEW, **settings}), folder, accelerator, batch_size)


def sampler(name, pipeline, **settings):
    return make_sampler(SamplingSettings(sampler=name, **settings), pipeline)


def all_images(images):
    return images.read(0, len(images)).astype(int)


# --- what image i is


def test_images_do_not_depend_on_batch_number_or_order(tmp_path, accelerator, small_shards):
    pipeline = tiny_pipeline()
    first = draw(pipeline, tmp_path / "a", accelerator, num_images=13)
    other = draw(pipeline, tmp_path / "b", accelerator, batch_size=3, num_images=7)
    assert len(first) == 13 and first.shape == (13, 16, 16, 3)
    # A batch of another size rounds differently; a grey level at most.
    assert np.abs(all_images(first)[:7] - all_images(other)).max() <= 1
    np.testing.assert_array_equal(first.labels[:7], other.labels)
    # Ancestral noise, too, belongs to the image: the settings' sampler is DDPM here.
    ancestral = [
        all_images(draw(pipeline, tmp_path / f"c{size}", accelerator, size, num_images=6, sampler="ddpm"))
        for size in (6, 2)
    ]
    assert np.abs(ancestral[0] - ancestral[1]).max() <= 1
    assert np.abs(np.diff(ancestral[0], axis=0)).mean() > 5


def test_images_equal_the_pipelines_own_with_the_same_generators(tmp_path, accelerator):
    pipeline = tiny_pipeline(flow=True)
    images = draw(pipeline, tmp_path, accelerator, num_images=3, seed=11, guidance_scale=1.5)
    settings = SamplingSettings(num_images=3, seed=11)
    labels = sample_labels(settings, 3)
    expected = pipeline(
        labels.tolist(), FEW["steps"], 1.5, generator=[image_generator(11, i) for i in range(3)], output_type="np"
    ).images
    assert np.abs(all_images(images) - (expected * 255).round()).max() <= 1
    np.testing.assert_array_equal(images.labels, labels)


def test_generators_differ_between_images_and_seeds():
    draws = {torch.rand(1, generator=image_generator(seed, i)).item() for seed in (0, 1) for i in range(500)}
    assert len(draws) == 1000
    assert image_generator(3, 70_000).initial_seed() == image_generator(3, 70_000).initial_seed() < 2**32


def test_labels_are_uniform_and_a_function_of_seed_and_index():
    labels = sample_labels(SamplingSettings(num_images=20_000), 10)
    np.testing.assert_array_equal(labels[:100], sample_labels(SamplingSettings(num_images=100), 10))
    counts = np.bincount(labels, minlength=10)
    # Chi-squared with nine degrees of freedom: 27.9 is passed once in a thousand seeds.
    assert ((counts - 2000) ** 2 / 2000).sum() < 27.9
    assert len(set(counts)) > 1
    balanced = sample_labels(SamplingSettings(num_images=25, labels="balanced"), 10)
    assert np.bincount(balanced).tolist() == [3] * 5 + [2] * 5
    assert not (labels[:100] == sample_labels(SamplingSettings(num_images=100, seed=1), 10)).all()


def test_unconditional_models_are_sampled(tmp_path, accelerator):
    images = draw(tiny_pipeline(num_classes=0), tmp_path, accelerator, num_images=3)
    assert len(images) == 3 and not images.labels.any()


# --- kills and other runs


def test_a_second_run_draws_only_what_is_missing(tmp_path, accelerator, small_shards, monkeypatch):
    pipeline = tiny_pipeline()
    whole = all_images(draw(pipeline, tmp_path / "whole", accelerator, num_images=13))
    draw(pipeline, tmp_path / "cut", accelerator, num_images=13)
    (tmp_path / "cut" / "samples" / "samples-00000005.npz").unlink()
    (tmp_path / "cut" / "samples" / ".partial-samples-00000005.npz").write_bytes(b"half a file")
    drawn = []
    original = sampling.draw_images
    monkeypatch.setattr(
        sampling, "draw_images", lambda p, s, indices, *rest: drawn.extend(indices) or original(p, s, indices, *rest)
    )
    again = draw(pipeline, tmp_path / "cut", accelerator, num_images=13)
    assert drawn == [5, 6, 7, 8, 9]
    assert np.abs(all_images(again) - whole).max() <= 1
    assert not list((tmp_path / "cut" / "samples").glob(".partial*"))


SAMPLING_SCRIPT = """
import time
from pathlib import Path
from accelerate import Accelerator
from helpers.pipelines import tiny_pipeline
from d_emo.eval.fid import sampling
from d_emo.eval.fid.protocol import SamplingSettings
sampling.SHARD_SIZE = 4
original = sampling.draw_images
sampling.draw_images = lambda *a: time.sleep(0.2) or original(*a)
sampling.sample_images(tiny_pipeline(), SamplingSettings(num_images=40, steps=10, sampler="fast"), Path({folder!r}),
                       Accelerator(cpu=True), 4)
"""


@pytest.mark.slow
def test_kill_nine_loses_nothing_that_was_drawn(tmp_path, accelerator, monkeypatch):
    shards = tmp_path / "killed" / "samples"
    code = SAMPLING_SCRIPT.format(folder=str(tmp_path / "killed"))
    kill_when(tmp_path / "log", code, lambda: len(list(shards.glob("samples-*"))) >= 3)
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("samples-*.npz")}
    assert 3 <= len(kept) < 10
    monkeypatch.setattr(sampling, "SHARD_SIZE", 4)
    pipeline = tiny_pipeline()
    resumed = draw(pipeline, tmp_path / "killed", accelerator, num_images=40)
    undisturbed = draw(pipeline, tmp_path / "whole", accelerator, num_images=40)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert np.abs(all_images(resumed) - all_images(undisturbed)).max() <= 1
    np.testing.assert_array_equal(resumed.labels, undisturbed.labels)


def test_a_folder_of_other_samples_is_refused_with_what_differs(tmp_path, accelerator):
    pipeline = tiny_pipeline()
    draw(pipeline, tmp_path, accelerator, num_images=3)
    with pytest.raises(ManifestError, match=r"sampling\.seed 0 -> 1.*Use another --output-dir"):
        draw(pipeline, tmp_path, accelerator, num_images=3, seed=1)
    with torch.no_grad():
        next(pipeline.transformer.parameters()).add_(1e-3)
    with pytest.raises(ManifestError, match="transformer '"):
        draw(pipeline, tmp_path, accelerator, num_images=3)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ManifestError, match="is damaged"):
        draw(pipeline, tmp_path, accelerator, num_images=3)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(ManifestError, match=r"holds samples without a manifest\.json"):
        draw(pipeline, tmp_path, accelerator, num_images=3)


def test_the_manifest_says_everything_that_moves_the_number(tmp_path, accelerator):
    pipeline = tiny_pipeline()
    draw(pipeline, tmp_path, accelerator, num_images=2, guidance_scale=1.5, guidance_channels=2)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["sampling"]["guidance_channels"] == 2 and manifest["sampling"]["weights"] == "averaged"
    assert manifest["scheduler"] == "DDIMScheduler" and manifest["scheduler_config"]["clip_sample"] is False
    assert len(manifest["transformer"]) == 64 and manifest["decoder"] is None
    assert {"torch", "diffusers", "d-emo"} <= set(manifest["versions"])
    assert isinstance(pipeline.scheduler, DDPMScheduler)  # the pipeline keeps its own


def test_a_source_tree_on_the_path_draws_without_being_installed(tmp_path, accelerator, monkeypatch):
    def version(name):
        if name == "d-emo":
            raise metadata.PackageNotFoundError(name)
        return metadata.version(name)

    monkeypatch.setattr("d_emo.common.versions.version", version)
    draw(tiny_pipeline(), tmp_path, accelerator, num_images=2)
    assert json.loads((tmp_path / "manifest.json").read_text())["versions"]["d-emo"] == d_emo.__version__


def test_incomplete_samples_are_not_scored(tmp_path, accelerator, small_shards):
    draw(tiny_pipeline(), tmp_path, accelerator, num_images=12)
    (tmp_path / "samples" / "samples-00000010.npz").unlink()
    with pytest.raises(ValueError, match="holds 10 of 12 images: the sampling run did not end"):
        sampling.from_shards(tmp_path / "samples")


# --- presets and samplers


def test_presets_are_the_published_protocols():
    dit = PRESETS["dit-400k"]
    assert (dit.sampler, dit.steps, dit.guidance_scale, dit.labels, dit.num_images) == (
        "ddpm",
        250,
        1,
        "random",
        50_000,
    )
    assert dit.vae == FT_MSE and dit.weights == "averaged"
    script = PRESETS["dit-script"]
    assert (script.guidance_scale, script.guidance_channels) == (1.5, 3) and script.vae.endswith("ft-ema")
    assert preset_changes(dit, "dit-400k") == []
    assert preset_changes(with_settings("dit-400k", {"vae": "/models/sd-vae-ft-mse"}), "dit-400k") == []
    assert preset_changes(with_settings("dit-400k", {"steps": 50}), "dit-400k") == ["steps: 250 -> 50"]
    with pytest.raises(ValueError, match="--preset fid: unknown; choose one of dit-400k"):
        with_settings("fid", {})


def test_samplers_fit_the_model_or_are_refused():
    noise, flow = tiny_pipeline(), tiny_pipeline(flow=True)
    ddpm = sampler("ddpm", noise)
    assert (ddpm.config.timestep_spacing, ddpm.config.variance_type) == ("linspace", "learned_range")
    assert isinstance(sampler("fast", noise), DDIMScheduler)
    assert isinstance(sampler("sde", flow), FlowMatchEulerMaruyamaScheduler)
    assert isinstance(sampler("sde-heun", flow), FlowMatchSDEHeunScheduler)
    heun = sampler("heun", flow)
    assert isinstance(heun, FlowMatchHeunDiscreteScheduler)
    heun.set_timesteps(PRESETS["sit-ode"].steps)
    assert len(heun.timesteps) == 249
    flow.scheduler = FlowMatchODESolverScheduler(method="midpoint")
    assert sampler("own", flow) is flow.scheduler
    flow.scheduler = FlowMatchODESolverScheduler()
    with pytest.raises(ValueError, match="--sampler own: dopri5 chooses its steps for a batch"):
        sampler("own", flow)
    curved = tiny_pipeline(flow=True, flow_path="vp")
    assert sampler("sde", curved).config.flow_path == "vp"
    with pytest.raises(ValueError, match="--sampler sde: the model predicts noise"):
        sampler("sde", noise)
    with pytest.raises(ValueError, match=r"--sampler ddpm: the model predicts the flow.*sit-sde"):
        sampler("ddpm", flow)


def test_more_guided_channels_than_the_model_has_are_refused_by_their_option():
    pipeline = tiny_pipeline(flow=True)
    channels = pipeline.transformer.config.in_channels
    apply_settings(pipeline, "m", SamplingSettings(sampler="euler", guidance_channels=channels))
    message = rf"--guidance-channels={channels + 1} is not None or a whole number from 1 to {channels} \(the model's\)"
    with pytest.raises(ValueError, match=message):
        apply_settings(pipeline, "m", SamplingSettings(sampler="euler", guidance_channels=channels + 1))


def test_every_sampler_of_a_flow_keeps_the_shift_that_its_model_was_trained_with():
    pipeline = tiny_pipeline(flow=True)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    for name in ("euler", "heun", "sde", "sde-heun", "fast", "own"):
        assert sampler(name, pipeline).config.shift == 2.5
    assert sampler("sde", tiny_pipeline(flow=True)).config.shift == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_images": 0}, "--num-images=0 is not a whole number from 1 on"),
        ({"guidance_scale": 0.0}, "0 would draw without class"),
        ({"guidance_scale": float("nan")}, "--guidance-scale=nan is not a number from 1 to 1000"),
        ({"seed": -1}, "--seed=-1"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        SamplingSettings(**setting)


def test_raw_weights_decoder_and_type_are_taken_from_where_they_are_said_to_be(tmp_path, offline):
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    other = AutoencoderKL.from_config(vae.config)
    model = tiny_pipeline(in_channels=4)
    pipeline = DEMOPipeline(model.transformer, model.scheduler, vae=vae)
    pipeline.save_pretrained(tmp_path / "checkpoint")
    other.save_pretrained(tmp_path / "sd-vae-ft-mse")
    with pytest.raises(ValueError, match=r"--weights raw: .*model\.safetensors does not exist"):
        apply_settings(pipeline, str(tmp_path / "checkpoint"), SamplingSettings(weights="raw"))
    raw = {name: tensor + 0.5 for name, tensor in model.transformer.state_dict().items()}
    (tmp_path / "checkpoint" / "training_state").mkdir()
    save_file(raw, tmp_path / "checkpoint" / "training_state" / "model.safetensors")
    loaded = load_pipeline(str(tmp_path / "checkpoint"), "bfloat16")
    settings = SamplingSettings(weights="raw", vae=str(tmp_path / "sd-vae-ft-mse"), dtype="bfloat16")
    apply_settings(loaded, str(tmp_path / "checkpoint"), settings)
    assert loaded.transformer.dtype == loaded.vae.dtype == torch.bfloat16
    assert loaded.transformer.state_dict()["blocks.0.i2rmb.conv_norm.running_var"].dtype == torch.float32
    name, value = next(iter(raw.items()))
    torch.testing.assert_close(loaded.transformer.state_dict()[name].float(), value, atol=0.02, rtol=0.01)
    expected = next(iter(other.parameters())).detach()
    torch.testing.assert_close(next(iter(loaded.vae.parameters())).float(), expected, atol=0.01, rtol=0.01)
    with pytest.raises(ValueError, match="there is no pipeline in it"):
        load_pipeline(str(tmp_path))
    with pytest.raises(ValueError, match="--vae nowhere/vae: neither a VAE folder nor reachable"):
        apply_settings(loaded, "", SamplingSettings(vae="nowhere/vae"))
