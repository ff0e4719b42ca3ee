"""Training losses against published values and closed forms."""

import math

import pytest
import torch
from helpers.golden import golden, seeded_input
from helpers.pipelines import dit_scheduler

from d_emo.schedulers.flow_paths import DATA_FLOOR, PATHS, path_numbers, path_point
from d_emo.train.diffusion.choose_objective import make_objective
from d_emo.train.diffusion.config import OptimizationOptions
from d_emo.train.diffusion.objectives import (
    DiTObjective,
    FlowObjective,
    discretized_gaussian_log_likelihood,
)


def flow_objective(**options) -> FlowObjective:
    """The flow objective of some options."""
    return FlowObjective(OptimizationOptions(objective="sit", **options))


def test_dit_losses_equal_the_published_ones_to_1e_5():
    expected = golden("dit_diffusion")["losses"]
    objective = DiTObjective()

    def network(noisy, steps, _):
        s = (steps.float() / 1000)[:, None, None, None]
        c = (1 - objective.alphas_cumprod[steps]).sqrt().float()[:, None, None, None]
        epsilon = 0.9 * c * noisy + 0.1 * c * noisy.roll(1, 3) + 0.05 * s
        return torch.cat([epsilon, torch.tanh(0.3 * noisy.roll(1, 2) + s - 0.5)], dim=1)

    shape = tuple(expected["shape"])
    time = (torch.tensor(expected["timesteps"], dtype=torch.float64) + 0.5) / 1000
    losses = objective.losses(network, seeded_input(100, shape), torch.zeros(6), seeded_input(101, shape), time)
    for name in ("mse", "vb", "loss"):
        torch.testing.assert_close(losses[name], torch.tensor(expected[name]), atol=1e-5, rtol=0)


def test_dit_schedule_equals_the_samplers():
    torch.testing.assert_close(
        DiTObjective().alphas_cumprod.float(), dit_scheduler().alphas_cumprod, atol=2e-6, rtol=2e-4
    )
    saved, expected = DiTObjective().make_scheduler().config, dit_scheduler().config
    assert {k: v for k, v in saved.items() if k[0] != "_"} == {k: v for k, v in expected.items() if k[0] != "_"}


def test_variational_bound_trains_the_variance_only():
    output = torch.randn(4, 8, 4, 4, requires_grad=True)
    data, noise = torch.rand(4, 4, 4, 4) - 0.5, torch.randn(4, 4, 4, 4)
    losses = DiTObjective().losses(lambda *_: output, data, torch.zeros(4), noise, torch.tensor([0, 0.1, 0.5, 0.9]))
    (gradient,) = torch.autograd.grad(losses["vb"].sum(), output)
    assert gradient[:, :4].abs().max() == 0
    assert (gradient[:, 4:] != 0).float().mean() > 0.95


def test_perfect_prediction_has_no_kl():
    """With the true noise and the smallest variance, prediction and posterior are one Gaussian."""
    noise = torch.randn(2, 4, 4, 4)
    output = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    losses = DiTObjective().losses(
        lambda *_: output, torch.rand_like(noise), torch.zeros(2), noise, torch.tensor([0.2, 0.7])
    )
    assert losses["mse"].abs().max() == 0
    assert losses["vb"].abs().max() < 1e-4


def test_min_snr_weights_are_their_formula():
    noise, time = torch.randn(3, 4, 4, 4), torch.tensor([0.001, 0.3, 0.99])
    arguments = (lambda x, *_: torch.zeros(3, 8, 4, 4), torch.rand(3, 4, 4, 4), torch.zeros(3), noise, time)
    plain, weighted = DiTObjective().losses(*arguments), DiTObjective(min_snr_gamma=5).losses(*arguments)
    alphas = DiTObjective().alphas_cumprod[(time * 1000).long()]
    snr = alphas / (1 - alphas)
    expected = torch.minimum(snr, torch.tensor(5.0)) / snr
    assert expected[0] < 0.01 and expected[2] == 1
    torch.testing.assert_close(weighted["mse"] / plain["mse"], expected.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weighted["vb"], plain["vb"])


