"""What D-EMOv2's definition leaves open, one thing at a time: losses of variants, and of DiT, in the same batches.

    python -m d_emo.eval.benchmarks.gpu.definition --data cifar10-train.parquet --output-dir runs/definition
    python -m d_emo.eval.benchmarks.gpu.definition ... --variants "no norm" "GELU later" --learning-rate 2e-3

Every model is trained at every learning rate and seed, D-EMOv2 also as every variant, one after the other for equal
steps: the same pictures, noise and times in the same order, the rate falling to 0 over the last quarter. A folder for
each in the output, with loss.csv. At the end of each comes the loss of its averaged network, with BatchNorm's running
statistics, as samples are drawn, and after all of them a table of everything that the folder holds. A finished run is
not made again: a call that was ended goes on, and further variants can be added. On a GPU a step is one CUDA graph; on
a CPU choose a narrow network. `--tiny` rehearses it.
"""

import argparse
import csv
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import CommandError, command
from d_emo.common.files import read_json, write_json
from d_emo.common.numbers import finite_from, seed, whole_from
from d_emo.common.output import say
from d_emo.eval.benchmarks.gpu.parts import check_places
from d_emo.eval.benchmarks.gpu.train import TINY_BATCH, TINY_NETWORK, TINY_PICTURES

RUN, LOSSES = "run.json", "loss.csv"
# Shares of the steps whose losses the table has: the mean over the tenth of all steps before each.
MARKS = (0.1, 0.2, 0.4, 0.7, 1.0)
# Pictures on which the averaged networks are compared at the end.
COMPARED = 4096
AS_DEFINED = "as defined"
TINY_STEPS = 20


