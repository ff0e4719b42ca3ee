"""What a plan says of a GPU (`train_dit.py --dry-run --on`) beside what was measured on it.

    python -m d_emo.eval.benchmarks.gpu.planned docs/data/h100

Of every training step that `first_run` measured: milliseconds, and memory besides weights and optimizer, as planned and
as measured. Then what `d_emo.train.engine.roofline` and `d_emo.train.diffusion.on_gpus` hold, as the measurements give
it: how many times longer than at the card's rates operators take, by kind, and the share of activations that compiled
blocks keep. `--steps` writes the measured steps for plans, which take them where a run is one of them.
"""

import argparse
import csv
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d_emo import create_model
from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.files import check_writable, make_folder, written_whole
from d_emo.common.gpus import Fleet, Gpu, find_gpu
from d_emo.eval.benchmarks.gpu.parts import RESULTS
from d_emo.eval.benchmarks.gpu.report import of_kind, table
from d_emo.eval.benchmarks.gpu.results import read_results
from d_emo.train.diffusion.config import OptimizationOptions
from d_emo.train.diffusion.memory import DiffusionStep
from d_emo.train.diffusion.on_gpus import kept_by_compiled
from d_emo.train.diffusion.optimizer import make_optimizer
from d_emo.train.engine.memory import Launch
from d_emo.train.engine.roofline import COMPILED, OPTIMIZER_BYTES, UNCOMPILED, Work

HEADER = ("gpu", "model", "batch", "side", "compiled", "checkpointed", "seconds")
# Batches from which on the card is the limit and not the launches.
LARGE = 64
_CASE = re.compile(r"train bfloat16, batch (\d+), (\d+)x\d+(, compiled)?")


@dataclass(frozen=True)
class Measured:
    """A training step that was measured, and what is counted of it.

    Attributes:
        gpu: the card.
        model: a size's name.
        batch: images.
        side: of their latents.
        compiled: whether blocks were.
        checkpointed: whether activations were computed again.
        seconds: of the step.
        held: bytes at the most beside weights and the optimizer's state; the gradients were made anew in every step.
        work: of forward and backward pass.
        activations: bytes, counted.
        optimizing: seconds of the optimizer at the card's bandwidth.
        kept: of the activations, the share that plans take compiled blocks to keep.
    """

    gpu: Gpu
    model: str
    batch: int
    side: int
    compiled: bool
    checkpointed: bool
    seconds: float
    held: float
    work: Work
    activations: int
    optimizing: float
    kept: float

    @property
    def least(self) -> tuple[float, float, float]:
        """Seconds at the card's rates: products, this package's kernels, the rest with the optimizer."""
        products, kernels, rest = self.work.least(self.gpu, self.gpu.bfloat16)
        return products, kernels, rest + self.optimizing

    @property
    def planned_seconds(self) -> float:
        """As a plan has it that does not know the measured one."""
        shares = COMPILED if self.compiled else UNCOMPILED
        return self.work.seconds(self.gpu, self.gpu.bfloat16, shares) + shares.rest * self.optimizing

    @property
    def planned_bytes(self) -> float:
        """As a plan has it."""
        return self.activations * (self.kept if self.compiled else 1)


def measured_steps(folder: Path) -> list[Measured]:
    """The training steps in a folder's results, with this package's kernels.

    Raises:
        ValueError: the card is not in the table of `d_emo.common.gpus`.
    """
    lines = read_results(folder / RESULTS)
    card = next((line["gpu"] for line in of_kind(lines, "facts")), "")
    gpu = find_gpu(card)
    if gpu is None:
        raise ValueError(f"{folder}: plans know nothing of {card or 'its card'}.")
    counted: dict[tuple[Any, ...], DiffusionStep] = {}
    found = []
    for line in of_kind(lines, "speed"):
        case = _CASE.fullmatch(line["case"])
        name, _, variant = line["model"].partition("@")
        if case is None or variant not in ("", "checkpointed") or "ms" not in line:
            continue
        batch, side, checkpointed = int(case[1]), int(case[2]), bool(variant)
        step = counted.setdefault((name, batch, side), _step(gpu, name, batch, side))
        values = sum(parameter.numel() for parameter in step.model.parameters() if parameter.requires_grad)
        found.append(
            Measured(
                *(gpu, name, batch, side, bool(case[3]), checkpointed),
                seconds=line["ms"] / 1e3,
                held=2**20 * line["peak_mib"],
                work=step.work(checkpointed),
                activations=step.memory(checkpointed).activations,
                optimizing=OPTIMIZER_BYTES * values / gpu.bandwidth,
                kept=kept_by_compiled(step.model),
            )
        )
    return found


