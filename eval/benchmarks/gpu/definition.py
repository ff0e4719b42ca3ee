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
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import CommandError, command
from d_emo.common.files import read_json, write_json
from d_emo.common.messages import kind_and_line, shown
from d_emo.common.numbers import finite_from, seed, whole_from
from d_emo.common.output import say
from d_emo.eval.benchmarks.gpu.parts import check_named_once, check_places
from d_emo.eval.benchmarks.gpu.train import TINY_BATCH, TINY_NETWORK, TINY_PICTURES

if TYPE_CHECKING:
    from d_emo.eval.benchmarks.gpu.pictures import Pictures

RUN = "run.json"
# Shares of the steps whose losses the table has: the mean over the tenth of all steps before each.
MARKS = (0.1, 0.2, 0.4, 0.7, 1.0)
# Pictures on which the averaged networks are compared at the end.
COMPARED = 4096
# What a run's file says beside its terms.
FOUND = ("losses", "changed", "average", "parameters")
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
        words = (self.model, *self.variant.replace(":", "").split(), repr(self.rate), f"seed{self.seed}")
        return "-".join(word.replace("'", "") for word in words)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("definition", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="Parquet file of pictures with labels.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["D-EMOv2-N-2", "DiT-N-2"])
    parser.add_argument("--variants", nargs="+", default=["as defined"], help="Of D-EMOv2: their names, or `all`.")
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
    check_named_once(parser, options, "models", "variants", "learning_rate", "seeds")
    return options


@command("definition", extra="eval")
def main(arguments: list[str]) -> None:
    """Train what is missing; print all."""
    options = parse(arguments)
    import torch

    from d_emo.common.processes import default_device, keep_freed_memory
    from d_emo.eval.benchmarks.gpu.pictures import load_pictures

    runs = list(planned(options))
    keep_freed_memory()
    if options.cpu_threads:
        torch.set_num_threads(options.cpu_threads)
    pictures = load_pictures(options.data, default_device(), TINY_PICTURES if options.tiny else None)
    wanted = terms(options, pictures)
    done = {run["folder"] for run in read_runs(options.output_dir, wanted)}
    todo, failed = [run for run in runs if run.folder not in done], []
    for number, run in enumerate(todo):
        say(f"{run.folder}: {number + 1} of {len(todo)}")
        try:
            train(options.output_dir, run, wanted, pictures)
        except Exception as error:  # of a run, which is no reason to leave out the others
            say(f"{run.folder}: {kind_and_line(error)}")
            failed.append(run.folder)
    print("\n".join(table(read_runs(options.output_dir, wanted))))
    if failed:
        raise CommandError(f"{', '.join(failed)} did not end well; what is said above tells why.")


def planned(options: argparse.Namespace) -> Iterator[Run]:
    """All runs of the command line, the ones that others are held to first.

    Raises:
        ValueError: a model or a variant is unknown.
    """
    from d_emo import list_models
    from d_emo.eval.benchmarks.gpu.variants import VARIANTS

    variants = list(VARIANTS) if options.variants == ["all"] else options.variants
    for flag, given, known in (("models", options.models, list_models()), ("variants", variants, VARIANTS)):
        if unknown := [name for name in given if name not in known]:
            raise ValueError(f"--{flag} {unknown[0]!r} is none of {', '.join(map(repr, known))}.")
    if variants != ["as defined"] and not any(model.startswith("D-EMOv2") for model in options.models):
        raise ValueError("--variants are of D-EMOv2, and --models names none; add one, or leave --variants out.")
    for one, rate, model in itertools.product(options.seeds, options.learning_rate, options.models):
        for variant in variants if model.startswith("D-EMOv2") else [""]:
            yield Run(model, variant, rate, one)


def terms(options: argparse.Namespace, pictures: "Pictures") -> dict[str, Any]:
    """What all runs of a folder have in common."""
    sizes = {"hidden_size": options.hidden_size, "num_layers": options.num_layers}
    overrides = TINY_NETWORK if options.tiny else {name: value for name, value in sizes.items() if value}
    steps, batch = (TINY_STEPS, TINY_BATCH) if options.tiny else (options.steps, options.batch)
    data = f"{len(pictures.pixels)} pictures, sum {pictures.pixels.sum().item()}"
    return {"overrides": overrides, "steps": steps, "batch": batch, "data": data, "on": pictures.pixels.device.type}


def train(folder: Path, run: Run, wanted: dict[str, Any], pictures: "Pictures") -> None:
    """Train, and write what it was.

    Raises:
        ValueError: the loss is not a number.
    """
    from d_emo.eval.benchmarks.gpu.graph_training import LOSSES, GraphTraining, Recipe
    from d_emo.eval.benchmarks.gpu.variants import AS_DEFINED, VARIANTS

    variant = VARIANTS[run.variant or AS_DEFINED]
    recipe = Recipe(
        model=run.model,
        overrides={**wanted["overrides"], **variant.overrides},
        change=variant.change,
        learning_rate=run.rate,
        seed=run.seed,
        batch=wanted["batch"],
        warmup=max(1, wanted["steps"] // 10),
        average_decay=0.99,
        cooldown=True,
    )
    training = GraphTraining(recipe, pictures, folder / run.folder)
    training.train(float("inf"), wanted["steps"])
    if training.failed:
        raise ValueError(training.failed)
    parameters = sum(parameter.numel() for parameter in training.trained.values())
    average = training.average_loss(-(-min(COMPARED, len(pictures.pixels)) // wanted["batch"]))
    if not math.isfinite(average):
        raise ValueError("the average's loss is not a number.")
    with (training.folder / LOSSES).open(encoding="utf-8") as file:
        lines = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    losses = [_mean_before(lines, round(mark * wanted["steps"]), wanted["steps"]) for mark in MARKS]
    about = variant.about if run.variant else ""
    found = dict(zip(FOUND, (losses, about, average, parameters), strict=True))
    write_json(training.folder / RUN, {**wanted, **run._asdict(), **found})


def read_runs(folder: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """What is in the folder: terms, what was found (`losses`: the means that belong to `MARKS`), and `folder`.

    Raises:
        ValueError: it holds a run that was made on other terms.
    """
    runs = []
    for path in sorted(folder.glob(f"*/{RUN}")):
        run = read_json(path, "delete it")
        for name, value in wanted.items():
            if run.get(name) != value:
                found = f"{name}={shown(run.get(name))}, not {shown(value)}"
                raise ValueError(f"{path.parent} was made with {found}; choose another --output-dir.")
        if missing := {*Run._fields, *FOUND} - set(run):
            raise ValueError(f"{path} says nothing of {min(missing)}; delete {path.parent}.")
        runs.append({**run, "folder": path.parent.name})
    return runs


def _mean_before(lines: Sequence[tuple[int, float]], mark: int, steps: int) -> float:
    """The mean loss of the tenth of all steps that ends with `mark`."""
    return mean(loss for step, loss in lines if mark - steps / 10 < step <= mark)


def table(runs: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown: a row a run, variants beside what they are variants of."""
    from d_emo.eval.benchmarks.gpu.variants import AS_DEFINED

    if not runs:
        return
    marks = [f"loss at {round(mark * runs[0]['steps']):,}" for mark in MARKS]
    titles = ("model", "variant", "changed", "rate", "seed", "parameters", *marks, "less than as defined", "average")
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    plain = {(run["model"], run["rate"], run["seed"]): run for run in runs if run["variant"] == AS_DEFINED}
    for run in sorted(runs, key=lambda run: (run["model"], run["rate"], run["seed"], run["losses"][-1])):
        base = plain.get((run["model"], run["rate"], run["seed"]))
        gain = f"{base['losses'][-1] - run['losses'][-1]:+.4f}" if base and base is not run else ""
        words = (
            run["model"],
            run["variant"],
            run["changed"],
            f"{run['rate']:g}",
            run["seed"],
            f"{run['parameters']:,}",
        )
        told = (*words, *(f"{loss:.4f}" for loss in run["losses"]), gain, f"{run['average']:.4f}")
        yield f"| {' | '.join(map(str, told))} |"


if __name__ == "__main__":
    main(sys.argv[1:])
