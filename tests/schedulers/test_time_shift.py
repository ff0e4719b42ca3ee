"""The time shift: one rule in training and in every sampler, held against its closed form.

A shift by k multiplies the odds s / (1 - s) of a time by k, which is how it is computed here.
"""

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from helpers.pipelines import images, tiny_pipeline

from d_emo import FlowMatchEulerMaruyamaScheduler, FlowMatchODESolverScheduler, FlowMatchSDEHeunScheduler
from d_emo.schedulers.flow_paths import SAMPLE_MARGIN, dimension_shift, shift_time, shifted_steps

STEPS = 5
EVEN = np.linspace(1, 0, STEPS + 1)


def by_odds(times, shift: float) -> np.ndarray:
    """Shifted times; 1, whose odds are infinite, stays."""
    times = np.asarray(times, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = shift * times / (1 - times)
        return np.where(times >= 1, 1.0, odds / (1 + odds))


def unshifted(time: float, shift: float) -> float:
    return float(by_odds(time, 1 / shift))


def doubled(times) -> np.ndarray:
    """The first time, and each other twice."""
    return np.concatenate([times[:1], np.repeat(times[1:], 2)])


def stochastic(shift: float) -> np.ndarray:
    """Even before the shift from noise to where the last step begins, both as they are."""
    return by_odds(np.linspace(1, unshifted(0.04, shift), STEPS), shift)


def asked(pipeline, scheduler) -> np.ndarray:
    """The times at which the model is asked."""
    seen = []
    pipeline.scheduler = scheduler
    handle = pipeline.transformer.register_forward_pre_hook(lambda _, inputs: seen.append(float(inputs[1][0]) / 1000))
    try:
        images(pipeline, (0,), num_inference_steps=STEPS, guidance_scale=1.0)
    finally:
        handle.remove()
    return np.array(seen)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline(flow=True, num_layers=1)


@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0, 6.928])
@pytest.mark.parametrize(
    ("make", "times"),
    [
        (FlowMatchEulerDiscreteScheduler, lambda shift: by_odds(EVEN[:-1], shift)),
        (FlowMatchHeunDiscreteScheduler, lambda shift: doubled(by_odds(np.linspace(1, 0.001, STEPS), shift))),
        (FlowMatchEulerMaruyamaScheduler, stochastic),
        (FlowMatchSDEHeunScheduler, lambda shift: doubled(stochastic(shift))),
        (lambda **more: FlowMatchODESolverScheduler(method="euler", **more), lambda shift: by_odds(EVEN[:-1], shift)),
    ],
    ids=["euler", "heun", "sde", "sde-heun", "ode"],
)
def test_a_sampler_asks_at_the_shifted_times(pipeline, make, times, shift):
    np.testing.assert_allclose(asked(pipeline, make(shift=shift)), times(shift), atol=2e-6)


def test_heun_gets_the_same_times_whenever_it_is_asked_again(pipeline):
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    np.testing.assert_array_equal(asked(pipeline, scheduler), asked(pipeline, scheduler))


def test_a_model_that_cannot_be_asked_at_pure_noise_is_not_asked_nearer_to_it():
    pipeline = tiny_pipeline(flow=True, num_layers=1, prediction_type="epsilon", flow_path="linear")
    for make in (FlowMatchEulerDiscreteScheduler, FlowMatchEulerMaruyamaScheduler, FlowMatchSDEHeunScheduler):
        times = asked(pipeline, make(shift=6.9))
        assert times[0] == pytest.approx(1 - SAMPLE_MARGIN, abs=1e-6) and times.max() == times[0]
    times = asked(pipeline, FlowMatchODESolverScheduler(method="heun2", shift=6.9))
    assert times.max() <= 1 - SAMPLE_MARGIN + 1e-6 and times.min() >= SAMPLE_MARGIN - 1e-6


def test_shifts_keep_their_ends_and_undo_each_other():
    s = torch.linspace(0, 1, 101, dtype=torch.float64)
    for shift in (0.25, 3.0, 100.0):
        times = shift_time(s, shift)
        assert times[0] == 0 and times[-1] == 1 and (times.diff() > 0).all()
        torch.testing.assert_close(shift_time(times, 1 / shift), s, atol=1e-12, rtol=0)
    assert torch.equal(shift_time(s, 1.0), s)  # bit for bit
    steps = shifted_steps(0.999, 0.001, 7, 6.9)
    assert steps[0] == 0.999 and steps[-1] == 0.001 and (steps.diff() < 0).all()


def test_the_shift_of_a_dimension_is_its_root_over_that_of_a_latent():
    assert dimension_shift(4 * 32 * 32) == 1
    assert dimension_shift(768 * 16 * 16) == pytest.approx(6.928, abs=1e-3)  # RAE's latents
    assert dimension_shift(3 * 256 * 256) == pytest.approx(6.928, abs=1e-3)  # JiT's pixels


@pytest.mark.parametrize("shift", [0, -1, float("nan"), 1e30, "2"])
def test_a_shift_out_of_range_is_refused_by_every_sampler(pipeline, shift):
    for make in (FlowMatchEulerMaruyamaScheduler, FlowMatchSDEHeunScheduler, FlowMatchODESolverScheduler):
        with pytest.raises(ValueError, match=r"shift=.* is not a number from 0.001 to 1000 \(1 is no shift"):
            make(shift=shift)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.register_to_config(shift=shift)
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler's shift=.* is not a number from"):
        asked(pipeline, scheduler)
