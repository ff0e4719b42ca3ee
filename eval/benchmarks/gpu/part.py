"""One part of `first_run`, in a process of its own: facts, kernels, networks, launches, operators, models or
profiles."""

import argparse
import importlib
import logging
import os
import sys
from pathlib import Path

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import finite_from, whole_from

PARTS = {
    "facts": "facts",
    "kernels": "kernel_checks",
    "networks": "network_checks",
    "launches": "launches",
    "operators": "operators",
    "models": "beside_dit",
    "profiles": "profiles",
}


@command("part")
def main(arguments: list[str]) -> None:
    """Run the part, then leave."""
    options = parse(arguments)
    from d_emo.common.processes import keep_freed_memory
    from d_emo.eval.benchmarks.gpu.results import Results

    logging.captureWarnings(True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    results = Results(
        options.output_dir, tiny=options.tiny, shard=(options.shard, options.shards), seconds=options.seconds
    )
    keep_freed_memory()
    importlib.import_module(f"d_emo.eval.benchmarks.gpu.{PARTS[options.part]}").run(results)
    # On the H100 processes that had profiled did not end by themselves, and lost the time of the parts after them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("part", __doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--output-dir", type=Path, required=True, help="Gets results.jsonl and tables of profiles.")
    parser.add_argument("--tiny", action="store_true", help="A rehearsal, as small as can be.")
    parser.add_argument("--shard", type=whole_from(0), default=0, help="Which of the shards of the checks.")
    parser.add_argument("--shards", type=whole_from(1), default=1, help="Processes that share the checks.")
    parser.add_argument("--seconds", type=finite_from(0), default=float("inf"), help="That it has. Default: any.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
