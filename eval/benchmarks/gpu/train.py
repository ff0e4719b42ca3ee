"""Train a small network on pictures for some minutes of a GPU, and leave what the next chance goes on from.

    python -m d_emo.eval.benchmarks.gpu.train --data cifar10-train.parquet --output-dir "$OUT" --seconds 430 --limit 480
    python -m d_emo.eval.benchmarks.gpu.train ... --resume eval/benchmarks/gpu/cifar10_ti2 --cooldown

Leaves loss.csv as it grows, then weights, state.json and samples.png. `--tiny` rehearses it on a CPU.
"""

import argparse
import sys
import time
from pathlib import Path

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import finite_by, finite_from, seed, whole_from
from d_emo.common.output import say
from d_emo.common.ranges import Real
from d_emo.eval.benchmarks.gpu.parts import check_places

AVERAGE_DECAY = finite_by(Real(0, 1, below=True))
# Kept for saving and drawing, of the time that is given for all.
SAVING = 20.0
# A rehearsal: a network of thousands of parameters, pictures, images a step and steps.
TINY_NETWORK = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
TINY_PICTURES, TINY_BATCH, TINY_STEPS = 40, 8, 4


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("train", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="Parquet file of pictures with labels.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--model", default="D-EMOv2-Ti-2", help="That of --resume, where that is given.")
    parser.add_argument("--resume", type=Path, help="Folder of an earlier run to go on from.")
    parser.add_argument("--seconds", type=finite_from(0), default=420.0, help="Of training, without what is around it.")
    parser.add_argument("--limit", type=finite_from(0), help="For all of it; training ends early enough to save.")
    parser.add_argument("--batch", type=whole_from(1), default=256)
    parser.add_argument("--learning-rate", type=finite_from(0), default=5e-4)
    parser.add_argument("--lr-warmup-steps", type=whole_from(1), default=500)
    parser.add_argument("--ema-decay", type=AVERAGE_DECAY, default=0.9995)
    parser.add_argument("--cooldown", action="store_true", help="Let the learning rate fall to 0 at the end.")
    parser.add_argument("--compile", action="store_true", help="Compile the blocks.")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument(
        "--weights-mb", type=finite_from(0), default=38.0, help="Of weights and moments that are left; 0: none."
    )
    parser.add_argument("--tiny", action="store_true", help="A rehearsal, as small as can be.")
    options = parser.parse_args(arguments)
    check_places(parser, options)
    return options


@command("train")
def main(arguments: list[str]) -> None:
    """Train, save, draw."""
    began = time.monotonic()
    options = parse(arguments)
    from d_emo.common.processes import default_device, keep_freed_memory
    from d_emo.eval.benchmarks.gpu.graph_training import GraphTraining, Recipe
    from d_emo.eval.benchmarks.gpu.pictures import load_pictures
    from d_emo.kernels import backend_report

    keep_freed_memory()
    device, tiny = default_device(), options.tiny
    try:
        pictures = load_pictures(options.data, device, TINY_PICTURES if tiny else None)
    except ValueError as error:
        raise ValueError(f"--data {error}") from error
    recipe = Recipe(
        model=options.model,
        overrides=TINY_NETWORK if tiny else {},
        batch=TINY_BATCH if tiny else options.batch,
        learning_rate=options.learning_rate,
        warmup=options.lr_warmup_steps,
        average_decay=options.ema_decay,
        cooldown=options.cooldown,
        seed=options.seed,
        compile=options.compile,
    )
    try:
        training = GraphTraining(recipe, pictures, options.output_dir, options.resume)
    except ValueError as error:
        raise ValueError(f"--resume {error}" if options.resume else f"--model {error}") from error
    parameters = sum(p.numel() for p in training.model.parameters()) / 1e6
    moments = "with moments" if training.with_moments else "without moments"
    begun = f"from step {training.first:,}, {moments}" if options.resume else "from scratch"
    say(f"{training.recipe.model}: {parameters:.2f}M parameters, {begun}; {backend_report(device)}")
    seconds = options.seconds
    if options.limit is not None:
        seconds = max(0.0, min(seconds, options.limit - SAVING - (time.monotonic() - began)))
    training.train(seconds, TINY_STEPS if tiny else None)
    kept = training.save(1e6 * options.weights_mb)
    say(f"step {training.step:,}; saved: {', '.join(kept) or 'no weights'}")
    training.draw(*((2, 2) if tiny else (10, 50)))
    say(f"samples in {options.output_dir}; {time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    main(sys.argv[1:])
