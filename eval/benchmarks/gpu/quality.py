"""Two networks trained in turns for equal time, with equal draws, then scored: losses and Frechet distances.

    python -m d_emo.eval.benchmarks.gpu.quality --data cifar10-train.parquet --output-dir "$OUT" --seconds 580
    python -m d_emo.eval.benchmarks.gpu.quality ... --features runs/classifier        # an EMOv2 classifier's folder

Both train in one process and take turns, so that a slow minute slows both. Each then draws 10,000 images of its
averaged weights, and `evaluate_fid` scores them against the pictures that it was trained on. A folder a model in the
output: loss.csv, samples.png, scores.json; results.jsonl has a line for each. `--tiny` rehearses it on a CPU.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import CommandError, command
from d_emo.common.files import read_json
from d_emo.common.numbers import finite_from, seed, whole_from
from d_emo.common.output import say
from d_emo.eval.benchmarks.gpu.parts import Parts, check_places, module, write_result
from d_emo.eval.benchmarks.gpu.train import SAVING, TINY_BATCH, TINY_NETWORK, TINY_PICTURES, TINY_STEPS

SCORES = "scores.json"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("quality", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="Parquet file of pictures with labels.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--models", nargs=2, default=["D-EMOv2-Ti-2", "DiT-Ti-2"])
    parser.add_argument("--features", default="pixels", help="Of evaluate_fid: pixels, or a classifier's folder.")
    parser.add_argument("--seconds", type=finite_from(1), default=580.0, help="For all of it.")
    parser.add_argument("--scoring-seconds", type=finite_from(1), default=110.0, help="Of them, to score one model.")
    parser.add_argument("--turns", type=whole_from(1), default=6, help="Of each model.")
    parser.add_argument("--num-images", type=whole_from(2), default=10_000, help="To draw and score, of each.")
    parser.add_argument("--steps", type=whole_from(1), default=50, help="Of the sampler.")
    parser.add_argument("--guidance-scale", type=finite_from(0), default=1.0, help="1 is none.")
    parser.add_argument("--learning-rate", type=finite_from(0), default=5e-4)
    parser.add_argument("--cooldown", action="store_true", help="Let the learning rates fall to 0 at the end.")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--tiny", action="store_true", help="A rehearsal, as small as can be.")
    options = parser.parse_args(arguments)
    check_places(parser, options)
    if options.models[0] == options.models[1]:
        parser.error(f"--models {' '.join(options.models)}: name two.")
    return options


@command("quality", extra="eval")
def main(arguments: list[str]) -> None:
    """Train both, score both."""
    began = time.monotonic()
    options = parse(arguments)
    parts = Parts(options.output_dir, options.seconds)
    with tempfile.TemporaryDirectory() as place:
        train_in_turns(options, began, Path(place))
        well = [score(options, parts, Path(place), model) for model in options.models]
    if not all(well):
        raise CommandError(f"a model was not scored; {options.output_dir}/log.txt says why.")


def train_in_turns(options: argparse.Namespace, began: float, place: Path) -> None:
    """Train both networks and save their pipelines in `place`."""
    from d_emo.common.processes import default_device, keep_freed_memory
    from d_emo.eval.benchmarks.gpu.graph_training import GraphTraining, Recipe
    from d_emo.eval.benchmarks.gpu.pictures import load_pictures

    keep_freed_memory()
    tiny = options.tiny
    pictures = load_pictures(options.data, default_device(), TINY_PICTURES if tiny else None)
    shared: dict[str, Any] = {"learning_rate": options.learning_rate, "cooldown": options.cooldown}
    shared |= {"seed": options.seed, "average_decay": 0.999}
    shared |= {"overrides": TINY_NETWORK, "batch": TINY_BATCH} if tiny else {}
    trainings = [
        GraphTraining(Recipe(model=model, **shared), pictures, options.output_dir / model) for model in options.models
    ]
    left = options.seconds - (time.monotonic() - began) - SAVING - len(trainings) * options.scoring_seconds
    if left <= 0:
        raise ValueError(f"--seconds {options.seconds:g} leaves nothing to train; give more, or less to scoring.")
    turn = left / len(trainings) / options.turns
    for number in range(options.turns):
        for training in trainings:
            part = number / options.turns, (number + 1) / options.turns
            training.train(turn, TINY_STEPS if tiny else None, *part)
    for training in trainings:
        if training.failed:
            raise CommandError(f"{training.recipe.model}: {training.failed}.")
        training.draw(*((2, 2) if tiny else (10, options.steps)))
        training.pipeline().save_pretrained(place / training.recipe.model)
        say(f"{training.recipe.model}: {training.step:,} steps in {training.state['seconds']:.0f} s")
        values = {"steps": training.step, "seconds": training.state["seconds"]}
        write_result(options.output_dir, kind="trained", name=training.recipe.model, **values)


def score(options: argparse.Namespace, parts: Parts, place: Path, model: str) -> bool:
    """Score a saved pipeline by the evaluator's command; whether that went well."""
    images, batch = (20, 10) if options.tiny else (options.num_images, 1000)
    words = module(
        *("d_emo.eval.evaluate_fid", "--model", place / model, "--reference", options.data),
        *("--features", options.features, "--metrics", "fid", "--num-images", images, "--batch-size", batch),
        *("--sampler", "euler", "--steps", 2 if options.tiny else options.steps, "--labels", "balanced"),
        *("--guidance-scale", options.guidance_scale, "--dtype", "float32" if options.tiny else "bfloat16"),
        *("--output-dir", place / "scores" / model, "--cache-dir", place / "features"),
        *(["--reference-images", TINY_PICTURES] if options.tiny else ["--num-workers", 12]),
    )
    found = place / "scores" / model / SCORES
    if not parts.run(f"scores of {model}", options.scoring_seconds, words) or not found.is_file():
        write_result(options.output_dir, kind="quality", name=model, ok=False)
        return False
    shutil.copyfile(found, options.output_dir / model / SCORES)
    values = read_json(found, "score again")["scores"]
    write_result(options.output_dir, kind="quality", name=model, ok=True, scores=values)
    say(f"{model}: {values}")
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
