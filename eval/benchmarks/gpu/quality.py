"""Networks trained in turns for equal time, with equal draws, then scored: losses and Frechet distances.

    python -m d_emo.eval.benchmarks.gpu.quality --data cifar10-train.parquet --output-dir "$OUT" --seconds 580
    python -m d_emo.eval.benchmarks.gpu.quality ... --features runs/classifier        # an EMOv2 classifier's folder

All train in one process and take turns, so that a slow minute slows all: every model at every learning rate, so that
none is handicapped by one. Each then draws 10,000 images of its averaged weights, and `evaluate_fid` scores them
against the pictures that it was trained on. A folder for each in the output: loss.csv, samples.png, scores.json;
results.jsonl has a line for each. `--tiny` rehearses it on a CPU.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import CommandError, command
from d_emo.common.files import read_json
from d_emo.common.numbers import finite_from, seed, whole_from
from d_emo.common.output import say
from d_emo.eval.benchmarks.gpu.parts import Parts, check_named_once, check_places, module, write_result
from d_emo.eval.benchmarks.gpu.train import SAVING, TINY_BATCH, TINY_NETWORK, TINY_PICTURES, TINY_STEPS

if TYPE_CHECKING:
    from d_emo.eval.benchmarks.gpu.graph_training import Recipe

SCORES = "scores.json"
# Seconds that drawing and saving take a network.
DRAWING = 6.0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("quality", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="Parquet file of pictures with labels.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["D-EMOv2-Ti-2", "DiT-Ti-2"])
    parser.add_argument("--features", default="pixels", help="Of evaluate_fid: pixels, or a classifier's folder.")
    parser.add_argument("--seconds", type=finite_from(1), default=580.0, help="For all of it.")
    parser.add_argument("--scoring-seconds", type=finite_from(1), default=120.0, help="Of them, to score all, at once.")
    parser.add_argument("--turns", type=whole_from(1), default=6, help="Of each.")
    parser.add_argument("--num-images", type=whole_from(2), default=10_000, help="To draw and score, of each.")
    parser.add_argument("--steps", type=whole_from(1), default=50, help="Of the sampler.")
    parser.add_argument("--guidance-scale", type=finite_from(0), default=1.0, help="1 is none.")
    parser.add_argument(
        "--learning-rate", type=finite_from(0), nargs="+", default=[5e-4], help="Every model is trained at each."
    )
    parser.add_argument("--compile", action="store_true", help="Compile the blocks.")
    parser.add_argument("--cooldown", action="store_true", help="Let the learning rates fall to 0 at the end.")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--tiny", action="store_true", help="A rehearsal, as small as can be.")
    options = parser.parse_args(arguments)
    check_places(parser, options)
    check_named_once(parser, options, "models", "learning_rate")
    return options


@command("quality", extra="eval")
def main(arguments: list[str]) -> None:
    """Train all, score all."""
    began = time.monotonic()
    options = parse(arguments)
    parts = Parts(options.output_dir, options.seconds)
    with tempfile.TemporaryDirectory() as place:
        saved = train_in_turns(options, began, Path(place))
        names = list(recipes(options))
        commands = [scoring(options, Path(place), name) for name in saved]
        parts.run("scores", options.scoring_seconds, *commands)
        well = [keep_scores(options, Path(place), name) for name in names]
    if not all(well):
        raise CommandError(f"not all were scored; {options.output_dir}/log.txt says why.")


def recipes(options: argparse.Namespace) -> "dict[str, Recipe]":
    """By name: every model at every rate, whose number is in the name where there are several."""
    from d_emo.eval.benchmarks.gpu.graph_training import Recipe

    shared: dict[str, Any] = {"cooldown": options.cooldown, "compile": options.compile}
    shared |= {"seed": options.seed, "average_decay": 0.999}
    shared |= {"overrides": TINY_NETWORK, "batch": TINY_BATCH} if options.tiny else {}
    rates = options.learning_rate
    return {
        model if len(rates) == 1 else f"{model}-{rate:g}": Recipe(model=model, learning_rate=rate, **shared)
        for model, rate in itertools.product(options.models, rates)
    }


def train_in_turns(options: argparse.Namespace, began: float, place: Path) -> list[str]:
    """Train the networks and save their pipelines in `place`; the names of those whose training did not fail."""
    from d_emo.common.processes import default_device, keep_freed_memory
    from d_emo.eval.benchmarks.gpu.graph_training import GraphTraining
    from d_emo.eval.benchmarks.gpu.pictures import load_pictures

    keep_freed_memory()
    tiny = options.tiny
    pictures = load_pictures(options.data, default_device(), TINY_PICTURES if tiny else None)
    trainings = {
        name: GraphTraining(recipe, pictures, options.output_dir / name) for name, recipe in recipes(options).items()
    }
    around = max(SAVING, DRAWING * len(trainings))
    left = options.seconds - (time.monotonic() - began) - around - options.scoring_seconds
    if left <= 0:
        raise ValueError(f"--seconds {options.seconds:g} leaves nothing to train; give more, or less to scoring.")
    turn = left / len(trainings) / options.turns
    for number in range(options.turns):
        for training in trainings.values():
            part = number / options.turns, (number + 1) / options.turns
            training.train(turn, TINY_STEPS if tiny else None, *part)
    for name, training in trainings.items():
        if training.failed:
            say(f"{name}: {training.failed}")
            write_result(options.output_dir, kind="trained", name=name, ok=False, error=training.failed)
            continue
        training.draw(*((2, 2) if tiny else (10, options.steps)))
        training.pipeline().save_pretrained(place / name)
        say(f"{name}: {training.step:,} steps in {training.state['seconds']:.0f} s")
        values = {"steps": training.step, "seconds": training.state["seconds"]}
        write_result(options.output_dir, kind="trained", name=name, **values)
    return [name for name, training in trainings.items() if not training.failed]


def scoring(options: argparse.Namespace, place: Path, name: str) -> list[str]:
    """The words of the evaluator's command that scores a saved pipeline."""
    images, batch = (20, 10) if options.tiny else (options.num_images, 1000)
    return module(
        *("d_emo.eval.evaluate_fid", "--model", place / name, "--reference", options.data),
        *("--features", options.features, "--metrics", "fid", "--num-images", images, "--batch-size", batch),
        *("--sampler", "euler", "--steps", 2 if options.tiny else options.steps, "--labels", "balanced"),
        *("--guidance-scale", options.guidance_scale, "--dtype", "float32" if options.tiny else "bfloat16"),
        *("--output-dir", place / "scores" / name, "--cache-dir", place / "features" / name),
        *(["--reference-images", TINY_PICTURES] if options.tiny else ["--num-workers", 4]),
    )


def keep_scores(options: argparse.Namespace, place: Path, name: str) -> bool:
    """Write what was found; whether there is anything."""
    found = place / "scores" / name / SCORES
    if not found.is_file():
        write_result(options.output_dir, kind="quality", name=name, ok=False)
        return False
    shutil.copyfile(found, options.output_dir / name / SCORES)
    values = read_json(found, "score again")["scores"]
    write_result(options.output_dir, kind="quality", name=name, ok=True, scores=values)
    say(f"{name}: {values}")
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
