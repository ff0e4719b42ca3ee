"""SiT's Heun for the SDE: its loop restated in its own convention, an exact Gaussian, images apart from their batch."""

import math

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.golden import golden, seeded_input
from helpers.pipelines import images, stand_in_pipeline, tiny_pipeline

from d_emo import FlowMatchEulerMaruyamaScheduler, FlowMatchSDEHeunScheduler
from d_emo.schedulers import flow_sde
from d_emo.schedulers.flow_paths import path_point
from d_emo.schedulers.flow_sde import LAST_STEPS

MEAN, DEVIATION = 0.7, 0.4
# The golden file's evolution: SiT's linear path, its form "sigma" of the diffusion, 50 points, a last step of 0.04.
SIT = golden("sit_transport")["sde"][0]


def sit_velocity(x, t):
    """The golden file's stand-in network; SiT's time (1 is data) and sign (data - noise)."""
    return 0.5 * x.roll(1, 3) - 0.8 * x + 0.3 * math.cos(3 * t)


def sit_heun(x, noises, points, last_step_size, last_step):
    """SiT's Heun loop and last step, restated for its linear path: x = t data + (1 - t) noise, w = 1 - t."""

    def score(x, t):
        return (t * sit_velocity(x, t) - x) / (1 - t)

    def drift(x, t):
        return sit_velocity(x, t) + (1 - t) * score(x, t)

    end = 1 - last_step_size
    dt = end / (points - 1)
    for index in range(points - 1):
        t = index * dt
        noisy = x + math.sqrt(2 * (1 - t) * dt) * noises[index]
        first = drift(noisy, t)
        second = drift(noisy + dt * first, t + dt)
        x = noisy + 0.5 * dt * (first + second)
    if last_step == "mean":
        return x + last_step_size * drift(x, end)
    if last_step == "euler":
        return x + last_step_size * sit_velocity(x, end)
    return x / end + (1 - end) ** 2 / end * score(x, end)


@pytest.mark.parametrize("last_step", LAST_STEPS)
def test_the_samples_are_those_of_sits_loop_with_equal_noise_to_1e_5(last_step, monkeypatch):
    points, shape, seed = SIT["time_points"], tuple(SIT["shape"]), SIT["noise_seed"]
    noises = [seeded_input(seed + 1 + index, shape) for index in range(points - 1)]
    scheduler = FlowMatchSDEHeunScheduler(last_step_size=SIT["last_step_size"], last_step=last_step)
    pipeline = stand_in_pipeline(scheduler, flow=True, learn_sigma=False, prediction_type="flow_prediction")
    later = iter(noises[1:])
    monkeypatch.setattr(flow_sde, "randn_tensor", lambda *_, **__: next(later))
    # SiT draws the first step's noise apart from the start; the pipeline's start stands for both.
    start, first = seeded_input(seed, shape), math.sqrt(2 * (1 - SIT["last_step_size"]) / (points - 1))
    latents = (start + first * noises[0]) / math.hypot(1, first)
    result = pipeline(
        num_images_per_label=shape[0], num_inference_steps=points, latents=latents, output_type="latent"
    ).images
    expected = sit_heun(start.double(), [noise.double() for noise in noises], points, SIT["last_step_size"], last_step)
    torch.testing.assert_close(result.double(), expected, atol=1e-5, rtol=1e-5)
    assert next(later, None) is None  # every step's noise was taken
    assert len(scheduler.timesteps) == 2 * points - 1


def exact_velocity(x: torch.Tensor, s: float, path: str) -> torch.Tensor:
    """dx/ds where the data are N(MEAN, DEVIATION^2)."""
    point = path_point(path, torch.tensor(s, dtype=torch.float64))
    spread = point.alpha**2 * DEVIATION**2 + point.sigma**2
    from_mean = (x - point.alpha * MEAN) / spread
    data = MEAN + DEVIATION**2 * point.alpha * from_mean
    return point.velocity(data, point.sigma * from_mean)


def errors(kind, steps: int, path: str, monkeypatch, diffusion: str = "sigma") -> tuple[float, float]:
    """By how much a sampler misses mean and deviation where its last step begins; no sampling error, to rounding.

    What it does to a Gaussian is affine in the start and in each step's noise, so one image a number gives the result:
    none, the start, and each noise by itself.
    """
    scheduler = kind(flow_path=path, diffusion=diffusion)
    scheduler.set_timesteps(steps)
    sigmas, drawn = scheduler._asked(scheduler.sigmas[:-1]), iter(range(1, steps + 1))

    def alone(shape, **_):
        return torch.eye(shape[0], dtype=torch.float64)[1 + next(drawn)].reshape(shape)

    monkeypatch.setattr(flow_sde, "randn_tensor", alone)
    x = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = scheduler.init_noise_sigma
    for timestep, s in zip(scheduler.timesteps[:-1], sigmas[:-1].tolist(), strict=True):
        x = scheduler.step(exact_velocity(x, s, path), timestep, x).prev_sample
    end = path_point(path, torch.tensor(scheduler.config.last_step_size, dtype=torch.float64))
    deviation = (x[1:] - x[0]).square().sum().sqrt()
    true_deviation = (end.alpha**2 * DEVIATION**2 + end.sigma**2).sqrt()
    return abs(float(x[0] - end.alpha * MEAN)), abs(float(deviation - true_deviation))


