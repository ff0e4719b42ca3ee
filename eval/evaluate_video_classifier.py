"""How well does a video classifier do? Top-1, top-5, a report by class, and a page of the worst videos' frames.

    python eval/evaluate_video_classifier.py --model runs/my-videos --data-dir my_test_videos
    python eval/evaluate_video_classifier.py --model runs/v-emov2 --data-dir kinetics/val --crops 3

A model is a folder or Hub id of a transformers video classifier; its own video processor prepares the clips. Writes
`report.json`, `classes.csv`, `confusion.png` and `report.html`.
"""

import argparse
import sys

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import whole_from


@command("evaluate_video_classifier", extra="eval,video", kept="nothing is written before the end")
def main(arguments: list[str]) -> None:
    """Read the options, then predict, score, print, save."""
    options = parse(arguments)
    from d_emo.eval.video import command as evaluation  # seconds of imports, which --help does without

    evaluation.run(options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("evaluate_video_classifier", __doc__)
    what = parser.add_argument_group("model and videos")
    what.add_argument("--model", required=True, help="Folder or Hub id of a transformers video classifier.")
    what.add_argument("--data-dir", help="Folder of class folders of videos.")
    what.add_argument("--dataset", help="Hub id, folder or .parquet file, of videos.")
    what.add_argument("--dataset-config", help="Configuration name of a Hub dataset.")
    what.add_argument("--dataset-split", default="train", help="Split of --dataset; a file alone is called train.")
    what.add_argument("--video-column", default="video", help="Column that holds the videos.")
    what.add_argument("--label-column", default="label", help="Column that holds the classes.")
    what.add_argument("--class-names", help="Names of classes that the data give by number: a file.")
    views = parser.add_argument_group("views")
    views.add_argument("--clips", type=whole_from(1), default=1, help="Clips of each video, spread over it.")
    views.add_argument("--crops", type=whole_from(1), default=1, help="Crops of each clip, along its longer side.")
    views.add_argument(
        "--order", choices=("forward", "reversed", "repeated"), default="forward",
        help="Frames as they are, backwards, or the first one in place of all: what does the model see of time?",
    )  # fmt: skip
    views.add_argument(
        "--opposites", help="Classes that are each other backwards, left=right,up=down: the truth of --order reversed."
    )
    running = parser.add_argument_group("running and output")
    running.add_argument("--batch-size", type=whole_from(1), default=16, help="Clips and crops at once.")
    running.add_argument("--num-workers", type=whole_from(0), default=0, help="Loader processes, which decode.")
    running.add_argument(
        "--on-bad-image", choices=("stop", "skip"), default="stop",
        help="An unreadable or too short video stops it, or is skipped aloud.",
    )  # fmt: skip
    running.add_argument("--pictures", type=whole_from(0), default=40, help="Videos on the page, the worst ones.")
    running.add_argument("--output-dir", help="Default: evaluation in the model's folder, or runs/evaluation-MODEL.")
    options = parser.parse_args(arguments)
    if options.data_dir and options.dataset:
        parser.error("--data-dir and --dataset are both given; choose one.")
    if not options.data_dir and not options.dataset:
        parser.error("no data was named: --data-dir FOLDER (one sub-folder of videos a class) or --dataset NAME.")
    if options.opposites and options.order != "reversed":
        parser.error("--opposites belongs to --order reversed.")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