def _step(gpu: Gpu, name: str, batch: int, side: int) -> DiffusionStep:
    with torch.device("meta"):
        model = create_model(name, sample_size=side).train()
    return DiffusionStep(
        model=model,
        followed=0,
        plain=None,
        optimizer="AdamW",
        make_optimizer=lambda module: make_optimizer(module, OptimizationOptions()),
        launch=Launch(torch.device("cpu"), autocast=True, fleet=Fleet(1, gpu)),
        micro_batch=batch,
        vae=None,
        images=None,
    )


def fitted(steps: Sequence[Measured]) -> dict[str, float]:
    """What fits the measurements best, in relative errors.

    Compiled steps give the shares of products, kernels and the rest. Uncompiled ones have the first two in common with
    them; large ones give the share of the rest, small ones what launches take. Nothing where there are too few.
    """
    compiled, plain = ([step for step in steps if step.compiled == way] for way in (True, False))
    large, small = ([step for step in plain if (step.batch >= LARGE) == way] for way in (True, False))
    kept = {ours: [step.held / step.activations for step in compiled if step.model.startswith("D-EMOv2") == ours]
            for ours in (True, False)}  # fmt: skip
    if len(compiled) < 3 or len(small) < 2 or not large or not all(kept.values()):
        return {}
    products, kernels, rest = _shares(compiled)
    uncompiled = statistics.mean(
        (step.seconds - products * step.least[0] - kernels * step.least[1]) / step.least[2] for step in large
    )
    launches = np.array([[len(step.work.products) + len(step.work.rest), len(step.work.kernels)] for step in small])
    launch, kernel_launch = _least_squares(launches, [step.seconds - uncompiled * step.optimizing for step in small])
    return {
        "products": products,
        "kernels": kernels,
        "rest, compiled": rest,
        "rest, uncompiled": uncompiled,
        "microseconds of a launch": 1e6 * launch,
        "microseconds of a kernel's launch": 1e6 * kernel_launch,
        "kept by compiled blocks": statistics.mean(kept[True]),
        "kept by DiT's": statistics.mean(kept[False]),
    }


def _shares(steps: Sequence[Measured]) -> list[float]:
    return _least_squares(np.array([step.least for step in steps]), [step.seconds for step in steps])


def _least_squares(parts: np.ndarray, whole: Sequence[float]) -> list[float]:
    return [
        float(value) for value in np.linalg.lstsq(parts / np.array(whole)[:, None], np.ones(len(whole)), rcond=None)[0]
    ]


def report(steps: Sequence[Measured]) -> str:
    """Markdown: the steps, and what they give."""
    rows = [
        [
            step.model,
            f"batch {step.batch}, {step.side} x {step.side}"
            + ", compiled" * step.compiled
            + ", checkpointed" * step.checkpointed,
            f"{1e3 * step.seconds:.1f}",
            f"{1e3 * step.planned_seconds:.1f}",
            f"{step.planned_seconds / step.seconds:.2f}",
            f"{step.held / 2**30:.1f}",
            f"{step.planned_bytes / 2**30:.1f}",
            f"{step.planned_bytes / step.held:.2f}",
        ]
        for step in steps
    ]
    header = ["model", "step", "ms", "planned", "ratio", "GiB", "planned", "ratio"]
    found = [[name, f"{value:.3g}"] for name, value in fitted(steps).items()]
    if not found:
        return f"{table(header, rows)}\n\nToo few steps to fit the factors to: the run was cut off."
    return f"{table(header, rows)}\n\n{table(['of the measurements', ''], found)}"


def write_steps(steps: Sequence[Measured], path: Path) -> None:
    """The measured steps as plans read them."""
    with written_whole(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        for step in steps:
            case = (step.batch, step.side, int(step.compiled), int(step.checkpointed))
            writer.writerow((step.gpu.name, step.model, *case, f"{step.seconds:.6f}"))


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("planned", __doc__)
    parser.add_argument("folder", type=Path, help="With the results of first_run.")
    parser.add_argument("--steps", type=Path, help="File for the measured steps: train/engine/measured_steps.csv.")
    options = parser.parse_args(arguments)
    if options.steps:
        check_writable(options.steps, "--steps")
    return options


@command("planned", extra="eval")
def main(arguments: list[str]) -> None:
    """Read the options, then print."""
    options = parse(arguments)
    try:
        steps = measured_steps(options.folder)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{options.folder / RESULTS} is damaged, or not what first_run writes: {error!r}.") from error
    print(report(steps))
    if options.steps:
        make_folder(options.steps.parent)
        write_steps(steps, options.steps)


if __name__ == "__main__":
    main(sys.argv[1:])
