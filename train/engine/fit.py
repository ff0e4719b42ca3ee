"""Whether steps, epochs, batch, warm-up and averaging fit each other, and what to tell the user where they do not."""

import math
import time

import torch

from d_emo.train.engine.memory import Launch
from d_emo.train.engine.plan import RunPlan

# A warm-up takes at most this share of a run: a longer one is shortened, so that short runs learn at all.
MAX_WARMUP_SHARE = 0.25
# Of the initial weights in the average at the end; more shows as noise in samples.
MAX_START_SHARE = 0.05
# Passes over the images beyond which a run, started from nothing, mostly learns them by heart.
MANY_EPOCHS = 5000
# A training step's products over a forward pass's: the pass, and gradients of inputs and of weights.
PASSES = 3
# A guess at the share of PyTorch's product rate that training reaches.
REACHED_RATE = 0.6
# Side of the matrices whose product is timed, and how often.
TIMED_SIDE, TIMED_REPEATS = 1024, 5


def fitting_warmup(asked: int, steps: int) -> int:
    """Steps of warm-up of a run of `steps`: as asked, at most a quarter of the run."""
    return min(asked, int(MAX_WARMUP_SHARE * steps))


def steps_of_epochs(epochs: float, size: int, global_batch_size: int) -> int:
    """Optimizer steps of so many passes over `size` images, at least one."""
    return max(1, math.ceil(epochs * size / global_batch_size))


def share_of_start(decay: float, warmup: bool, steps: int) -> float:
    """Share of the initial weights in the average after `steps`, in [0, 1].

    The product of every step's decay: `decay` itself, or with `warmup` at most (1 + n) / (10 + n) at the n-th.
    """
    if not warmup:
        return decay**steps
    grown = (10 * decay - 1) / (1 - decay)  # from here on (1 + n) / (10 + n) is above the decay
    early = min(steps, math.ceil(grown))
    product = math.exp(sum(math.log((1 + n) / (10 + n)) for n in range(1, early + 1)))
    return product * decay ** (steps - early)


def time_of_training(macs: int, images: int, launch: Launch, encoding: int = 0) -> str:
    """A rough time of a run on a CPU, for people; empty on other devices.

    Args:
        macs: multiply-adds of the network's forward pass of an image.
        images: that all processes see in all steps.
        launch: what the run computes on.
        encoding: multiply-adds of what is done with an image before, without gradients.
    """
    return time_on_cpu((PASSES * macs + encoding) * images / launch.processes, launch.device)


def time_on_cpu(macs: float, device: torch.device) -> str:
    """A rough time for so many multiply-adds of networks, for people; empty on other devices.

    From the rate of PyTorch's products on this machine, measured in some milliseconds, and a guess (`REACHED_RATE`). On
    a Zen 5 EPYC it was right for the digits' recipe (a minute for 46 seconds) and, since the kernels' products are
    faster there than PyTorch's, 2.4 times too long for S-2 (`docs/speed.md`).

    Args:
        macs: of a process, all of them.
        device: where.
    """
    if device.type != "cpu":
        return ""
    matrix = torch.rand(TIMED_SIDE, TIMED_SIDE)
    seconds = []
    for _ in range(TIMED_REPEATS):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - start)
    rate = TIMED_SIDE**3 / min(seconds)
    minutes = macs / (REACHED_RATE * rate) / 60
    if minutes < 90:
        return f"roughly {max(1, round(minutes))} min on this CPU"
    return f"roughly {minutes / 60:,.0f} hours on this CPU"


def notes(plan: RunPlan) -> list[str]:
    """Lines for the plan, one for every pair of settings that does not fit."""
    options, size, batch, steps = (
        plan.config.optimization, plan.source.size, plan.layout.global_batch_size, plan.max_train_steps
    )  # fmt: skip
    found = []
    kept = share_of_start(options.ema_decay, options.ema_warmup, steps)
    if kept > MAX_START_SHARE:
        fitting = math.exp(math.log(MAX_START_SHARE) / steps)
        found.append(
            f"after {steps:,} steps the average still holds {kept:.0%} of the initial weights, and what is drawn or "
            f"saved is of the average: use {'' if options.ema_warmup else '--ema-warmup true, or '}--ema-decay "
            f"{fitting:.4g} or less"
        )
    if size and batch > size:
        found.append(
            f"a batch of {batch} holds each of the {size} images {batch / size:.1f} times; "
            f"--global-batch-size {max(1, 2 ** int(math.log2(size)))} or less suits so few"
        )
    if size and steps * batch / size > MANY_EPOCHS:
        found.append(
            f"{steps:,} steps show each of the {size:,} images {steps * batch / size:,.0f} times; "
            "say how long to train with --max-train-steps, or in passes over the images"
        )
    if plan.config.run.checkpoint_every > steps:
        found.append(
            f"the first checkpoint is the last step's: --checkpoint-every {max(1, steps // 4)} saves on the way"
        )
    return found
