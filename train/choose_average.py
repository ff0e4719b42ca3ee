"""Averages after the fact: pipelines of other averages than the one that a run followed, made of its snapshots.

    python train/choose_average.py runs/B-2 --length 0.05 0.10      writes runs/B-2/average-0.05 and average-0.1
    python train/choose_average.py runs/B-2 --length 0.03 --step 300000

The run was trained with --snapshot-every. Which length is best is what `evaluate_fid.py --sweep ema=0.02,0.05,0.1`
finds. Source: arXiv 2312.02696, section 3.
"""

import sys
from collections.abc import Sequence

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import finite_by, whole_from
from d_emo.common.ranges import RELATIVE_LENGTH


@command("choose_average")
def main(arguments: Sequence[str]) -> None:
    """Make the averages; mistakes end with one line."""
    parser = CommandParser("choose_average", __doc__)
    parser.add_argument("run", help="Folder of a run with snapshots.")
    parser.add_argument(
        "--length",
        type=finite_by(RELATIVE_LENGTH),
        nargs="+",
        required=True,
        help="Relative lengths: the deviation of the average's steps over the run's; 0.1 is about its last tenth.",
    )
    parser.add_argument("--step", type=whole_from(1), help="Step of a snapshot. Default: the last one's.")
    parser.add_argument("--output-dir", help="Gets a folder average-RELATIVE_LENGTH each. Default: the run's folder.")
    options = parser.parse_args(arguments)
    from d_emo.train.diffusion.choosing import choose_averages  # seconds of imports, which --help does without

    choose_averages(options)


if __name__ == "__main__":
    main(sys.argv[1:])
