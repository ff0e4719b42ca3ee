"""Every scheduler of Diffusers that fits: calls repeat, noise is as large as it should be, few steps begin at noise."""

import inspect
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from helpers.pipelines import dit_scheduler, images, tiny_pipeline

from d_emo import (
    DEMOPipeline,
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchODESolverScheduler,
    FlowMatchSDEHeunScheduler,
    create_model,
)
from d_emo.pipelines.checks import default_steps

BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
EPSILON = ("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSinglestep",
           "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM",
           "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep")  # fmt: skip
FLOW = ("DEISMultistep", "DPMSolverMultistep", "SASolver", "UniPCMultistep", "FlowMatchEulerDiscrete",
        "FlowMatchHeunDiscrete", "FlowMatchLCM")  # fmt: skip
SPACINGS = ("linspace", "leading", "trailing")


# Diffusers hands tensors to NumPy in a way that NumPy 2 will not take for ever.
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def knows_spacings(name: str) -> bool:
    """Whether a scheduler lets one choose among them."""
    return "timestep_spacing" in inspect.signature(getattr(diffusers, f"{name}Scheduler").__init__).parameters


def make(name: str, spacing: str, flow: bool):
    """A scheduler with DiT's betas, or on flows."""
    kind = getattr(diffusers, f"{name}Scheduler")
    accepted = inspect.signature(kind.__init__).parameters
    options = {"timestep_spacing": spacing, "clip_sample": False, **({} if flow else BETAS)}
    if flow and "use_flow_sigmas" in accepted:
        options |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return kind(**{option: value for option, value in options.items() if option in accepted})


CASES = [
    pytest.param(name, spacing, flow, id=f"{'flow' if flow else 'epsilon'}-{name}-{spacing}")
    for flow, names in ((False, EPSILON), (True, FLOW))
    for name in names
    for spacing in SPACINGS
    if knows_spacings(name) or spacing == SPACINGS[0]
]


@pytest.fixture(scope="module")
def pipelines():
    return {flow: tiny_pipeline(flow, num_layers=1) for flow in (False, True)}


def first_asked(pipeline, steps: int, **arguments):
    """A call's 8 latents, and the input's deviation and timestep of the model's first prediction."""
    asked = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _, inputs: asked.append((inputs[0].std().item(), inputs[1].flatten()[0].item()))
    )
    try:
        generator = torch.Generator().manual_seed(0)
        result = pipeline([0] * 8, steps, 1.0, generator=generator, output_type="latent", **arguments).images
    finally:
        handle.remove()
    return result, *asked[0]


@pytest.mark.parametrize(("name", "spacing", "flow"), CASES)
def test_a_call_repeats_itself_and_begins_with_noise_of_the_right_size(pipelines, name, spacing, flow):
    pipeline = pipelines[flow]
    pipeline.scheduler = make(name, spacing, flow)
    first, deviation, timestep = first_asked(pipeline, 10)
    # Of 8 x 3 x 16 x 16 numbers; its own error is 0.009. What the model sees is as large whatever the scheduler.
    assert deviation == pytest.approx(1.0, abs=0.03)
    assert timestep >= 890
    again = first_asked(pipeline, 10)[0]
    torch.testing.assert_close(again, first, atol=0, rtol=0)
    # And after another number of steps, whose noise has another scale.
    first_asked(pipeline, 12)
    torch.testing.assert_close(first_asked(pipeline, 10)[0], first, atol=0, rtol=0)


@pytest.mark.parametrize("steps", [1, *(pytest.param(steps, marks=pytest.mark.slow) for steps in (2, 3)), 4])
@pytest.mark.parametrize(("name", "spacing", "flow"), CASES)
def test_few_steps_begin_at_noise_or_are_refused_with_a_remedy(pipelines, name, spacing, flow, steps):
    pipeline = pipelines[flow]
    pipeline.scheduler = make(name, spacing, flow)
    try:
        result, deviation, timestep = first_asked(pipeline, steps)
    except ValueError as error:
        assert f"{name}Scheduler" in str(error)
        assert "timestep_spacing='trailing'" in str(error) or "use more" in str(error) or "so few steps" in str(error)
        return
    kept = math.sqrt(dit_scheduler().alphas_cumprod[min(999, round(timestep))])
    assert kept < 0.1 and deviation == pytest.approx(1.0, abs=0.03)
    assert result.isfinite().all()


def test_one_step_of_the_saved_sampler_is_refused_and_its_remedy_asks_at_the_end():
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match=r"begin at timestep 0 of 1000.*DDPMScheduler.from_config.*'trailing'"):
        pipeline(0, num_inference_steps=1)
    pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    asked = first_asked(pipeline, 1)[2]
    assert asked == 999


