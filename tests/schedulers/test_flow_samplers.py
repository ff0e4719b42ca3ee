"""Flow samplers on every path: closed forms for Gaussian data, SiT's published values, its formulas restated."""

import math

import pytest
import torch
from diffusers import (
    ConfigMixin,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ModelMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.models.cache_utils import CacheMixin
from helpers.golden import golden
from helpers.models import tiny_model
from helpers.pipelines import assert_golden, images, sample_golden, stand_in_pipeline, tiny_pipeline

from d_emo import (
    DEMOPipeline,
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchODESolverScheduler,
    FlowMatchSDEHeunScheduler,
    create_model,
)
from d_emo.schedulers.flow_ode import ADAPTIVE, FIXED
from d_emo.schedulers.flow_paths import EVERYWHERE, FLOW_PREDICTIONS, PATHS, path_numbers, path_point
from d_emo.schedulers.flow_sde import DIFFUSIONS, LAST_STEPS

MEAN, DEVIATION = 0.7, 0.4


class GaussianModel(ModelMixin, ConfigMixin, CacheMixin):
    """The exact prediction where the data are N(MEAN, DEVIATION^2), independently in each pixel."""

    sample_shape = (64, 64)
    null_label = 0

    @register_to_config
    def __init__(self, flow_path: str = "linear", prediction_type: str = "flow_prediction", in_channels: int = 4,
                 num_classes: int = 0, patch_size: int = 2, learn_sigma: bool = False):  # fmt: skip
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, timestep, class_labels, return_dict):
        point = path_point(self.config.flow_path, timestep.double()[:, None, None, None] / 1000)
        variance = point.alpha**2 * DEVIATION**2 + point.sigma**2
        noise = point.sigma * (x - point.alpha * MEAN) / variance  # the posterior's mean
        if self.config.prediction_type == "epsilon":
            return (noise.to(x.dtype),)
        if self.config.prediction_type == "score":
            return (-(x - point.alpha * MEAN).div(variance).to(x.dtype),)
        data = MEAN + DEVIATION**2 * point.alpha * (x - point.alpha * MEAN) / variance
        if self.config.prediction_type == "sample":
            return (data.to(x.dtype),)
        return (point.velocity(data, noise).to(x.dtype),)


