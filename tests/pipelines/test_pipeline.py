"""DEMOPipeline: samplers, labels, guidance, saving and loading."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    MagCacheConfig,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import scheduling_ddpm
from helpers.golden import golden, seeded_input
from helpers.models import tiny_model
from helpers.pipelines import (
    assert_golden,
    dit_scheduler,
    images,
    sample_golden,
    stand_in_pipeline,
    tiny_pipeline,
    tiny_vae,
)
from helpers.processes import offline_environment

from d_emo import DEMOPipeline, FlowMatchEulerMaruyamaScheduler
from d_emo.schedulers import flow_sde


def test_ancestral_sampler_equals_dits_50_steps_to_1e_4(monkeypatch):
    expected = golden("dit_diffusion")["samples"][0]
    seeds = iter(range(expected["initial_noise_seed"] + 1, expected["initial_noise_seed"] + 51))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: seeded_input(next(seeds), tuple(shape)))
    pipeline = stand_in_pipeline(dit_scheduler())
    result = sample_golden(pipeline, expected, 50, "initial_noise_seed")
    assert pipeline.scheduler.timesteps.tolist() == expected["timesteps"]
    assert_golden(result, expected, 1e-4)


def test_ddim_equals_dits_25_steps_to_1e_4():
    expected = golden("dit_diffusion")["samples"][1]
    scheduler = DDIMScheduler.from_config(dit_scheduler().config, timestep_spacing="leading", set_alpha_to_one=True)
    pipeline = stand_in_pipeline(scheduler)
    result = sample_golden(pipeline, expected, 25, "initial_noise_seed")
    assert pipeline.scheduler.timesteps.tolist() == expected["timesteps"]
    assert_golden(result, expected, 1e-4)


def test_wrong_timestep_spacing_is_measurably_wrong(monkeypatch):
    expected = golden("dit_diffusion")["samples"][0]
    seeds = iter(range(expected["initial_noise_seed"] + 1, expected["initial_noise_seed"] + 51))
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda shape, **_: seeded_input(next(seeds), tuple(shape)))
    pipeline = stand_in_pipeline(dit_scheduler(timestep_spacing="leading"))
    result = sample_golden(pipeline, expected, 50, "initial_noise_seed")
    assert (result.mean(dim=(2, 3)).flatten() - torch.tensor(expected["result_mean"])).abs().max() > 1e-3


def test_flow_euler_equals_sits_ode_to_1e_4():
    expected = golden("sit_transport")["ode"][0]
    pipeline = stand_in_pipeline(
        FlowMatchEulerDiscreteScheduler(), flow=True, learn_sigma=False, prediction_type="flow_prediction"
    )
    steps = expected["time_points"] - 1
    assert_golden(sample_golden(pipeline, expected, steps, "noise_seed"), expected, 1e-4)


def test_sit_stochastic_sampler_is_reached_through_the_pipeline(monkeypatch):
    expected = golden("sit_transport")["sde"][0]
    scheduler = FlowMatchEulerMaruyamaScheduler(last_step_size=expected["last_step_size"])
    pipeline = stand_in_pipeline(scheduler, flow=True, learn_sigma=False, prediction_type="flow_prediction")
    seeds = iter(range(expected["noise_seed"] + 1, expected["noise_seed"] + 1 + expected["time_points"]))
    monkeypatch.setattr(flow_sde, "randn_tensor", lambda shape, **_: seeded_input(next(seeds), tuple(shape)))
    result = sample_golden(pipeline, expected, expected["time_points"], "noise_seed")
    assert_golden(result, expected, 1e-4)


def test_stochastic_sampler_is_saved_with_its_pipeline_and_refuses_misuse(tmp_path):
    pipeline = tiny_pipeline(flow=True)
    pipeline.scheduler = FlowMatchEulerMaruyamaScheduler(last_step_size=0.1)
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert again.scheduler.config.last_step_size == 0.1
    torch.testing.assert_close(images(again), images(pipeline))
    assert (images(again, seed=5) - images(pipeline)).abs().max() > 1e-2
    with pytest.raises(ValueError, match="at least 2 steps"):
        images(again, num_inference_steps=1)
    with pytest.raises(ValueError, match="last_step_size=0 is not a number above 0 and below 1"):
        FlowMatchEulerMaruyamaScheduler(last_step_size=0)


def test_guidance_equals_its_formula():
    pipeline = tiny_pipeline(flow=True)
    noise = torch.randn(1, 3, 16, 16)
    guided = pipeline(1, num_inference_steps=1, guidance_scale=2.5, latents=noise, output_type="latent").images
    conditional, null = (
        pipeline.transformer(noise, 1000.0, torch.tensor([label]), return_dict=False)[0] for label in (1, 3)
    )
    torch.testing.assert_close(guided, noise - (null + 2.5 * (conditional - null)).detach())


def test_guidance_on_three_channels_leaves_the_fourth_conditional():
    pipeline = tiny_pipeline(flow=True, in_channels=4)
    arguments = {"num_inference_steps": 1}
    off = images(pipeline, guidance_scale=1.0, **arguments)
    three = images(pipeline, guidance_scale=3.0, guidance_channels=3, **arguments)
    four = images(pipeline, guidance_scale=3.0, **arguments)
    torch.testing.assert_close(three[:, 3], off[:, 3])
    torch.testing.assert_close(three[:, :3], four[:, :3])
    assert (four[:, 3] - off[:, 3]).abs().max() > 1e-4


def test_guidance_interval_acts_in_its_steps_only():
    pipeline = tiny_pipeline(flow=True)
    batches = []
    pipeline.transformer.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    images(pipeline, guidance_scale=2.0, guidance_interval=(0.25, 0.75))
    assert batches == [2, 4, 4, 2]


@pytest.mark.parametrize("shift", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("solver", [FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler])
def test_a_guidance_interval_is_of_time_on_shifted_steps_too(solver, shift):
    pipeline = tiny_pipeline(flow=True)
    pipeline.scheduler = solver(shift=shift)
    asked = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, arguments: asked.append((arguments[0], arguments[1].clone()))
    )
    images(pipeline, guidance_scale=2.0, guidance_interval=(0.1, 0.7), num_inference_steps=10)
    moments = [1 - timestep[0].item() / 1000 for _, timestep in asked]
    assert [len(latents) == 4 for latents, _ in asked] == [0.1 - 1e-6 <= moment < 0.7 - 1e-6 for moment in moments]
    assert 0 < sum(len(latents) == 4 for latents, _ in asked) < len(asked)


def test_a_guidance_interval_of_a_diffusion_in_steps_is_of_its_steps():
    pipeline = tiny_pipeline()
    batches = []
    pipeline.transformer.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    images(pipeline, guidance_scale=2.0, guidance_interval=(0.3, 0.7), num_inference_steps=10)
    assert batches == [2] * 3 + [4] * 4 + [2] * 3


def test_scale_one_runs_no_second_branch_and_is_recorded():
    pipeline = tiny_pipeline()
    batches = []
    pipeline.transformer.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    output = pipeline([0, 1], num_inference_steps=2, guidance_scale=1.0)
    assert batches == [2, 2]
    assert output.settings["guidance_scale"] == 1.0


def test_settings_record_what_moves_the_result():
    output = tiny_pipeline(in_channels=4)("tench", num_inference_steps=2, guidance_channels=3, output_type="latent")
    settings = json.loads(json.dumps(output.settings))
    assert settings["scheduler"] == "DDPMScheduler"
    assert settings["scheduler_config"]["variance_type"] == "learned_range"
    assert (settings["num_inference_steps"], settings["guidance_scale"], settings["guidance_channels"]) == (2, 1.5, 3)
    assert output.class_labels == [0]


@pytest.mark.parametrize("flow", [False, True])
def test_an_image_does_not_depend_on_its_batch(flow):
    pipeline = tiny_pipeline(flow)
    together = images(pipeline, (0, 1, 2))
    alone = torch.cat([images(pipeline, (label,), seed=label) for label in range(3)])
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)


def test_learned_variance_is_used():
    small = tiny_pipeline()
    small.scheduler = dit_scheduler(variance_type="fixed_small")
    assert (images(tiny_pipeline()) - images(small)).abs().max() > 1e-3


@pytest.mark.parametrize("training", [True, False])
def test_sampling_runs_in_eval_mode_and_restores_each_module(training):
    pipeline = tiny_pipeline()
    model = pipeline.transformer.train(training)
    model.blocks[0].i2rmb.conv_norm.train(not training)
    before = {name: value.clone() for name, value in model.named_buffers()}
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    images(pipeline)
    assert not any(seen)
    assert model.training is training
    assert model.blocks[0].i2rmb.conv_norm.training is not training
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_mode_is_restored_after_an_error():
    pipeline = tiny_pipeline()
    pipeline.transformer.train()

    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        pipeline(0, num_inference_steps=2, callback_on_step_end=fail)
    assert pipeline.transformer.training


def test_output_types_agree():
    pipeline = tiny_pipeline()
    tensor = images(pipeline, output_type="pt")
    array = images(pipeline, output_type="np")
    pictures = images(pipeline, output_type="pil")
    assert tensor.shape == (2, 3, 16, 16)
    assert tensor.min() >= 0 and tensor.max() <= 1
    np.testing.assert_array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures]), (array * 255).round().astype(np.uint8))


def test_one_channel_images_become_grey_pictures():
    pictures = tiny_pipeline(in_channels=1)(0, num_inference_steps=2).images
    assert pictures[0].mode == "L"


def test_rectangular_sizes_and_several_images_a_label():
    pipeline = tiny_pipeline()
    output = pipeline(["tench", 2], num_images_per_label=3, height=8, width=24, num_inference_steps=2, output_type="pt")
    assert output.images.shape == (6, 3, 8, 24)
    assert output.class_labels == [0, 0, 0, 2, 2, 2]


def test_callback_sees_and_replaces_latents():
    steps = []

    def zero(_, step, timestep, tensors):
        steps.append((step, int(timestep)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    result = images(tiny_pipeline(), callback_on_step_end=zero)
    assert [step for step, _ in steps] == [0, 1, 2, 3]
    assert result.abs().max() == 0


def test_tuple_is_returned_on_request():
    result = tiny_pipeline()(0, num_inference_steps=2, return_dict=False)
    assert isinstance(result, tuple) and len(result) == 1


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler.from_config(dit_scheduler().config),
        DPMSolverMultistepScheduler.from_config(dit_scheduler().config, variance_type=None),
        UniPCMultistepScheduler.from_config(dit_scheduler().config),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_epsilon_schedulers_can_be_swapped_in(scheduler):
    pipeline = tiny_pipeline()
    pipeline.scheduler = scheduler
    assert images(pipeline, num_inference_steps=5).isfinite().all()


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(),
        DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_flow_schedulers_can_be_swapped_in_and_approach_the_same_image(scheduler):
    pipeline = tiny_pipeline(flow=True)
    fine = images(pipeline, num_inference_steps=200)
    pipeline.scheduler = scheduler
    assert (images(pipeline, num_inference_steps=100) - fine).abs().mean() < 0.02


@pytest.mark.parametrize(
    ("flow", "scheduler", "message"),
    [
        (False, FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler is set up for.*'flow_prediction'"),
        (True, dit_scheduler(), "DDPMScheduler is set up for prediction_type='epsilon'"),
        (False, dit_scheduler(prediction_type="v_prediction"), "prediction_type='v_prediction'"),
        (False, DPMSolverMultistepScheduler.from_config(dit_scheduler().config), "variance_type=None"),
    ],
)
def test_schedulers_that_do_not_fit_the_model_are_refused(flow, scheduler, message):
    pipeline = tiny_pipeline(flow)
    pipeline.scheduler = scheduler
    with pytest.raises(ValueError, match=message):
        pipeline(0, num_inference_steps=2)


def test_learned_variance_without_a_model_for_it_is_refused():
    pipeline = tiny_pipeline(learn_sigma=False)
    with pytest.raises(ValueError, match="variance_type='fixed_small'"):
        pipeline(0, num_inference_steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": None}, "class_labels is missing and the model has 3 classes"),
        ({"class_labels": []}, "class_labels is empty"),
        ({"guidance_scale": 0.0}, "guidance_scale=0.0 is not a number from 1 to 1000 .1.0 turns guidance off"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval=\(0.5, 0.2\)"),
        ({"guidance_channels": 4}, "guidance_channels=4 is not a whole number from 1 to 3"),
        ({"num_images_per_label": 0}, "num_images_per_label=0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"height": 17}, "height=17 is not a positive multiple of 2.*use 16"),
        ({"generator": [torch.Generator()] * 3}, "3 generators for 1 images"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, "latents have the shape"),
        ({"output_type": "jpeg"}, "'jpeg' is not one of pil"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "noise"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**{"class_labels": 0, "num_inference_steps": 2, **arguments})


def test_unconditional_models_take_no_labels():
    pipeline = tiny_pipeline(num_classes=0)
    assert images(pipeline, None, num_images_per_label=2).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="unconditional; leave class_labels out"):
        pipeline(0)


@pytest.mark.parametrize("loader", [DEMOPipeline, DiffusionPipeline])
@pytest.mark.parametrize("flow", [False, True])
def test_round_trip_through_a_folder(loader, flow, tmp_path):
    pipeline = tiny_pipeline(flow)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["d_emo", "DEMOTransformer2DModel"]
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded, DEMOPipeline)
    assert loaded.id2label == {0: "tench, Tinca tinca", 1: "crane, bird", 2: "crane, machine"}
    torch.testing.assert_close(images(loaded), images(pipeline))
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["id2label"] == index["id2label"]


def test_round_trip_of_the_dit_baseline(tmp_path):
    pipeline = DEMOPipeline(tiny_model("DiT"), dit_scheduler())
    pipeline.save_pretrained(tmp_path)
    loaded = DEMOPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer).__name__ == "DiTBaselineTransformer2DModel"
    assert loaded.id2label == {}


@pytest.mark.slow
def test_hub_repository_loads_from_the_cache(tmp_path):
    snapshot = tmp_path / "models--someone--digits" / "snapshots" / "0123456789abcdef"
    tiny_pipeline().save_pretrained(snapshot)
    reference = tmp_path / "models--someone--digits" / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text(snapshot.name)
    code = (
        "import sys, d_emo, diffusers\n"
        "for loader in (d_emo.DEMOPipeline, diffusers.DiffusionPipeline):\n"
        "    pipeline = loader.from_pretrained('someone/digits', cache_dir=sys.argv[1])\n"
        "    assert pipeline.get_label_ids('tench') == [0], pipeline.id2label\n"
    )
    environment = {**offline_environment(), "HOME": os.environ.get("HOME", "")}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_vae_scale_and_shift_come_from_its_config(tmp_path):
    vae = tiny_vae()
    pipeline = DEMOPipeline(tiny_model(num_classes=3), dit_scheduler(), vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    latents = images(pipeline)
    decoded = images(pipeline, output_type="pt")
    assert decoded.shape == (2, 3, 32, 32)
    expected = (vae.decode(latents / 0.7 + 0.3).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decoded, expected)
    pipeline.save_pretrained(tmp_path)
    torch.testing.assert_close(images(DEMOPipeline.from_pretrained(tmp_path), output_type="pt"), decoded)
    with pytest.raises(ValueError, match="height=30 is not a positive multiple of 4"):
        pipeline(0, height=30)


@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCacheConfig(threshold=0.5),
        MagCacheConfig(mag_ratios=[1.0] * 10, num_inference_steps=10, threshold=0.2, retention_ratio=0.2),
    ],
    ids=lambda cache: type(cache).__name__,
)
def test_caches_skip_blocks_and_stay_near(cache):
    pipeline = tiny_pipeline(num_layers=4)
    calls = []
    pipeline.transformer.blocks[3].i2rmb.register_forward_pre_hook(lambda *_: calls.append(1))
    exact = images(pipeline, num_inference_steps=10)
    assert len(calls) == 10
    calls.clear()
    pipeline.transformer.enable_cache(cache)
    cached = images(pipeline, num_inference_steps=10)
    assert 0 < len(calls) < 10
    assert 0 < (cached - exact).abs().mean() < exact.abs().mean()
    assert images(pipeline, num_inference_steps=10, guidance_interval=(0.2, 0.7)).isfinite().all()
    pipeline.transformer.disable_cache()
    torch.testing.assert_close(images(pipeline, num_inference_steps=10), exact)


def test_a_cache_by_the_first_block_is_refused_where_class_tokens_join_later():
    cache = FirstBlockCacheConfig(threshold=0.5)
    with pytest.raises(ValueError, match=r"FirstBlockCacheConfig: .*context_length=3 class tokens .*MagCacheConfig"):
        tiny_model("JiT").enable_cache(cache)
    plain = tiny_model("JiT", context_length=0)
    plain.enable_cache(cache)
    assert plain.is_cache_enabled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cpu_offload_gives_the_same_image():
    pipeline = tiny_pipeline()
    expected = images(pipeline)
    pipeline.enable_model_cpu_offload()
    torch.testing.assert_close(images(pipeline).cpu(), expected, atol=1e-3, rtol=1e-3)
    assert pipeline.transformer.device.type == "cpu"


def test_half_precision_pipeline_returns_float32_rounded_pictures(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    half = DEMOPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert images(half).dtype == torch.float32
    assert images(half, output_type="np").dtype == np.float32
    shutil.rmtree(tmp_path)
