"""How well does a detector do? COCO's mean average precision of boxes and masks, by class, and its worst pictures.

    python eval/evaluate_detector.py --model runs/my-detector --data-dir my_photos
    python eval/evaluate_detector.py --model runs/my-detector --data-dir val2017 --annotations instances_val2017.json
    python eval/evaluate_detector.py --model runs/my-detector --dataset photos.parquet --dataset-split test

A model is a folder or Hub id of a detector that `train_detector` saved. Pictures are a folder with COCO's list of their
objects (instances or panoptic), or a data set with a column of objects. Writes `report.json`, `classes.csv` and
`report.html`, with truth and findings side by side. A picture's score is F1: twice the findings that have an object's
class and overlap its box by half or more (intersection over union), over all objects and findings of
--score-threshold or more.
"""

import argparse
import sys

from d_emo.common.command_line import CommandParser, flag
from d_emo.common.commands import command
from d_emo.common.numbers import finite_by, whole_from
from d_emo.common.ranges import Real


@command("evaluate_detector", extra="eval", kept="nothing is written before the end")
def main(arguments: list[str]) -> None:
    """Read the options, then detect, score, print, save."""
    options = parse(arguments)
    from d_emo.eval.detection import command as evaluation  # seconds of imports, which --help does without

    evaluation.run(options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("evaluate_detector", __doc__)
    what = parser.add_argument_group("model and pictures")
    what.add_argument("--model", required=True, help="Folder or Hub id of a detector.")
    what.add_argument("--data-dir", help="Folder of pictures.")
    what.add_argument("--annotations", help="COCO's list of their objects. Default: the one JSON file in --data-dir.")
    what.add_argument(
        "--mask-dir", help="Of a panoptic list: the folder of its PNG files. Default: beside it, of the same name."
    )
    what.add_argument("--dataset", help="Hub id, folder or .parquet file with a column of objects.")
    what.add_argument("--dataset-config", help="Configuration name of a Hub dataset.")
    what.add_argument("--dataset-split", default="train", help="Split of --dataset; a file alone is called train.")
    what.add_argument("--image-column", default="image", help="Column that holds the pictures.")
    what.add_argument("--objects-column", default="objects", help="Column that holds their objects.")
    what.add_argument(
        "--box-format",
        choices=("xywh", "xyxy"),
        default="xywh",
        help="How --dataset writes boxes: x, y, width, height, or two corners.",
    )
    what.add_argument("--class-names", help="Names of classes that --dataset gives by number: a file.")
    what.add_argument("--max-images", type=whole_from(1), help="Score the first so many pictures only.")
    running = parser.add_argument_group("running and output")
    running.add_argument(
        "--score-threshold",
        type=finite_by(Real(0, 1)),
        default=0.5,
        help="From which score findings count in pictures and in what was missed; never in mAP.",
    )
    running.add_argument("--num-workers", type=whole_from(0), default=0, help="Loader processes.")
    running.add_argument("--pictures", type=whole_from(0), default=24, help="The worst so many pictures are shown.")
    running.add_argument("--output-dir", help="Default: evaluation in the model's folder, or runs/evaluation-MODEL.")
    options = parser.parse_args(arguments)
    if options.data_dir and options.dataset:
        parser.error("--data-dir and --dataset are both given; choose one.")
    for name, other in (("annotations", "data_dir"), ("mask_dir", "data_dir"), ("class_names", "dataset")):
        if getattr(options, name) and not getattr(options, other):
            parser.error(f"{flag(name)} {getattr(options, name)}: it goes with {flag(other)}.")
    if not options.data_dir and not options.dataset:
        parser.error("no data was named: --data-dir FOLDER (with COCO's list of objects) or --dataset NAME.")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
