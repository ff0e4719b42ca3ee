"""Muon beside AdamW, decay by name, and the schedule that cools down at its end."""

import copy
import math
import re

import pytest
import torch
from helpers.models import randomize, tiny_model
from helpers.training import TINY, run_here

from d_emo import create_model
from d_emo.train.diffusion.config import OptimizationOptions, parse_config
from d_emo.train.diffusion.optimizer import describe_optimizer, make_lr_schedule, make_optimizer
from d_emo.train.engine.muon import MuonWithAdamW, is_muons

RATE, DECAY = 1e-2, 0.1
MUON = OptimizationOptions(optimizer="muon", learning_rate=RATE, weight_decay=DECAY, adam_beta2=0.9)


def trained(model):
    """What learns, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def with_gradients(seed=0):
    """A tiny model, no weight or gradient of which is zero."""
    model = randomize(tiny_model())
    torch.manual_seed(seed)
    for parameter in trained(model).values():
        parameter.grad = torch.randn_like(parameter)
    return model


def orthogonalized(matrix):
    """Five steps of x <- a x + b (x x') x + c (x x')^2 x, in bfloat16, of the matrix over its norm; wide ones only."""
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.T).T
    x = matrix.bfloat16()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def test_a_step_is_moonlights_for_matrices_and_adamws_for_the_rest():
    model = with_gradients()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    make_optimizer(model, MUON).step()
    for name, parameter in trained(model).items():
        old, gradient = before[name] * (1 - RATE * DECAY), parameter.grad
        if is_muons(name, parameter):
            momentum = gradient * (1 - 0.95)  # of zeros before
            # Nesterov's look ahead, rounded as PyTorch does: in bfloat16 a last bit is no small one.
            step = orthogonalized(torch.lerp(gradient, momentum, 0.95))
            expected = old - RATE * 0.2 * math.sqrt(max(parameter.shape)) * step.float()
        else:
            expected = old - RATE * gradient / (gradient.abs() + 1e-8)  # AdamW's first step
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-6, msg=name)


def test_muons_steps_have_singular_values_near_one_and_adamws_size():
    model = with_gradients()
    matrices = {name: p for name, p in model.named_parameters() if is_muons(name, p)}
    before = {name: p.detach().clone().double() for name, p in matrices.items()}
    make_optimizer(model, OptimizationOptions(optimizer="muon", learning_rate=RATE)).step()
    for name, parameter in matrices.items():
        step = (before[name] - parameter.detach().double()) / RATE
        values = torch.linalg.svdvals(step) / (0.2 * math.sqrt(max(parameter.shape)))
        assert values.max() < 1.3 and values.median() > 0.6, name  # the iteration stops between 0.7 and 1.2
        assert 0.1 < step.square().mean().sqrt() < 0.25, name  # 0.2, as Moonlight measures AdamW's


def test_every_inner_matrix_is_muons_and_nothing_else():
    with torch.device("meta"):
        model, dit = create_model("D-EMOv2-S-2"), create_model("DiT-S-2")
    names = {re.sub(r"blocks\.\d+", "blocks.0", name) for name, p in model.named_parameters() if is_muons(name, p)}
    assert names == {"blocks.0.i2rmb.attn.to_qkv.weight", "blocks.0.i2rmb.proj_out.weight"}
    names = {re.sub(r"blocks\.\d+", "blocks.0", name) for name, p in dit.named_parameters() if is_muons(name, p)}
    assert names == {f"blocks.0.{layer}.weight" for layer in ("to_qkv", "to_out", "mlp_in", "mlp_out")}
    optimizer = make_optimizer(model, MUON)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({*map(id, grouped)}) == len(trained(model))
    assert describe_optimizer(model, MUON).startswith("Muon for 24 matrices (")


def test_a_restored_optimizer_goes_on_bit_for_bit():
    models = [with_gradients(), with_gradients()]
    first, second = (make_optimizer(model, MUON) for model in models)
    for _ in range(2):
        first.step()
    models[1].load_state_dict(models[0].state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer in (first, second):
        for group in optimizer.param_groups:
            group["lr"] = RATE / 2  # as a schedule does
        optimizer.step()
    assert isinstance(second, MuonWithAdamW)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_leaves_out_what_is_named(optimizer):
    model = with_gradients()
    options = OptimizationOptions(optimizer=optimizer, weight_decay=DECAY, no_weight_decay="vectors,label_embed")
    made = make_optimizer(model, options)
    decays = {id(p): group["weight_decay"] for group in made.param_groups for p in group["params"]}
    for name, parameter in trained(model).items():
        assert decays[id(parameter)] == (0 if parameter.ndim == 1 or "label_embed" in name else DECAY), name
    with pytest.raises(ValueError, match="--no-weight-decay: no parameter has 'modulaton' in its name"):
        make_optimizer(model, OptimizationOptions(no_weight_decay="modulaton"))


@pytest.mark.parametrize("shape", ["1-sqrt", "linear", "cosine"])
def test_a_rate_that_is_stable_and_then_goes_down(shape):
    options = OptimizationOptions(learning_rate=1.0, lr_scheduler="wsd", lr_cooldown=shape, lr_cooldown_share=0.25)
    optimizer = make_optimizer(tiny_model(), options)
    schedule = make_lr_schedule(optimizer, options, 10, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:10] == pytest.approx([step / 10 for step in range(10)]) and rates[10:75] == [1.0] * 65
    fall = {
        "1-sqrt": lambda x: 1 - x**0.5,
        "linear": lambda x: 1 - x,
        "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
    }
    assert rates[75:] == pytest.approx([fall[shape](step / 25) for step in range(25)], abs=1e-9)
    assert optimizer.param_groups[0]["lr"] == 0


def test_a_plan_names_the_optimizer_and_counts_its_state(tmp_path, capsys):
    said = {}
    for optimizer in ("adamw", "muon"):
        more = ("--optimizer", optimizer, "--lr-scheduler", "wsd", "--dry-run", "--output-dir", tmp_path)
        code, said[optimizer] = run_here(capsys, *TINY[:-4], "--lr-warmup-steps", "50", *more)
        assert code == 0, said[optimizer]
    assert re.search(r"optimizer +Muon for 12 matrices \([\d,]+ parameters\), AdamW for the other", said["muon"])
    assert "(wsd, 50 steps of warm-up, 1-sqrt down over the last 20%)" in said["muon"]
    sizes = [
        float(re.search(rf"{name} ([\d.]+) MiB", said[optimizer])[1])
        for optimizer, name in (("adamw", "AdamW"), ("muon", "Muon and AdamW"))
    ]
    assert 0.5 < sizes[1] / sizes[0] < 0.9  # one moment instead of two for the matrices


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--optimizer", "muon", "--init-from", "x", "--lora-rank", "4"],
            "--optimizer muon: Muon is for whole matrices",
        ),
        (["--lr-cooldown-share", "0.5"], "--lr-cooldown-share 0.5: belongs to --lr-scheduler wsd"),
        (["--lr-cooldown", "linear"], "--lr-cooldown linear: belongs to --lr-scheduler wsd"),
        (["--lr-scheduler", "wsd", "--lr-cooldown-share", "0"], "must be above 0, at most 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_config([*TINY[:-4], *arguments])
