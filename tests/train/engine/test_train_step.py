"""One optimizer step, in process: averaging, accumulation, label dropout, non-finite losses."""

import copy

import pytest
import torch
from accelerate import Accelerator
from helpers.models import randomize

from d_emo.images.decode import UnreadableImageError
from d_emo.train.data.batches import Batch
from d_emo.train.data.sources import load_source
from d_emo.train.diffusion import trainer
from d_emo.train.diffusion.config import OptimizationOptions, parse_config
from d_emo.train.diffusion.plan import make_plan
from d_emo.train.engine import loop
from d_emo.train.engine.averaging import WeightAverage
from d_emo.train.engine.finite import FiniteSteps
from d_emo.train.engine.run import NonFiniteLossError


def make_run(*arguments):
    base = ["--model", "D-EMOv2-N-8", "--global-batch-size", "8", "--max-train-steps", "5", "--report-to", "none"]
    config = parse_config([*base, *arguments])
    source = load_source(config.data)
    accelerator = Accelerator(cpu=True)
    plan = make_plan(config, source, accelerator)
    run = trainer.make_run(plan, accelerator)
    randomize(run.model)
    run.average.module.load_state_dict(run.model.state_dict())
    run.model.train()
    return run


def train_step(run, batches):
    return loop.train_step(run, batches, lambda batch: trainer.batch_loss(run, batch))


def steps(run, count):
    batches = iter(trainer.make_loader(run))
    return [train_step(run, batches)[0].item() for _ in range(count)]


@pytest.mark.parametrize("objective", ["dit", "sit"])
def test_a_step_changes_weights_and_lowers_the_loss_on_its_batch(objective):
    run = make_run("--objective", objective, "--learning-rate", "1e-3")
    batch = next(iter(trainer.make_loader(run)))
    before = trainer.batch_loss(run, batch).item()
    for _ in range(30):
        train_step(run, iter([batch]))
    assert trainer.batch_loss(run, batch).item() < 0.8 * before


def test_average_holds_parameters_and_buffers_after_each_step():
    run = make_run("--ema-decay", "0.9", "--ema-warmup", "false")
    expected = {name: value.clone() for name, value in run.average.module.state_dict().items()}
    for _ in range(3):
        steps(run, 1)
        run_values = run.model.state_dict()
        expected = {name: 0.9 * value + 0.1 * run_values[name] if value.is_floating_point() else value
                    for name, value in expected.items()}  # fmt: skip
    averaged = run.average.module.state_dict()
    moved = "blocks.0.i2rmb.conv_norm.running_mean"
    assert (averaged[moved] - run.model.state_dict()[moved]).abs().max() > 1e-4
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(averaged[name], value, atol=1e-6, rtol=1e-5, msg=name)


def test_average_starts_at_the_models_values_not_at_the_first_step():
    model = torch.nn.Linear(2, 2)
    average = WeightAverage(model, OptimizationOptions(ema_decay=0.5, ema_warmup=False))
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    average.update_parameters(model)
    torch.testing.assert_close(average.module.weight, start + 0.5)


def test_warm_up_follows_its_formula():
    model = torch.nn.Linear(2, 2)
    average = WeightAverage(model, OptimizationOptions(ema_decay=0.9999, ema_warmup=True))
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    average.update_parameters(model)
    torch.testing.assert_close(average.module.weight, start + (1 - 2 / 11))


def applied_gradients(run) -> dict[str, torch.Tensor]:
    """The gradients that the optimizer gets in one step."""
    seen = {}

    def record(*_):
        seen.update({name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None})

    run.optimizer.optimizer.register_step_pre_hook(record)
    steps(run, 1)
    return seen


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    """BatchNorm in eval mode, so that micro batches are independent."""
    gradients = []
    for micro in ("8", "2"):
        run = make_run("--micro-batch-size", micro)
        run.model.eval()
        gradients.append(applied_gradients(run))
    assert gradients[0]["proj_out.weight"].abs().max() > 1e-3
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_clipping_limits_the_gradient():
    def norm(limit):
        gradients = applied_gradients(make_run("--max-grad-norm", limit))
        return sum(value.square().sum() for value in gradients.values()).sqrt().item()

    assert norm("1e-3") == pytest.approx(1e-3, rel=1e-2)
    assert norm("1e6") > 1e-2


def test_labels_are_dropped_once_a_sample_with_the_given_probability():
    run = make_run()
    labels = torch.full((20_000,), 3)
    dropped = trainer.drop_labels(labels, run.draws.of(range(20_000))["label_dropout"], run.plan)
    assert set(dropped.tolist()) == {3, 10}
    assert (dropped == 10).float().mean().item() == pytest.approx(0.1, abs=0.011)  # five standard errors
    again = trainer.drop_labels(labels[:5], run.draws.of(range(7, 12))["label_dropout"], run.plan)
    assert torch.equal(again, dropped[7:12])