def draw_gaussian(scheduler, steps: int = 100, **config) -> torch.Tensor:
    """16,384 numbers that should be N(MEAN, DEVIATION^2)."""
    pipeline = DEMOPipeline(GaussianModel(**config), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(num_inference_steps=steps, output_type="latent", generator=generator).images


def assert_gaussian(result: torch.Tensor, tolerance: float) -> None:
    """Mean and deviation; their own sampling errors are 0.003 and 0.002."""
    assert torch.isfinite(result).all()
    assert result.mean().item() == pytest.approx(MEAN, abs=tolerance)
    assert result.std().item() == pytest.approx(DEVIATION, abs=tolerance)


@pytest.mark.parametrize(
    ("path", "prediction"),
    [(path, kind) for path in PATHS for kind in FLOW_PREDICTIONS if kind != "sample" or path == "linear"],
)
@pytest.mark.parametrize("sampler", ["euler", "heun", "sde", "sde-heun", "dopri5"])
def test_every_path_and_prediction_reaches_the_data(sampler, path, prediction):
    scheduler = {
        "euler": FlowMatchEulerDiscreteScheduler(),
        "heun": FlowMatchHeunDiscreteScheduler(),
        "sde": FlowMatchEulerMaruyamaScheduler(flow_path=path, last_step_size=0.01),
        "sde-heun": FlowMatchSDEHeunScheduler(flow_path=path, last_step_size=0.01),
        "dopri5": FlowMatchODESolverScheduler(),
    }[sampler]
    if sampler == "heun" and path != "vp" and prediction not in EVERYWHERE:
        with pytest.raises(ValueError, match=f"starts at pure noise, where a {prediction} model on the {path} path"):
            draw_gaussian(scheduler, flow_path=path, prediction_type=prediction)
        scheduler = FlowMatchODESolverScheduler(method="heun2")
    result = draw_gaussian(scheduler, flow_path=path, prediction_type=prediction)
    # Below its floor a predicted picture is not quite reached, here by 0.02 of the mean.
    assert_gaussian(result, 0.04 if sampler.startswith("sde") or prediction == "sample" else 0.02)


@pytest.mark.parametrize("last_step", LAST_STEPS)
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_every_form_of_diffusion_reaches_the_data(diffusion, last_step):
    scheduler = FlowMatchEulerMaruyamaScheduler(diffusion=diffusion, last_step=last_step, last_step_size=0.01)
    assert_gaussian(draw_gaussian(scheduler, 250), 0.03)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_a_stochastic_step_is_sits_in_its_own_convention(path, diffusion, last_step):
    """SiT's formulas (t = 1 is data, velocity by t), restated; its drift, diffusion and last step to 1e-6."""
    scheduler = FlowMatchEulerMaruyamaScheduler(
        flow_path=path, diffusion=diffusion, last_step=last_step, diffusion_norm=0.8, last_step_size=0.1
    )
    scheduler.set_timesteps(8)
    x, velocity = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    for step in range(8):
        s, following = scheduler.sigmas[step].item(), scheduler.sigmas[step + 1].item()
        t, dt, v = 1 - s, s - following, -velocity  # SiT's
        if path == "linear":
            alpha, sigma, d_alpha, d_sigma = t, 1 - t, 1.0, -1.0
        elif path == "gvp":
            alpha, sigma = math.sin(t * math.pi / 2), math.cos(t * math.pi / 2)
            d_alpha, d_sigma = math.pi / 2 * sigma, -math.pi / 2 * alpha
        else:
            log_alpha = -0.25 * (1 - t) ** 2 * 19.9 - 0.5 * (1 - t) * 0.1
            alpha, sigma = math.exp(log_alpha), math.sqrt(1 - math.exp(2 * log_alpha))
            d_alpha = alpha * (0.5 * (1 - t) * 19.9 + 0.05)
            d_sigma = math.exp(2 * log_alpha) * 2 * (0.5 * (1 - t) * 19.9 + 0.05) / (-2 * sigma)
        ratio = alpha / d_alpha
        score = (ratio * v - x) / (sigma**2 - ratio * d_sigma * sigma)
        w = {
            "sigma": 0.8 * sigma,
            "sbdm": 0.8 * (d_alpha / max(alpha, 1e-12) * sigma**2 - sigma * d_sigma),
            "constant": 0.8,
            "linear": 0.8 * (1 - t),
            "decreasing": 0.25 * (0.8 * math.cos(math.pi * t) + 1) ** 2,
            "increasing-decreasing": 0.8 * math.sin(math.pi * t) ** 2,
        }[diffusion]
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        if following:
            expected = x + (v + w * score) * dt + math.sqrt(2 * w * dt) * noise
        elif last_step == "mean":
            expected = x + (v + w * score) * dt
        elif last_step == "tweedie":
            expected = x / alpha + sigma**2 / alpha * score
        else:
            expected = x + v * dt
        result = scheduler.step(velocity, scheduler.timesteps[step], x, generator).prev_sample
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("index", [0, 1], ids=lambda index: golden("sit_transport")["ode"][index]["solver"])
def test_torchdiffeqs_fixed_steps_equal_sits_to_1e_4(index):
    expected = golden("sit_transport")["ode"][index]
    scheduler = FlowMatchODESolverScheduler(method=expected["solver"])
    pipeline = stand_in_pipeline(scheduler, flow=True, learn_sigma=False, prediction_type="flow_prediction")
    assert_golden(sample_golden(pipeline, expected, expected["time_points"] - 1, "noise_seed"), expected, 1e-4)
    assert scheduler.evaluations == (expected["time_points"] - 1) * (1 + index)


@pytest.mark.parametrize("method", [*ADAPTIVE, *FIXED])
def test_every_solver_nears_the_same_solution(method):
    expected = draw_gaussian(FlowMatchODESolverScheduler(method="dopri8", atol=1e-7, rtol=1e-7))
    result = draw_gaussian(FlowMatchODESolverScheduler(method=method, atol=1e-5, rtol=1e-5))
    assert (result - expected).abs().max() < (0.05 if method == "euler" else 5e-3)


def test_tighter_tolerances_ask_more_and_come_nearer():
    loose, tight = (FlowMatchODESolverScheduler(atol=t, rtol=t) for t in (1e-2, 1e-5))
    point = path_numbers("linear", 1.0)
    assert point.alpha == 0 and point.sigma == 1
    near, far = draw_gaussian(tight), draw_gaussian(loose)
    exact = MEAN + DEVIATION * torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0))
    assert tight.evaluations > loose.evaluations
    assert (near - exact).abs().max() < 1e-3 < (far - exact).abs().max()  # the flow of a Gaussian is affine


