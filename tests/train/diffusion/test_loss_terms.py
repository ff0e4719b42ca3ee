"""What losses of a recipe add: their formulas, where gradients go, resuming, processes, what is refused."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from helpers.models import randomize, tiny_model
from helpers.paths import ROOT
from helpers.training import TINY, assert_two_processes_train_as_one, train_in_parts

from d_emo.models.transformer_base import ClassConditionalOutput
from d_emo.schedulers.flow_paths import path_point
from d_emo.train.data.sources import load_source
from d_emo.train.diffusion.choose_objective import make_objective
from d_emo.train.diffusion.config import parse_config
from d_emo.train.diffusion.objectives import min_snr_weight
from d_emo.train.diffusion.plan import make_plan
from d_emo.train.diffusion.terms import ContrastiveTerm, DispersiveTerm, Drawn

NULL = 10
# Options of runs, by what they try.
RUNS = {
    "contrastive": ("--objective", "sit", "--contrastive", "0.05"),
    "dispersive": ("--dispersive-block", "2", "--dispersive", "0.25"),
    "min-snr": ("--objective", "sit", "--min-snr-gamma", "5.0"),
    "aligned": ("--objective", "sit", "--align-block", "2", "--align", "digits-classifier"),
}


def plan_of(*arguments):
    """The plan of a run on the digits."""
    config = parse_config(["--config", str(ROOT / "train/configs/digits.yaml"), *map(str, arguments)])
    return make_plan(config, load_source(config.data), Accelerator(cpu=True))


def batch(labels=(0, NULL, 5, 3)):
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(len(labels), 4, 16, 16, generator=generator) for _ in range(2))
    return Drawn(data, torch.tensor(labels), noise, torch.rand(len(labels), generator=generator))


def objective_of(*arguments):
    return make_objective(parse_config(["--objective", "sit", *arguments]).optimization, (4, 16, 16))


def answered(term, objective, drawn, **more):
    """A model with gradients of the term alone, and the term."""
    model = randomize(tiny_model(learn_sigma=False, prediction_type=objective.prediction_type, num_layers=3, **more))
    outputs = []

    def network(noisy, timestep, labels):
        outputs.append(model(noisy, timestep, labels, features_after=term.features_after))
        return outputs[-1].sample

    objective.losses(network, drawn.data, drawn.labels, drawn.noise, drawn.time)
    value = term(outputs[-1], drawn)
    value.backward()
    return model, value.detach()


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_contrast_is_the_distance_to_the_velocity_of_the_sample_before(path):
    objective, drawn = objective_of("--flow-path", path, "--time-shift", "2"), batch()
    prediction = torch.randn(drawn.data.shape, generator=torch.Generator().manual_seed(1))
    found = ContrastiveTerm(objective, 0.05, NULL)(ClassConditionalOutput(sample=prediction), drawn)
    expected = 0.0
    for i in (0, 2, 3):  # sample 1 has no class
        t = 2 * drawn.time[i] / (1 + drawn.time[i])
        angle = torch.pi / 2 * t
        rates = (-1, 1) if path == "linear" else (-torch.pi / 2 * angle.sin(), torch.pi / 2 * angle.cos())
        other = rates[0] * drawn.data[i - 1] + rates[1] * drawn.noise[i - 1]
        expected -= 0.05 * (prediction[i] - other).square().mean() / 3
    torch.testing.assert_close(found, torch.as_tensor(expected), atol=1e-6, rtol=1e-6)


def test_contrast_of_predicted_data_is_that_of_the_velocities_their_loss_compares():
    objective, drawn = objective_of("--prediction", "data"), batch()
    drawn.time[2] = 0.01  # below the floor
    t = drawn.time[:, None, None, None]
    prediction = torch.randn(drawn.data.shape, generator=torch.Generator().manual_seed(1))
    found = ContrastiveTerm(objective, 0.05, NULL)(ClassConditionalOutput(sample=prediction), drawn)
    noisy = (1 - t) * drawn.data + t * drawn.noise
    data = noisy - t * (drawn.noise - drawn.data).roll(1, 0)  # what has the other's velocity here
    expected = ((prediction - data) / t.clamp(min=0.05)).square().flatten(1).mean(1)
    torch.testing.assert_close(found, -0.05 * expected[[0, 2, 3]].mean(), atol=1e-6, rtol=1e-6)


def test_contrast_with_oneself_takes_its_weight_of_the_loss_away():
    objective, drawn = objective_of(), batch((3, 3, 3, 3))
    same = Drawn(*(part[:1].expand_as(part) for part in (drawn.data, drawn.labels, drawn.noise, drawn.time)))
    prediction = torch.randn(1, 4, 16, 16).expand_as(drawn.data)
    own = objective.losses(lambda *_: prediction, same.data, same.labels, same.noise, same.time)["loss"].mean()
    term = ContrastiveTerm(objective, 0.3, NULL)(ClassConditionalOutput(sample=prediction), same)
    torch.testing.assert_close(own + term, 0.7 * own)


def test_contrast_reaches_every_weight_and_no_sample_without_a_class():
    objective, drawn = objective_of(), batch()
    model, value = answered(ContrastiveTerm(objective, 0.05, NULL), objective, drawn)
    assert value < 0
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().max() > 0, name
    prediction = torch.randn(drawn.data.shape, requires_grad=True)
    ContrastiveTerm(objective, 0.05, NULL)(ClassConditionalOutput(sample=prediction), drawn).backward()
    assert prediction.grad.flatten(1).abs().amax(1).bool().tolist() == [True, False, True, True]
    nobody = ContrastiveTerm(objective, 0.05, NULL)(ClassConditionalOutput(sample=prediction), batch([NULL] * 4))
    assert nobody == 0


def test_dispersion_is_the_logarithm_of_the_mean_nearness_of_all_pairs():
    features = torch.randn(3, 2, 2, 5, generator=torch.Generator().manual_seed(1))
    term = DispersiveTerm(0.25, 2)(ClassConditionalOutput(sample=features, features=features), batch())
    flat = features.double().flatten(1)
    nearness = [math.exp(-float((a - b).square().mean())) for a in flat for b in flat]
    assert float(term) == pytest.approx(0.25 * math.log(sum(nearness) / 9), rel=1e-6, abs=1e-6)


def test_dispersion_pushes_apart_by_the_blocks_before_it_alone():
    objective, drawn = objective_of(), batch()
    model, value = answered(DispersiveTerm(0.25, 2), objective, drawn)
    assert value < 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
            assert reached == (not name.startswith(("blocks.2.", "norm_out.", "proj_out."))), name
    same = torch.ones(3, 2, 2, 5, requires_grad=True)
    term = DispersiveTerm(0.25, 2)(ClassConditionalOutput(sample=same, features=same), batch())
    term.backward()
    assert term == 0 and same.grad.isfinite().all()


@pytest.mark.parametrize(
    ("path", "prediction"),
    [(path, kind) for path in ("linear", "gvp", "vp") for kind in ("velocity", "noise", "score")]
    + [("linear", "data")],
)
def test_min_snr_makes_every_flows_loss_that_of_the_data_by_min_snr(path, prediction):
    objective, drawn = objective_of("--flow-path", path, "--prediction", prediction, "--min-snr-gamma", "5"), batch()
    drawn.time[:3] = torch.tensor([0.02, 0.2, 0.9])
    error = torch.randn(drawn.data.shape, generator=torch.Generator().manual_seed(1)).double()
    s = objective.place(drawn.time)[0].double()
    alpha = {
        "linear": lambda s: 1 - s,
        "gvp": lambda s: (math.pi / 2 * s).cos(),
        "vp": lambda s: (-0.25 * s**2 * 19.9 - 0.05 * s).exp(),
    }[path]
    sigma = {"linear": lambda s: s}.get(path, lambda s: (1 - alpha(s) ** 2).sqrt())
    a, b = alpha(s)[:, None, None, None], sigma(s)[:, None, None, None]

    def network(noisy, timestep, labels):
        data = drawn.data + error
        noise = (noisy - a * data) / b
        rates = (((f(s + 1e-6) - f(s - 1e-6)) / 2e-6)[:, None, None, None] for f in (alpha, sigma))
        kinds = {"noise": noise, "score": -noise / b, "data": data}
        rate_of_data, rate_of_noise = rates
        return kinds.get(prediction, rate_of_data * data + rate_of_noise * noise).float()

    found = objective.losses(network, drawn.data, drawn.labels, drawn.noise, drawn.time)["loss"]
    snr = (alpha(s) / sigma(s)) ** 2
    expected = snr.clamp(max=5) * error.square().flatten(1).mean(1)
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-6)  # float32 near the ends of a path


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_min_snr_weights_are_the_formula_in_double_precision(path):
    """What an error of the data is of each prediction, squared, times its weight: min(SNR, 5)."""
    s = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    alpha = {"linear": 1 - s, "gvp": (math.pi / 2 * s).cos(), "vp": (-0.25 * s**2 * 19.9 - 0.05 * s).exp()}[path]
    sigma = s if path == "linear" else (1 - alpha**2).sqrt()
    rates = [torch.autograd.grad(value.sum(), s, retain_graph=True)[0] for value in (alpha, sigma)]
    alpha, sigma = alpha.detach(), sigma.detach()
    errors = {"epsilon": alpha / sigma, "flow_prediction": rates[0] - rates[1] * alpha / sigma}
    if path == "linear":
        errors["sample"] = 1 / sigma.clamp(min=0.05)
    wanted = (alpha / sigma).square().clamp(max=5)
    point = path_point(path, s.detach())
    for kind, error in errors.items():
        found = min_snr_weight(kind, point, 5.0) * error.square()
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", [*list(RUNS)[:1], *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(RUNS)[1:])]
)
def test_a_run_resumes_bit_for_bit_and_its_card_says_what_it_was(tmp_path, capsys, kind, processes):
    whole = train_in_parts(capsys, tmp_path, *TINY, *RUNS[kind], processes=processes)
    name, value = RUNS[kind][-2].removeprefix("--").replace("-", "_"), RUNS[kind][-1]
    assert f"| {name} | {value} |" in (whole / "README.md").read_text()
    assert str(json.loads((whole / "run.json").read_text())[name]) == value


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_two_processes_train_as_one_does(tmp_path, capsys, kind):
    assert_two_processes_train_as_one(capsys, tmp_path, *TINY, *RUNS[kind], "--max-train-steps", "3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contrastive", "0.05", "--objective", "dit"], "--contrastive 0.05: it compares velocities.*dit's noise"),
        (["--contrastive", "0.05", "--objective", "flow-map"], "--contrastive 0.05: .* not flow-map's jumps"),
        (["--contrastive", "0.05", "--prediction", "score"], "--contrastive 0.05: .* not sit's score"),
        (["--contrastive", "1"], r"--contrastive 1.0: must be in \[0, 1\)"),
        (
            ["--contrastive", "0.05", "--unconditional", "true", "--train-data-dir", "x", "--vae", "none"],
            "classes apart, and the data has none",
        ),
        (
            ["--contrastive", "0.05", "--min-snr-gamma", "5"],
            "--contrastive 0.05: where --min-snr-gamma gives the error",
        ),
        (["--min-snr-gamma", "5", "--objective", "flow-map"], "--min-snr-gamma 5.0: .* a jump has two times"),
        (
            ["--min-snr-gamma", "5", "--prediction", "noise", "--loss-weighting", "velocity"],
            "--min-snr-gamma 5.0: is a weighting, and so is --loss-weighting velocity",
        ),
        (["--dispersive", "0.25", "--micro-batch-size", "1"], "--dispersive 0.25: .*use --micro-batch-size 2"),
        (["--dispersive", "0.25", "--dispersive-block", "7"], "--dispersive-block 7: the network has 6 blocks"),
        (["--dispersive", "-1"], "--dispersive -1.0: must be 0 or more"),
        (
            ["--dispersive", "1", "--align", "digits-classifier"],
            "--dispersive-block 3: with --align both look after one",
        ),
        (["--contrastive", "0.05", "--micro-batch-size", "1"], "--contrastive 0.05: .*use --micro-batch-size 2"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, message, tmp_path, monkeypatch):
    if "x" in arguments:
        from PIL import Image

        (tmp_path / "x").mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / "x" / "0.png")
        monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        plan_of(*arguments)
