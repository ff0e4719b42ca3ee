"""Everything that is to be known of a GPU first: what it is, whether all is right on it, how fast, and where time goes.

    python -m d_emo.eval.benchmarks.gpu.first_run --output-dir "$OUT" --data cifar10-train.parquet

Facts; every kernel at every size and type, and a network in every way that it is run; settings of the kernels'
launches; the operators alone; models beside DiT; profiles; the trainer itself. Every part has its own limit, and what
it found is in results.jsonl at once; summary.md, at the end, is what `report` prints. `--tiny` rehearses it on a CPU.
"""

import argparse
import csv
import signal
import sys
import tempfile
from pathlib import Path

import d_emo
from d_emo.common.command_line import CommandParser
from d_emo.common.commands import CommandError, command
from d_emo.common.files import written_whole
from d_emo.common.numbers import finite_from, whole_from
from d_emo.common.output import say
from d_emo.eval.benchmarks.gpu.parts import Parts, check_places, module, write_result

HERE = "d_emo.eval.benchmarks.gpu"
TRAINING_LOG = "short_training.csv"
# Seconds of each part. The trainer needs some to start, and some to save after it was asked to end.
LIMITS = {"facts": 60, "right": 130, "launches": 80, "operators": 50, "models": 210, "profiles": 45, "trainer": 55}
SAVING = 10
# Settings of launches are tried when a kernel or a card is new.
PARTS = [name for name in LIMITS if name != "launches"]


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("first_run", __doc__)
    parser.add_argument("--output-dir", type=Path, required=True, help="Gets the results.")
    parser.add_argument("--data", type=Path, help="Parquet file of pictures with labels. Default: the digits.")
    parser.add_argument("--seconds", type=finite_from(1), default=560.0, help="For all of it.")
    parser.add_argument(
        "--processes", type=whole_from(1), default=8, help="That share the checks: most is compilation."
    )
    parser.add_argument("--parts", nargs="+", choices=LIMITS, default=PARTS, help="Facts come first in any case.")
    parser.add_argument("--tiny", action="store_true", help="A rehearsal, as small as can be.")
    options = parser.parse_args(arguments)
    check_places(parser, options)
    return options


@command("first_run")
def main(arguments: list[str]) -> None:
    """Run the parts, then summarise."""
    options = parse(arguments)
    parts = Parts(options.output_dir, options.seconds)
    own = ["--output-dir", options.output_dir, *(["--tiny"] if options.tiny else [])]

    def part(name: str, seconds: float, *more: object) -> list[str]:
        return module(f"{HERE}.part", name, *own, "--seconds", seconds, *more)

    if not parts.run("facts", LIMITS["facts"], part("facts", LIMITS["facts"])):
        raise CommandError(f"the facts failed, so would the rest; {options.output_dir}/log.txt says why.")
    count = 1 if options.tiny else options.processes
    if "right" in options.parts:
        shards = [
            part(name, LIMITS["right"], "--shard", i, "--shards", count)
            for i in range(count)
            for name in ("kernels", "networks")
        ]
        parts.run("what is right", LIMITS["right"], *shards, *kernel_tests(options.tiny))
    if "launches" in options.parts:
        shards = [part("launches", LIMITS["launches"], "--shard", i, "--shards", count) for i in range(count)]
        parts.run("launches", LIMITS["launches"], *shards)
    for name in ("operators", "models", "profiles"):
        if name in options.parts:
            # Some seconds less than the process has, so that it ends with a line and not in the middle of one.
            parts.run(name, LIMITS[name], part(name, max(0.0, min(LIMITS[name], parts.left()) - SAVING)))
    if "trainer" in options.parts:
        train(parts, options)
    summarise(options.output_dir)


def kernel_tests(tiny: bool) -> list[list[str]]:
    """The tests of the Triton kernels, where the repository has them: the same that run in Triton's interpreter.

    Attention in float32 is left out: nothing but the tests would compile it for a GPU, for minutes.
    """
    root = Path(d_emo.__file__).resolve().parents[1]
    cases = root / "tests" / "helpers" / "triton_cases.py"
    if tiny or not cases.is_file():
        return []
    words = ["-q", "-n", 4, "-p", "no:cacheprovider", "--rootdir", root, cases, "-k", "local or bfloat16"]
    return [module("pytest", *words)]


def train(parts: Parts, options: argparse.Namespace) -> None:
    """The trainer as users run it, interrupted after a while; its log."""
    model, batch, workers = ("D-EMOv2-N-4", 16, 0) if options.tiny else ("D-EMOv2-S-2", 256, 12)
    data = ["--dataset", options.data, "--resolution", 32, "--vae", "none", "--num-workers", workers]
    steps = ["--max-train-steps", 4 if options.tiny else 100_000, "--log-every", 2 if options.tiny else 20]
    with tempfile.TemporaryDirectory() as place:
        words = module(
            *("d_emo.train.train_dit", "--model", model, *(data if options.data else [])),
            *("--objective", "sit", "--global-batch-size", batch, *steps, "--learning-rate", 3e-4),
            *("--ema-decay", 0.999, "--mixed-precision", "no" if options.tiny else "bf16", "--sample-every", 0),
            *("--checkpoint-every", 1_000_000, "--report-to", "none", "--output-dir", f"{place}/run"),
        )
        parts.run("trainer", LIMITS["trainer"] - SAVING, words, ask=signal.SIGINT)
        log = Path(place) / "run" / "train_log.csv"
        if not log.is_file():
            write_result(options.output_dir, kind="training", ok=False, error="it wrote no line; see log.txt")
            return
        with written_whole(options.output_dir / TRAINING_LOG) as partial:
            partial.write_bytes(log.read_bytes())
        with log.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    values = {name: float(rows[-1][name]) for name in ("step", "loss", "images_per_second", "seconds")}
    write_result(options.output_dir, kind="training", ok=True, model=model, batch=batch, **values)


def summarise(folder: Path) -> None:
    """Print the report and keep it beside the results."""
    from d_emo.eval.benchmarks.gpu.report import report

    text = report(folder)
    with written_whole(folder / "summary.md") as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    say(text)


if __name__ == "__main__":
    main(sys.argv[1:])
