"""Make videos of a camera that moves over photos: left, right, up, down, in, out, or stays.

    python train/make_camera_motion.py --photos my_photos --output-dir camera-motion

No single frame tells the class, so that what is learned of them is motion. Writes the folders `train` and `test`, of
other photos, each with a sub-folder of videos a class: see `train/configs/video/camera_motion.yaml`. Played backwards a
video is one of the opposite class (`evaluate_video_classifier --order reversed --opposites left=right,up=down,in=out`).
"""

import argparse
import sys
from pathlib import Path

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import whole_from


@command("make_camera_motion", extra="train,video", kept="nothing is kept")
def main(arguments: list[str]) -> None:
    """Read the options, then draw."""
    options = parse(arguments)
    from d_emo.train.video import motion_command  # seconds of imports, which --help does without

    motion_command.run(options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("make_camera_motion", __doc__)
    parser.add_argument("--photos", required=True, help="Folder of photos, at any depth, or a .parquet file of some.")
    parser.add_argument("--output-dir", required=True, help="A new folder.")
    parser.add_argument("--num-photos", type=whole_from(2), default=400, help="Photos, at most.")
    parser.add_argument("--held-out", type=whole_from(1), default=80, help="Of them, for the test.")
    parser.add_argument("--per-class", type=whole_from(1), default=1, help="Videos of each photo and class.")
    parser.add_argument("--frames", type=whole_from(2), default=16, help="Frames of a video.")
    parser.add_argument("--resolution", type=whole_from(16), default=64, help="Side of the videos, in pixels; even.")
    parser.add_argument("--seed", type=whole_from(0), default=0, help="Of all that is drawn.")
    options = parser.parse_args(arguments)
    if options.resolution % 2:
        parser.error(f"--resolution {options.resolution} is odd, and videos have even sides.")
    options.photos, options.output_dir = Path(options.photos), Path(options.output_dir)
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
