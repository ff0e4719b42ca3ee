"""Make a model that comes with the package: train it, save it in float16, score it, write its card.

    python train/make_packaged.py digits --output-dir digits
    python train/make_packaged.py digits-classifier --output-dir digits-classifier

The folder of a training that is finished (--run-dir) is taken as it is, one that was interrupted goes on. What comes
out is a folder as it lies in `d_emo/packaged`; moved there, it is found by `d_emo.packaged` under its name.
"""

import argparse
import sys

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.train.packing.recipes import RECIPES


@command("make_packaged", extra="train", kept="the same command goes on from the last checkpoint")
def main(arguments: list[str]) -> None:
    """Read the options, then make it."""
    options = parse(arguments)
    from d_emo.train.packing import command as packing  # seconds of imports, which --help does without

    packing.run(options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("make_packaged", __doc__)
    parser.add_argument("name", choices=tuple(RECIPES), help="Which model.")
    parser.add_argument("--output-dir", required=True, help="A new folder.")
    parser.add_argument("--run-dir", help="Folder of its training. Default: runs/NAME-packaged.")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
