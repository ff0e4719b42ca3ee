"""AdamW and its schedule as the paper's systems are trained: rates and decay by parameter name, a late cosine.

Source: the authors' configurations and logs (github:zhangzjn/EMOv2 at 582a96f), run in mmengine 0.10.
"""

import math
from collections.abc import Callable

import torch

from d_emo.train.engine.task_options import TaskOptimizationOptions
from d_emo.train.engine.weight_decay import check_undecayed, decays


def parameter_groups(model: torch.nn.Module, options: TaskOptimizationOptions) -> list[dict]:
    """AdamW's groups of the parameters that learn: one for every rate and decay that occurs.

    The one with the options' own rate and decay comes first where there is one, since its rate is the one that logs
    show.

    Raises:
        ValueError: a name of --lr-multipliers begins no parameter's, or one of --no-weight-decay is part of none's.
    """
    multipliers, undecayed = options.multipliers(), options.undecayed()
    everything = [name for name, _ in model.named_parameters()]
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for beginning in multipliers:
        if not any(name.startswith(beginning) for name in learning):
            tops = ", ".join(dict.fromkeys(name.split(".")[0] + "." for name in learning))
            raise ValueError(f"--lr-multipliers: no parameter that learns begins with {beginning!r}; these do: {tops}.")
    check_undecayed(undecayed, everything)
    groups: dict[tuple[float, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in learning.items():
        beginnings = [beginning for beginning in multipliers if name.startswith(beginning)]
        factor = multipliers[max(beginnings, key=len)] if beginnings else 1.0
        groups.setdefault((factor, decays(name, parameter, undecayed)), []).append(parameter)
    order = sorted(groups, key=lambda group: (group != (1.0, True), group))
    return [
        {
            "params": groups[factor, decayed],
            "lr": options.learning_rate * factor,
            "weight_decay": options.weight_decay if decayed else 0.0,
        }
        for factor, decayed in order
    ]


def make_optimizer(model: torch.nn.Module, options: TaskOptimizationOptions) -> torch.optim.Optimizer:
    """AdamW on `parameter_groups`."""
    return torch.optim.AdamW(
        parameter_groups(model, options),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        fused=True,
    )


def rate_factor(
    options: TaskOptimizationOptions, steps: int, warmup: int, steps_per_epoch: float
) -> Callable[[int], float]:
    """What the learning rates are multiplied by at a step, from 0 on.

    Linear from `lr_warmup_ratio` to 1 in `warmup` steps, 1, and then with "cosine" down to `min_lr_ratio`.

    Args:
        options: of the optimizer.
        steps: of the run.
        warmup: steps of it.
        steps_per_epoch: for a cosine that falls once an epoch.
    """
    start, end = options.lr_decay_start * steps, options.lr_decay_end * steps

    def factor(step: int) -> float:
        if step < warmup:
            return options.lr_warmup_ratio + (1 - options.lr_warmup_ratio) * step / warmup
        if options.lr_decay == "constant":
            return 1.0
        if options.lr_decay_unit == "epoch":
            # The small share undoes the rounding of whole epochs.
            step = math.floor(step / steps_per_epoch + 1e-6) * steps_per_epoch  # type: ignore[assignment]
        share = min(1.0, max(0.0, (step - start) / (end - start)))
        return options.min_lr_ratio + (1 - options.min_lr_ratio) * (1 + math.cos(math.pi * share)) / 2

    return factor