def test_a_non_finite_loss_stops_before_weights_average_and_step_change():
    run = make_run()
    steps(run, 1)
    weights, average = copy.deepcopy(dict(run.model.named_parameters())), copy.deepcopy(run.average.module.state_dict())
    batch = next(iter(trainer.make_loader(run)))
    broken = Batch(torch.full_like(batch.images, float("nan")), batch.labels, batch.positions, [])
    with pytest.raises(NonFiniteLossError, match=r"step 2, process 0: loss \[nan\].*weights were not changed"):
        train_step(run, iter([broken]))
    assert run.step == 1
    assert all(torch.equal(value, weights[name]) for name, value in run.model.named_parameters())
    assert all(torch.equal(value, average[name]) for name, value in run.average.module.state_dict().items())


def test_draws_that_come_ahead_are_those_of_the_step():
    run = make_run()
    batch = next(iter(trainer.make_loader(run)))
    assert {*batch.draws} == {"time", "label_dropout", "noise"}
    alone = Batch(batch.images, batch.labels, batch.positions, [])
    run.model.eval()
    assert trainer.batch_loss(run, batch).item() == trainer.batch_loss(run, alone).item()


def test_noise_of_the_device_is_a_function_of_seed_and_position():
    """Another run than with the CPU's noise, the same one each time and with every micro batch."""
    loss, ahead = {}, {}
    for micro in ("8", "2"):
        run = make_run("--noise-on", "device", "--micro-batch-size", micro)
        run.model.eval()  # micro batches are independent of each other
        batches = iter(trainer.make_loader(run))
        ahead = next(batches).draws
        loss[micro] = steps(run, 1)[0]
    assert {*ahead} == {"time", "label_dropout"}
    assert loss["8"] == pytest.approx(loss["2"], rel=1e-5)
    run = make_run()
    run.model.eval()
    assert steps(run, 1)[0] != pytest.approx(loss["8"], rel=1e-4)


@pytest.mark.parametrize("accumulated", ["8", "4"])
def test_a_non_finite_step_that_is_asked_for_later_changes_nothing(accumulated):
    """As on a GPU: one NaN picture between two log lines, a good step after it, then the line."""
    run = make_run("--micro-batch-size", accumulated)
    run.finite = FiniteSteps(run.model, run.optimizer, deferred=True)
    batches = iter(trainer.make_loader(run))
    train_step(run, batches)
    loop.refuse_bad_step(run)
    weights, average = copy.deepcopy(run.model.state_dict()), copy.deepcopy(run.average.module.state_dict())
    moments = copy.deepcopy(run.optimizer.state_dict()["state"])
    good = [next(batches) for _ in range(8 // int(accumulated))]
    broken = copy.deepcopy(good)
    broken[0].images[0] = float("nan")  # one picture
    train_step(run, iter(broken))
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    for name, value in run.average.module.state_dict().items():
        assert torch.equal(value, average[name]), name
    for number, state in run.optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, moments[number][name]) for name, value in state.items()), number
    train_step(run, iter(good))
    assert not torch.equal(run.model.state_dict()["proj_out.weight"], weights["proj_out.weight"])
    with pytest.raises(NonFiniteLossError, match=r"step 2, process 0: loss \[nan.*Samples 8 to 15.*not changed by it"):
        loop.refuse_bad_step(run)


@pytest.mark.parametrize("optimizer", ["weights", "moments", "average"])
def test_steps_that_are_asked_for_later_are_the_same_steps(optimizer):
    """Nothing but the asking is different: the same weights, moments (bit for bit) and average (to rounding)."""
    runs = [make_run("--ema-decay", "0.9"), make_run("--ema-decay", "0.9")]
    runs[1].finite = FiniteSteps(runs[1].model, runs[1].optimizer, deferred=True)
    for run in runs:
        steps(run, 3)
    states = {
        "weights": [run.model.state_dict() for run in runs],
        "moments": [
            {f"{number} {name}": value for number, state in run.optimizer.state_dict()["state"].items()
             for name, value in state.items()}
            for run in runs
        ],
        "average": [run.average.module.state_dict() for run in runs],
    }[optimizer]  # fmt: skip
    tolerance = 1e-6 if optimizer == "average" else 0
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=tolerance, rtol=tolerance, msg=name)


def test_unreadable_images_stop_or_are_named(capsys):
    run = make_run()
    batch = Batch(torch.zeros(1, 1, 16, 16), torch.zeros(1), [0], ["cat/1.png cannot be read (cut)"])
    with pytest.raises(UnreadableImageError, match=r"cat/1\.png.*--on-bad-image skip"):
        loop.report_bad_images(run, batch)
    loop.report_bad_images(make_run("--on-bad-image", "skip"), batch)
    assert "skipped: cat/1.png cannot be read (cut)" in capsys.readouterr().out


def test_gradient_checkpointing_gives_the_same_losses():
    plain, saving = (steps(make_run(*flag), 3) for flag in ([], ["--gradient-checkpointing"]))
    assert plain == pytest.approx(saving, rel=1e-5)