def test_mean_and_deviation_converge_to_a_gaussians(monkeypatch):
    """The mean by the second order, by Euler-Maruyama's first; the deviation by the first order of both.

    SiT's default diffusion brings it nearer than Euler-Maruyama at equal evaluations, the constant one does not.
    """
    found = {
        kind: [errors(kind, steps, "gvp", monkeypatch)[0] for steps in (40, 80, 160)]
        for kind in (FlowMatchEulerMaruyamaScheduler, FlowMatchSDEHeunScheduler)
    }
    for kind, order in ((FlowMatchEulerMaruyamaScheduler, 1), (FlowMatchSDEHeunScheduler, 2)):
        coarse, middle, fine = found[kind]
        assert math.log2(coarse / middle) == pytest.approx(order, abs=0.1)
        assert math.log2(middle / fine) == pytest.approx(order, abs=0.1)
    assert found[FlowMatchSDEHeunScheduler][2] < 2e-5
    for steps in (20, 40, 80, 160):  # on SiT's path, at equal evaluations
        euler = errors(FlowMatchEulerMaruyamaScheduler, 2 * steps, "linear", monkeypatch)[1]
        heun = errors(FlowMatchSDEHeunScheduler, steps, "linear", monkeypatch)[1]
        assert heun < 0.85 * euler
    constant = [
        errors(kind, steps, "linear", monkeypatch, "constant")[1]
        for kind, steps in ((FlowMatchEulerMaruyamaScheduler, 160), (FlowMatchSDEHeunScheduler, 80))
    ]
    assert constant[0] < constant[1] < 0.02
    halved = errors(FlowMatchSDEHeunScheduler, 320, "linear", monkeypatch)[1]
    assert math.log2(heun / halved) == pytest.approx(1, abs=0.1) and halved < 2e-4


def test_an_image_with_its_own_generator_does_not_depend_on_its_batch():
    pipeline = tiny_pipeline(flow=True, num_layers=1)
    pipeline.scheduler = FlowMatchSDEHeunScheduler()
    together = images(pipeline, (0, 1, 2))
    for index in range(3):
        torch.testing.assert_close(images(pipeline, (index,), seed=index)[0], together[index], atol=1e-5, rtol=1e-5)
    assert (images(pipeline, (0, 1, 2), seed=5) - together).abs().max() > 1e-2


def test_it_is_saved_with_its_pipeline_and_steps_are_counted(tmp_path):
    pipeline = tiny_pipeline(flow=True, num_layers=1)
    pipeline.scheduler = FlowMatchSDEHeunScheduler(last_step_size=0.1, diffusion="linear", shift=2.0)
    pipeline.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is FlowMatchSDEHeunScheduler and again.scheduler.config.shift == 2
    torch.testing.assert_close(images(again), images(pipeline))
    with pytest.raises(ValueError, match="no step is left"):
        again.scheduler.step(torch.zeros(1), again.scheduler.timesteps[-1], torch.zeros(1))
    with pytest.raises(ValueError, match="at least 2 steps"):
        images(again, num_inference_steps=1)


def test_without_diffusion_it_is_heuns_method_for_the_ode():
    def draw(scheduler, steps):
        pipeline = stand_in_pipeline(scheduler, flow=True, learn_sigma=False, prediction_type="flow_prediction")
        latents = seeded_input(1, (2, 4, 8, 8))
        return pipeline(num_images_per_label=2, num_inference_steps=steps, latents=latents, output_type="latent").images

    quiet = draw(FlowMatchSDEHeunScheduler(diffusion_norm=0, last_step="euler", last_step_size=0.1), 10)
    x = seeded_input(1, (2, 4, 8, 8))
    for t in [index / 10 for index in range(9)]:
        first = sit_velocity(x, t)
        x = x + 0.05 * (first + sit_velocity(x + 0.1 * first, t + 0.1))
    torch.testing.assert_close(quiet, x + 0.1 * sit_velocity(x, 0.9), atol=1e-5, rtol=1e-5)