def test_logit_normal_times_have_that_distribution():
    seen = []

    def network(noisy, timestep, _):
        seen.append(timestep)
        return torch.zeros_like(noisy)

    even = (torch.arange(2000) + 0.5) / 2000
    data = torch.zeros(2000, 1, 1, 1)
    flow_objective(time_sampling="logit-normal", logit_normal_mean=0.5, logit_normal_std=0.8).losses(
        network, data, torch.zeros(2000), data, even
    )
    logits = torch.logit(seen[0].double() / 1000)
    # Even quantiles: mean and deviation to the width of a step.
    assert logits.mean().item() == pytest.approx(0.5, abs=1e-3) and logits.std().item() == pytest.approx(0.8, abs=5e-3)
    assert (seen[0].diff() > 0).all()
    edge = flow_objective(time_sampling="logit-normal").losses(
        network, data[:1], torch.zeros(1), data[:1], torch.zeros(1)
    )
    assert torch.isfinite(edge["loss"]).all() and seen[1].item() == 0


@pytest.mark.parametrize("mean", [-0.8, 0.0, 0.3])
def test_discretized_gaussian_is_a_distribution_and_near_the_normal_one(mean):
    levels = torch.linspace(-1, 1, 256)
    log_scale = torch.full_like(levels, math.log(0.1))
    probability = discretized_gaussian_log_likelihood(levels, torch.full_like(levels, mean), log_scale).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    normal = torch.distributions.Normal(mean, 0.1)
    expected = normal.cdf(levels + 1 / 255) - normal.cdf(levels - 1 / 255)
    torch.testing.assert_close(probability[1:-1], expected[1:-1], atol=5e-4, rtol=0)  # the tanh form's own error