@pytest.mark.parametrize("method", ADAPTIVE)
def test_no_solver_asks_beyond_the_path(method, monkeypatch):
    asked = []
    forward = GaussianModel.forward
    monkeypatch.setattr(
        GaussianModel, "forward", lambda self, x, time, *rest, **more: asked.append(time.max().item())
        or asked.append(time.min().item()) or forward(self, x, time, *rest, **more))  # fmt: skip
    draw_gaussian(FlowMatchODESolverScheduler(method=method), flow_path="vp")
    assert min(asked) > 0.99 and max(asked) <= 1000


def test_guidance_and_its_interval_reach_the_solver():
    pipeline = tiny_pipeline(flow=True)
    pipeline.scheduler = FlowMatchODESolverScheduler(method="euler")
    by_solver = images(pipeline, guidance_scale=3.0, guidance_interval=(0.25, 1.0))
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    torch.testing.assert_close(
        by_solver, images(pipeline, guidance_scale=3.0, guidance_interval=(0.25, 1.0)), atol=1e-4, rtol=1e-4
    )
    assert (by_solver - images(pipeline, guidance_scale=3.0)).abs().max() > 1e-3


def test_a_model_of_another_path_is_saved_with_it(tmp_path):
    model = tiny_model(num_classes=0, learn_sigma=False, prediction_type="score", flow_path="gvp")
    pipeline = DEMOPipeline(model, FlowMatchEulerMaruyamaScheduler(flow_path="gvp", diffusion="linear"))
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert (again.transformer.config.flow_path, again.transformer.config.prediction_type) == ("gvp", "score")
    assert again.scheduler.config.diffusion == "linear"


def test_schedulers_of_another_path_are_refused():
    config = {"flow_path": "gvp"}
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for scheduler in (
        FlowMatchEulerMaruyamaScheduler(),
        DPMSolverMultistepScheduler(**flow),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ):
        with pytest.raises(ValueError, match=r"on the linear path, the model on gvp; use .*flow_path='gvp'"):
            draw_gaussian(scheduler, **config)
    with pytest.raises(ValueError, match="epsilon on the vp path"):
        draw_gaussian(DPMSolverMultistepScheduler(), flow_path="vp", prediction_type="epsilon")


def test_mistakes_in_samplers_and_models_are_named():
    with pytest.raises(ValueError, match="diffusion='sigmas' is not one of sigma, sbdm"):
        FlowMatchEulerMaruyamaScheduler(diffusion="sigmas")
    with pytest.raises(ValueError, match="method='dopri' is not one of dopri5"):
        FlowMatchODESolverScheduler(method="dopri")
    with pytest.raises(ValueError, match=r"rtol=0 is not a number above 0 to 1"):
        FlowMatchODESolverScheduler(rtol=0)
    with pytest.raises(ValueError, match="diffusion_norm=-1 is not a number from 0 to 1000"):
        FlowMatchEulerMaruyamaScheduler(diffusion_norm=-1)
    with pytest.raises(ValueError, match="prediction_type='score' needs a flow_path"):
        create_model("D-EMOv2-S-2", prediction_type="score", learn_sigma=False)
    with pytest.raises(ValueError, match="prediction_type='sample' belongs to flow_path='linear', not to 'gvp'"):
        create_model("D-EMOv2-S-2", prediction_type="sample", flow_path="gvp", learn_sigma=False)
    with pytest.raises(ValueError, match="flow_path='cosine' is not None or one of linear"):
        create_model("D-EMOv2-S-2", flow_path="cosine", learn_sigma=False)
    pipeline = tiny_pipeline(flow=True)
    pipeline.scheduler = FlowMatchODESolverScheduler()
    with pytest.raises(ValueError, match="an ODE solver has no steps"):
        images(pipeline, callback_on_step_end=lambda *_: {})
