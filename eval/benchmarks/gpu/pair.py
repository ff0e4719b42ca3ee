"""Two networks, one after the other, trained for equal time with equal draws: losses, and the first's weights.

    python -m d_emo.eval.benchmarks.gpu.pair --data cifar10-train.parquet --output-dir "$OUT" --seconds 400

Each has a folder in the output, with loss.csv, written as it grows, and samples.png; the first one also weights and
state. `--tiny` rehearses it on a CPU.
"""

import argparse
import sys
from pathlib import Path

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import CommandError, command
from d_emo.common.numbers import finite_from, seed
from d_emo.common.output import say
from d_emo.eval.benchmarks.gpu.parts import LOG, Parts, check_places, module
from d_emo.eval.benchmarks.gpu.train import AVERAGE_DECAY

# What a process is given besides training, so that no slow start takes of its share: imports and pictures took 14 s on
# an H100, the graph 9, saving and drawing 2.
AROUND = 60.0
# For a machine that hands out eight files: loss and samples of two, weights in two files, state and log.
WEIGHTS_MB = 30


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("pair", __doc__)
    parser.add_argument("--data", type=Path, required=True, help="Parquet file of pictures with labels.")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--models", nargs=2, default=["D-EMOv2-Ti-2", "DiT-Ti-2"])
    parser.add_argument("--seconds", type=finite_from(1), default=400.0, help="For all of it.")
    parser.add_argument("--learning-rate", type=finite_from(0), default=5e-4)
    parser.add_argument("--ema-decay", type=AVERAGE_DECAY, default=0.999)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--tiny", action="store_true", help="A rehearsal, as small as can be.")
    options = parser.parse_args(arguments)
    check_places(parser, options)
    each = options.seconds / 2 - AROUND
    if each <= 0:
        parser.error(
            f"--seconds {options.seconds:g} leaves nothing to train; {2 * AROUND:g} go into what is around it."
        )
    return options


@command("pair")
def main(arguments: list[str]) -> None:
    """Train both."""
    options = parse(arguments)
    parts = Parts(options.output_dir, options.seconds)
    each = options.seconds / 2 - AROUND
    well = []
    for place, model in enumerate(options.models):
        words = module(
            *("d_emo.eval.benchmarks.gpu.train", "--model", model, "--data", options.data),
            *("--output-dir", options.output_dir / model, "--seconds", each, "--limit", each + AROUND - 5),
            *("--learning-rate", options.learning_rate, "--ema-decay", options.ema_decay, "--seed", options.seed),
            *("--weights-mb", WEIGHTS_MB if place == 0 else 0, *(["--tiny"] if options.tiny else [])),
        )
        well.append(parts.run(model, each + AROUND, words, kept=0 if place else each + AROUND))
    say((options.output_dir / LOG).read_text(encoding="utf-8", errors="replace")[-3000:])
    if not all(well):
        raise CommandError(f"a training did not end by itself; {options.output_dir}/{LOG} says why.")


if __name__ == "__main__":
    main(sys.argv[1:])