class Run(NamedTuple):
    """One training: the model, a variant of D-EMOv2's or nothing, the highest learning rate, the seed."""

    model: str
    variant: str
    rate: float
    seed: int

    @property
    def folder(self) -> str:
        """Its name within the output."""
        words = (self.model, *self.variant.replace(":", "").split(), f"{self.rate:g}", f"seed{self.seed}")
        return "-".join(word.replace("'", "") for word in words)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("definition", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="Parquet file of pictures with labels.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["D-EMOv2-N-2", "DiT-N-2"])
    parser.add_argument("--variants", nargs="+", default=[AS_DEFINED], help="Of D-EMOv2; `all`, or their names.")
    parser.add_argument("--learning-rate", type=finite_from(0), nargs="+", default=[2e-3])
    parser.add_argument("--seeds", type=seed, nargs="+", default=[0])
    parser.add_argument("--steps", type=whole_from(10), default=600)
    parser.add_argument("--batch", type=whole_from(1), default=32)
    parser.add_argument("--hidden-size", type=whole_from(4), help="Other than the model's.")
    parser.add_argument("--num-layers", type=whole_from(1), help="Likewise.")
    parser.add_argument("--cpu-threads", type=whole_from(1), help="Of a training on a CPU.")
    parser.add_argument("--tiny", action="store_true", help="A rehearsal, as small as can be.")
    options = parser.parse_args(arguments)
    check_places(parser, options)
    return options


@command("definition", extra="eval")
def main(arguments: list[str]) -> None:
    """Train what is missing; print all."""
    options = parse(arguments)
    import torch

    from d_emo.common.processes import default_device, keep_freed_memory
    from d_emo.eval.benchmarks.gpu.pictures import load_pictures

    keep_freed_memory()
    if options.cpu_threads:
        torch.set_num_threads(options.cpu_threads)
    todo = [run for run in planned(options) if not finished(options.output_dir / run.folder, terms(options, run))]
    pictures = load_pictures(options.data, default_device(), TINY_PICTURES if options.tiny else None)
    failed = []
    for number, run in enumerate(todo):
        say(f"{run.folder}: {number + 1} of {len(todo)}")
        failed += [] if train(options, run, pictures) else [run.folder]
    print("\n".join(table(read_runs(options.output_dir))))
    if failed:
        raise CommandError(f"no loss at the end of {', '.join(failed)}.")


def planned(options: argparse.Namespace) -> Iterator[Run]:
    """All runs of the command line, the ones that others are held to first.

    Raises:
        ValueError: a variant is unknown.
    """
    from d_emo.eval.benchmarks.gpu.variants import VARIANTS

    variants = list(VARIANTS) if options.variants == ["all"] else options.variants
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise ValueError(f"--variants {unknown[0]!r} is none of {', '.join(map(repr, VARIANTS))}, or all.")
    for one, rate, model in itertools.product(options.seeds, options.learning_rate, options.models):
        for variant in variants if model.startswith("D-EMOv2") else [""]:
            yield Run(model, variant, rate, one)


def terms(options: argparse.Namespace, run: Run) -> dict[str, Any]:
    """All that a run is known by again."""
    sizes = {"hidden_size": options.hidden_size, "num_layers": options.num_layers}
    overrides = TINY_NETWORK if options.tiny else {name: value for name, value in sizes.items() if value}
    steps, batch = (TINY_STEPS, TINY_BATCH) if options.tiny else (options.steps, options.batch)
    return {**run._asdict(), "overrides": overrides, "steps": steps, "batch": batch}


def finished(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether a run is there.

    Raises:
        ValueError: it was made on other terms.
    """
    if not (folder / RUN).is_file():
        return False
    found = read_json(folder / RUN, "delete it")
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(
                f"{folder} was made with {name}={found.get(name)}, not {value}; choose another --output-dir."
            )
    return True


def train(options: argparse.Namespace, run: Run, pictures: Any) -> bool:
    """Train and write what it was; whether there is a loss at the end."""
    from d_emo.eval.benchmarks.gpu.graph_training import GraphTraining, Recipe
    from d_emo.eval.benchmarks.gpu.variants import VARIANTS

    wanted, variant = terms(options, run), VARIANTS[run.variant or AS_DEFINED]
    recipe = Recipe(
        model=run.model,
        overrides={**wanted["overrides"], **(variant.overrides if run.variant else {})},
        change=variant.change if run.variant else None,
        learning_rate=run.rate,
        seed=run.seed,
        batch=wanted["batch"],
        warmup=max(1, wanted["steps"] // 10),
        average_decay=0.99,
        cooldown=True,
    )
    training = GraphTraining(recipe, pictures, options.output_dir / run.folder)
    training.train(float("inf"), wanted["steps"])
    if not training.failed:
        parameters = sum(parameter.numel() for parameter in training.trained.values())
        average = training.average_loss(-(-COMPARED // wanted["batch"]))
        found = {"average": average, "seconds": training.state["seconds"], "parameters": parameters}
        write_json(training.folder / RUN, wanted | found)
    return not training.failed


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """What is in the folder: terms, and `losses`, the means that belong to `MARKS`."""
    runs = []
    for path in sorted(folder.glob(f"*/{RUN}")):
        run = read_json(path, "delete it")
        with (path.parent / LOSSES).open(encoding="utf-8") as file:
            lines = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
        runs.append(
            {**run, "losses": [_mean_before(lines, round(mark * run["steps"]), run["steps"]) for mark in MARKS]}
        )
    return runs


def _mean_before(lines: Sequence[tuple[int, float]], mark: int, steps: int) -> float:
    """The mean loss of the tenth of all steps that ends with `mark`."""
    return mean(loss for step, loss in lines if mark - steps / 10 < step <= mark)


def table(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a row a run, variants beside what they are variants of."""
    if not runs:
        return
    steps = max(run["steps"] for run in runs)
    marks = [f"loss at {round(mark * steps):,}" for mark in MARKS]
    titles = ("model", "variant", "rate", "seed", "parameters", *marks, "less than as defined", "average", "seconds")
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    plain = {(run["model"], run["rate"], run["seed"]): run for run in runs if run["variant"] == AS_DEFINED}
    for run in sorted(runs, key=lambda run: (run["model"], run["rate"], run["seed"], run["losses"][-1])):
        base = plain.get((run["model"], run["rate"], run["seed"]))
        gain = f"{base['losses'][-1] - run['losses'][-1]:+.4f}" if base and base is not run else ""
        told = " | ".join(f"{loss:.4f}" for loss in run["losses"])
        words = (run["model"], run["variant"], f"{run['rate']:g}", run["seed"], f"{run['parameters']:,}", told, gain)
        yield f"| {' | '.join(map(str, words))} | {run['average']:.4f} | {run['seconds']:.0f} |"


if __name__ == "__main__":
    main(sys.argv[1:])