@pytest.mark.parametrize("expected", golden("sit_transport")["losses"], ids=lambda e: f"{e['path']} {e['prediction']}")
def test_flow_losses_equal_sits_to_1e_5(expected):
    shape, sit_time = tuple(expected["shape"]), torch.tensor(expected["t"])
    velocity = expected["prediction"] == "velocity"

    def network(noisy, timestep, _):
        time = 1 - timestep / 1000
        output = 0.5 * noisy.roll(1, 3) - 0.8 * noisy + 0.3 * torch.cos(3 * time)[:, None, None, None]
        return -output if velocity else output

    objective = flow_objective(
        flow_path=expected["path"].lower(),
        prediction=expected["prediction"],
        loss_weighting=expected["weighting"] or "none",
    )
    low, high = objective.interval  # the golden times are the path's own
    data, noise = seeded_input(expected["data_seed"], shape), seeded_input(expected["noise_seed"], shape)
    losses = objective.losses(network, data, torch.zeros(4), noise, (1 - sit_time - low) / (high - low))
    torch.testing.assert_close(losses["loss"], torch.tensor(expected["loss"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_path_derivatives_are_their_finite_differences(path):
    s, step = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-6
    point, before, after = (path_point(path, s + shift) for shift in (0, -step, step))
    torch.testing.assert_close(point.d_alpha, (after.alpha - before.alpha) / (2 * step), atol=1e-8, rtol=0)
    torch.testing.assert_close(point.d_sigma, (after.sigma - before.sigma) / (2 * step), atol=1e-8, rtol=0)
    ends = path_point(path, torch.tensor([1e-9, 1.0], dtype=torch.float64))
    assert ends.alpha[0].item() == pytest.approx(1, abs=1e-4) and ends.sigma[0].item() == pytest.approx(0, abs=1e-4)
    assert ends.alpha[1].item() < 0.01 and ends.sigma[1].item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_velocity_noise_and_score_are_one_thing_in_three_forms(path):
    """A path's velocity from its true noise, its true score, and back; closed form, float64 to 1e-10."""
    data, noise = torch.randn(2, 3, 5, dtype=torch.float64)
    point = path_point(path, torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64)[:, None])
    sample, velocity = point.sample(data, noise), point.velocity(data, noise)
    for name, prediction in {"epsilon": noise, "score": -noise / point.sigma, "flow_prediction": velocity}.items():
        torch.testing.assert_close(point.velocity_of(name, prediction, sample), velocity, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(point.noise_of(velocity, sample), noise, atol=1e-10, rtol=1e-10)


def test_a_weighted_noise_loss_is_the_loss_of_the_velocity_that_it_stands_for():
    torch.manual_seed(0)
    data, noise = torch.randn(2, 4, 2, 4, 4, dtype=torch.float64)
    time = torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    guess = torch.randn_like(noise)
    for path in PATHS:
        options = {"flow_path": path, "loss_weighting": "velocity"}
        as_noise = flow_objective(prediction="noise", **options)
        as_score = flow_objective(prediction="score", **options)
        low, high = as_noise.interval
        point = path_point(path, (low + (high - low) * time)[:, None, None, None])
        sample, target = point.sample(data, noise), point.velocity(data, noise)
        expected = (point.velocity_of("epsilon", guess, sample) - target).square().flatten(1).mean(1).float()
        from_noise = as_noise.losses(lambda *_: guess, data, torch.zeros(4), noise, time)["loss"]
        score = -guess / point.sigma
        from_score = as_score.losses(lambda *_, score=score: score, data, torch.zeros(4), noise, time)["loss"]
        torch.testing.assert_close(from_noise.float(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(from_score.float(), expected, atol=1e-5, rtol=1e-4)


def test_likelihood_weighting_is_the_score_rate_over_the_variance():
    data, noise, time = torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.tensor([0.25, 0.5])
    objective = flow_objective(prediction="noise", loss_weighting="likelihood")
    loss = objective.losses(lambda x, *_: torch.zeros_like(x), data, torch.zeros(2), noise, time)["loss"]
    s = objective.interval[0] + (objective.interval[1] - objective.interval[0]) * time
    torch.testing.assert_close(loss, s / (1 - s) / s**2)  # linear path: sigma = s, its score's share s / (1 - s)


def test_flow_timesteps_run_from_data_at_0_to_noise_at_1000():
    seen = {}

    def network(noisy, timestep, _):
        seen.update(noisy=noisy, timestep=timestep)
        return torch.zeros_like(noisy)

    data, noise = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    flow_objective().losses(network, data, torch.zeros(2), noise, torch.tensor([0.0, 0.75]))
    assert seen["timestep"].tolist() == [0, 750]
    assert seen["noisy"][:, 0, 0, 0].tolist() == [1, 0.25]


def test_data_and_velocity_are_one_thing_above_the_floor_to_1e_10():
    data, noise = torch.randn(2, 4, 5, dtype=torch.float64)
    s = torch.tensor([DATA_FLOOR, 0.2, 0.7, 1.0], dtype=torch.float64)[:, None]
    point = path_point("linear", s)
    sample, velocity = point.sample(data, noise), point.velocity(data, noise)
    found = point.velocity_of("sample", data, sample)
    torch.testing.assert_close(found, velocity, atol=1e-10, rtol=0)
    torch.testing.assert_close(sample - s * found, data, atol=1e-10, rtol=0)
    torch.testing.assert_close(
        path_numbers("linear", 0.2).velocity_of("sample", data[1], sample[1]), velocity[1], atol=1e-10, rtol=0
    )
    below = path_numbers("linear", 0.01)
    sample = below.sample(data, noise)
    torch.testing.assert_close(below.velocity_of("sample", data, sample), (sample - data) / 0.05, atol=1e-10, rtol=0)


def loss_and_gradient(objective, network, time):
    """Of a network with one parameter a channel; 4 samples, 2 channels."""
    data, noise = torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.tensor([0.3, -0.7], requires_grad=True)
    losses = objective.losses(
        lambda x, t, _: network(x, t, weight[:, None, None]), data, torch.zeros(4), noise, time)["loss"]  # fmt: skip
    return losses.detach(), torch.autograd.grad(losses.mean(), weight)[0]


def test_losses_and_gradients_of_data_and_of_velocity_are_equal_above_the_floor():
    def data_network(x, _, weight):
        return weight * x + 0.1 * weight.square()

    def velocity_network(x, timestep, weight):
        return (x - data_network(x, timestep, weight)) / (timestep / 1000)[:, None, None, None]

    time = torch.tensor([0.05, 0.1, 0.5, 0.99])
    loss, gradient = loss_and_gradient(flow_objective(prediction="data"), data_network, time)
    same_loss, same_gradient = loss_and_gradient(flow_objective(), velocity_network, time)
    torch.testing.assert_close(loss, same_loss, atol=0, rtol=1e-4)
    torch.testing.assert_close(gradient, same_gradient, atol=0, rtol=1e-4)
    assert gradient.abs().min() > 0.1


def test_the_loss_of_data_is_jits_in_its_own_convention_to_1e_5():
    """Time 1 is data; velocities (x - z) / max(1 - t, 0.05) of data and of prediction (arXiv 2511.13720)."""
    data, noise = torch.randn(2, 5, 2, 4, 4)
    t = torch.tensor([0.0, 0.3, 0.9, 0.97, 1.0])

    def network(x, timestep, _):
        return 0.4 * x.roll(1, 3) + torch.cos(3 * (1 - timestep / 1000))[:, None, None, None]

    clean = t[:, None, None, None]
    z, floored = clean * data + (1 - clean) * noise, (1 - clean).clamp(min=0.05)
    predicted = 0.4 * z.roll(1, 3) + torch.cos(3 * clean)
    expected = ((data - z) / floored - (predicted - z) / floored).square().mean(dim=(1, 2, 3))
    found = flow_objective(prediction="data").losses(network, data, torch.zeros(5), noise, 1 - t)["loss"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def drawn_times(**options) -> torch.Tensor:
    """The times that even draws become, (999,) float64."""
    seen = []

    def network(noisy, timestep, _):
        seen.append(timestep.double() / 1000)
        return torch.zeros_like(noisy)

    even, data = torch.arange(1, 1000, dtype=torch.float64) / 1000, torch.zeros(999, 1, 1, 1)
    flow_objective(**options).losses(network, data, torch.zeros(999), data, even)
    return seen[0]


@pytest.mark.parametrize("shift", [0.25, 1.0, 3.0])
def test_drawn_times_are_shifted_by_the_closed_form(shift):
    even = torch.arange(1, 1000, dtype=torch.float64) / 1000
    odds = shift * even / (1 - even)
    torch.testing.assert_close(drawn_times(time_shift=shift), odds / (1 + odds), atol=1e-9, rtol=0)
    # Shifting a logit-normal draw is moving its mean: JiT's (-0.8, 0.8), whose time runs the other way, is 0.8 here.
    normal = {"time_sampling": "logit-normal", "logit_normal_std": 0.8}
    found = drawn_times(**normal, logit_normal_mean=0.8, time_shift=shift)
    expected = drawn_times(**normal, logit_normal_mean=0.8 + math.log(shift))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    jits = torch.sigmoid(-0.8 - 0.8 * torch.special.ndtri(even))
    torch.testing.assert_close(drawn_times(**normal, logit_normal_mean=0.8), 1 - jits, atol=1e-6, rtol=0)


def test_shifted_times_of_noise_stay_where_noise_says_something():
    times = drawn_times(prediction="noise", time_shift=100.0)
    assert times.min() > 1e-3 and times.max() < 1 - 1e-3


def test_auto_follows_from_the_shape_and_is_saved_with_the_scheduler():
    auto = OptimizationOptions(objective="sit", time_shift="auto")
    for shape, shift in (((4, 32, 32), 1.0), ((1, 16, 16), 0.25), ((768, 16, 16), math.sqrt(48))):
        objective = make_objective(auto, shape)
        assert objective.time_shift == pytest.approx(shift)
        assert objective.make_scheduler().config.shift == objective.time_shift
    with pytest.raises(ValueError, match="--time-shift auto: there is no shape to take it from"):
        make_objective(auto)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prediction": "data", "flow_path": "gvp"}, "--flow-path gvp: --prediction data goes with --flow-path linear"),
        ({"prediction": "data", "loss_weighting": "velocity"}, "--loss-weighting velocity: belongs to"),
        ({"objective": "dit", "prediction": "data"}, "--prediction data: belongs to --objective sit"),
        ({"objective": "dit", "time_shift": "auto"}, "--time-shift auto: belongs to --objective sit"),
        ({"logit_normal_mean": 0.8}, "--logit-normal-mean 0.8: belongs to --time-sampling logit-normal"),
        ({"logit_normal_std": 0.8}, "--logit-normal-std 0.8: belongs to --time-sampling logit-normal"),
        ({"objective": "dit", "time_shift": 2.0}, "--time-shift 2.0: belongs to --objective sit"),
        ({"time_shift": 0.0}, "--time-shift=0.0 is not a number from 0.001 to 1000"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_objective(OptimizationOptions(**{"objective": "sit", **options}))
