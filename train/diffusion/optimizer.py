"""What changes the weights: AdamW, or Muon beside it, and the learning rate's schedule."""

import torch
from diffusers.optimization import get_scheduler
from transformers.optimization import get_wsd_schedule

from d_emo.common.messages import first_line
from d_emo.train.diffusion.config import WSD, OptimizationOptions
from d_emo.train.engine.muon import MuonWithAdamW, is_muons
from d_emo.train.engine.weight_decay import check_undecayed, decays, undecayed

# Schedules of Diffusers that have no warm-up.
WITHOUT_WARMUP = ("constant", "piecewise_constant")


def make_optimizer(model: torch.nn.Module, options: OptimizationOptions) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters, in groups with and without decay.

    Raises:
        ValueError: a part of --no-weight-decay is in no parameter's name.
    """
    parts = undecayed(options.no_weight_decay)
    check_undecayed(parts, [name for name, _ in model.named_parameters()])
    groups: dict[tuple[bool, bool], dict] = {}  # whether Muon moves them and whether they decay; decaying ones first
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for name, parameter in trained:
        key = (options.optimizer == "muon" and is_muons(name, parameter), decays(name, parameter, parts))
        group = groups.setdefault(key, {"params": [], "weight_decay": options.weight_decay if key[1] else 0.0})
        group["params"].append(parameter)
    matrices, others = (
        [groups[muons, decayed] for decayed in (True, False) if (muons, decayed) in groups] for muons in (True, False)
    )
    betas = (options.adam_beta1, options.adam_beta2)
    if options.optimizer == "muon":
        return MuonWithAdamW(matrices, others, options.learning_rate, betas)
    return torch.optim.AdamW(others, lr=options.learning_rate, betas=betas, fused=True)


def describe_optimizer(model: torch.nn.Module, options: OptimizationOptions) -> str:
    """What moves how much of a model, for people."""
    if options.optimizer == "adamw":
        return "AdamW"
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [parameter.numel() for name, parameter in trained if is_muons(name, parameter)]
    rest = sum(parameter.numel() for _, parameter in trained) - sum(matrices)
    return f"Muon for {len(matrices)} matrices ({sum(matrices):,} parameters), AdamW for the other {rest:,}"


def make_lr_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizationOptions, warmup: int, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule of Diffusers or transformers that counts optimizer steps, whatever the number of processes.

    Args:
        optimizer: whose rate it is.
        options: say which.
        warmup: steps of it.
        steps: of the run.

    Raises:
        ValueError: there is no such schedule.
    """
    if options.lr_scheduler == WSD:
        return get_wsd_schedule(
            optimizer,
            num_warmup_steps=warmup,
            num_decay_steps=min(round(options.lr_cooldown_share * steps), steps - warmup),
            num_training_steps=steps,
            decay_type=options.lr_cooldown,
        )
    try:
        return get_scheduler(
            options.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"--lr-scheduler {options.lr_scheduler}: {first_line(error)}, or {WSD}.") from error