def test_a_refused_call_draws_nothing_from_the_generator():
    pipeline, generator = tiny_pipeline(), torch.Generator().manual_seed(3)
    before = generator.get_state()
    with pytest.raises(ValueError, match="num_inference_steps=1"):
        pipeline(0, num_inference_steps=1, generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("flow", "scheduler", "message"),
    [
        (False, lambda: DDPMScheduler(num_train_timesteps=0), "num_train_timesteps=0 is not .* have 1000"),
        (False, lambda: DDIMScheduler(beta_start=float("nan")), "noise schedule is broken"),
        (False, lambda: DDIMScheduler(beta_start=0.5, beta_end=1.5), "noise schedule is broken"),
        (False, lambda: DDIMScheduler(beta_start=-0.1, beta_end=0.0), "noise schedule is broken"),
        (False, lambda: DDIMScheduler(rescale_betas_zero_snr=True), "noise schedule is broken.*rescale_betas_zero_snr"),
        (False, lambda: DDIMScheduler(num_train_timesteps=100), "another noise schedule .*100 timesteps"),
        (False, lambda: diffusers.HeunDiscreteScheduler(), "another noise schedule .*from_config"),
        (False, lambda: DDIMScheduler(beta_schedule="scaled_linear"), "another noise schedule"),
        (False, lambda: diffusers.EDMEulerScheduler(), "EDMEulerScheduler has no noise schedule"),
        (False, lambda: diffusers.IPNDMScheduler(), "IPNDMScheduler has no noise schedule"),
        (False, lambda: diffusers.RePaintScheduler(), "RePaintScheduler, which makes no picture"),
        (False, lambda: diffusers.DDIMInverseScheduler(), "DDIMInverseScheduler, which makes no picture"),
        (False, lambda: diffusers.KarrasVeScheduler(), "KarrasVeScheduler, which makes no picture"),
        (True, lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=100), "num_train_timesteps=100.* at 1000"),
        (True, lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting=False"),
        (True, lambda: FlowMatchEulerDiscreteScheduler(shift=float("nan")), "shift=nan is not a number from 0.001"),
        (True, lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "would begin at timestep 0 of 1000"),
        (True, lambda: diffusers.SCMScheduler(), "prediction_type='trigflow'"),
        (True, lambda: diffusers.DPMSolverMultistepInverseScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction"), "InverseScheduler, which makes no picture"),
    ],
)  # fmt: skip
def test_configurations_that_would_draw_noise_are_refused(flow, scheduler, message):
    pipeline = tiny_pipeline(flow)
    pipeline.scheduler = scheduler()
    with pytest.raises(ValueError, match=message):
        pipeline(0, num_inference_steps=5)


def test_a_model_of_other_betas_keeps_its_own_schedule():
    """A loop of one's own may train with any betas; what came with the model is what is held to."""
    pipeline = tiny_pipeline()
    own = DEMOPipeline(pipeline.transformer, dit_scheduler(beta_schedule="squaredcos_cap_v2"))
    own.set_progress_bar_config(disable=True)
    assert images(own).isfinite().all()
    own.scheduler = DPMSolverMultistepScheduler.from_config(own.scheduler.config, variance_type=None)
    assert images(own).isfinite().all()
    own.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="another noise schedule"):
        images(own)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (FlowMatchEulerMaruyamaScheduler, {"num_train_timesteps": 0}, "num_train_timesteps=0"),
        (FlowMatchEulerMaruyamaScheduler, {"num_train_timesteps": 10.5}, "num_train_timesteps=10.5"),
        (FlowMatchEulerMaruyamaScheduler, {"diffusion_norm": float("nan")}, "diffusion_norm=nan"),
        (FlowMatchEulerMaruyamaScheduler, {"diffusion_norm": float("inf")}, "diffusion_norm=inf"),
        (FlowMatchEulerMaruyamaScheduler, {"diffusion_norm": "1"}, "diffusion_norm='1'"),
        (FlowMatchEulerMaruyamaScheduler, {"last_step_size": float("nan")}, "last_step_size=nan"),
        (FlowMatchEulerMaruyamaScheduler, {"last_step_size": None}, "last_step_size=None"),
        (FlowMatchODESolverScheduler, {"num_train_timesteps": -1}, "num_train_timesteps=-1"),
        (FlowMatchODESolverScheduler, {"atol": float("nan")}, "atol=nan"),
        (FlowMatchODESolverScheduler, {"rtol": float("inf")}, "rtol=inf"),
        (FlowMatchODESolverScheduler, {"rtol": "1e-3"}, "rtol='1e-3'"),
    ],
)
def test_own_schedulers_refuse_nonsense(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**options)


@pytest.mark.parametrize("steps", [1, 2.0, True, "10", None])
def test_the_stochastic_sampler_refuses_such_steps(steps):
    with pytest.raises(ValueError, match="num_inference_steps="):
        FlowMatchEulerMaruyamaScheduler().set_timesteps(steps)


def test_steps_left_out_suit_the_saved_model(tmp_path):
    assert default_steps(dit_scheduler()) == 250
    assert default_steps(FlowMatchEulerMaruyamaScheduler()) == default_steps(FlowMatchSDEHeunScheduler()) == 250
    assert default_steps(FlowMatchEulerDiscreteScheduler()) == default_steps(DDIMScheduler()) == 50
    flow = tiny_pipeline(flow=True, num_layers=1)
    assert flow(0).settings["num_inference_steps"] == 50
    saved = DEMOPipeline(flow.transformer, flow.scheduler, default_num_inference_steps=7)
    saved.save_pretrained(tmp_path)
    for loader in (DEMOPipeline, diffusers.DiffusionPipeline):
        again = loader.from_pretrained(tmp_path)
        assert again.config.default_num_inference_steps == 7
        assert again(0).settings["num_inference_steps"] == 7
        assert again(0, num_inference_steps=3).settings["num_inference_steps"] == 3
        assert DEMOPipeline.from_pipe(again)(0).settings["num_inference_steps"] == 7


def test_a_pipeline_saved_before_there_was_a_default_loads(tmp_path):
    import json

    tiny_pipeline(flow=True, num_layers=1).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    del index["default_num_inference_steps"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert DEMOPipeline.from_pretrained(tmp_path)(0).settings["num_inference_steps"] == 50


@pytest.mark.parametrize("wrong", [0, -3, 2.5, True, "20"])
def test_a_default_number_of_steps_is_checked(wrong):
    model = create_model("D-EMOv2-N-4", sample_size=8, hidden_size=16, num_layers=1, num_classes=3)
    with pytest.raises(ValueError, match="default_num_inference_steps="):
        DEMOPipeline(model, dit_scheduler(), default_num_inference_steps=wrong)
