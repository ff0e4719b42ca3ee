"""Learning rates and decay by parameter name, and the schedule of the paper's systems."""

import pytest
import torch
from torch import nn

from d_emo import create_segmenter
from d_emo.train.engine.task_optimizer import make_optimizer, parameter_groups, rate_factor
from d_emo.train.engine.task_options import TaskOptimizationOptions


def of(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    """Rate and decay of every parameter that learns, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def test_segformers_published_rates():
    """Config and log: 1.2e-4 without decay for the backbone's norms, 1.2e-3 with 0.05 for all of the decode head."""
    with torch.device("meta"):
        model = create_segmenter("EMOv2-1M", "semantic_fpn")
    groups = parameter_groups(model, TaskOptimizationOptions(lr_multipliers="decode_head.=10"))
    found = of(model, groups)
    assert {*found} == {name for name, _ in model.named_parameters()}
    heads = {name: values for name, values in found.items() if name.startswith("decode_head.")}
    assert {*heads.values()} == {(10 * 1.2e-4, 0.05)}
    assert "decode_head.classifier.bias" in heads
    necks = {values for name, values in found.items() if name.startswith("neck.")}
    assert necks == {(1.2e-4, 0.05)}
    for name, values in found.items():
        if name.startswith("backbone."):
            assert values == (1.2e-4, 0.0 if "norm" in name else 0.05), name
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (1.2e-4, 0.05)  # what logs show


def test_vectors_do_not_decay_where_that_is_asked_for():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    found = of(model, parameter_groups(model, TaskOptimizationOptions(no_weight_decay="vectors")))
    assert {name: decay for name, (_, decay) in found.items()} == {
        "0.weight": 0.05, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0,
    }  # fmt: skip


def test_the_longest_beginning_counts_and_frozen_parameters_are_left_out():
    model = nn.ModuleDict({"head": nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), "c": nn.Linear(2, 2)})
    model["c"].requires_grad_(False)
    options = TaskOptimizationOptions(lr_multipliers="head.=10, head.b=0.5", learning_rate=1.0)
    found = of(model, make_optimizer(model, options).param_groups)
    assert {name: rate for name, (rate, _) in found.items()} == {
        "head.a.weight": 10.0, "head.a.bias": 10.0, "head.b.weight": 0.5, "head.b.bias": 0.5,
    }  # fmt: skip


def test_a_name_that_begins_no_parameter_is_refused():
    with pytest.raises(ValueError, match=r"--lr-multipliers: no parameter .*'decode\.'; these do: weight\., bias\."):
        parameter_groups(nn.Linear(2, 2), TaskOptimizationOptions(lr_multipliers="decode.=10"))


def test_a_name_without_decay_that_no_parameter_has_is_refused():
    model = nn.Sequential(nn.Linear(2, 2))
    message = r"^--no-weight-decay: no parameter has 'nrom' in its name; their names are such as 0\.weight, 0\.bias\.$"
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, TaskOptimizationOptions(no_weight_decay="bias, nrom"))
    groups = parameter_groups(model, TaskOptimizationOptions(no_weight_decay="bias,vectors"))
    assert of(model, groups) == {"0.weight": (1.2e-4, 0.05), "0.bias": (1.2e-4, 0.0)}


@pytest.mark.parametrize("text", ["decode_head", "=10", "decode_head.=zero", "a=-1", "a=nan", "a=inf"])
def test_multipliers_that_are_none(text):
    with pytest.raises(ValueError, match="lr-multipliers"):
        TaskOptimizationOptions(lr_multipliers=text)


def test_deeplabv3s_published_schedule():
    """80,000 steps: from 1e-5 over 500, 1, cosine from the half on; the log has 1.2e-4 at 40000, 6.0e-5 at 60000."""
    factor = rate_factor(TaskOptimizationOptions(), 80_000, 500, 631.6)
    assert [factor(step) for step in (0, 500, 20_000, 40_000, 60_000, 80_000)] == pytest.approx(
        [1e-5, 1, 1, 1, 0.5, 0], abs=1e-12
    )


def test_retinanets_published_schedule_falls_once_an_epoch():
    """12 epochs of 7330 steps: the log has 1.5e-4 of 2e-4 in epoch 9 and 1.34e-5 in epoch 12, counted from 1."""
    factor = rate_factor(TaskOptimizationOptions(lr_decay_unit="epoch"), 12 * 7330, 500, 7330.0)
    rates = [2e-4 * factor(step) for step in (8 * 7330, 9 * 7330 - 1, 11 * 7330, 12 * 7330 - 1)]
    assert rates == pytest.approx([1.5e-4, 1.5e-4, 1.34e-5, 1.34e-5], rel=1e-3)


def test_v_emov2s_published_schedule_is_stopped_before_its_end():
    """200 epochs: from 0.1 over 30, a cosine over 190 more to 0.1, stopped at 200: 1.244e-5 of 1e-4 (log)."""
    options = TaskOptimizationOptions(lr_warmup_ratio=0.1, lr_decay_start=0.15, lr_decay_end=1.1, min_lr_ratio=0.1)
    factor = rate_factor(options, 200_000, 30_000, 1000.0)
    assert [factor(step) for step in (0, 15_000, 30_000)] == pytest.approx([0.1, 0.55, 1])
    assert 1e-4 * factor(200_000) == pytest.approx(1.244e-5, rel=1e-3)
