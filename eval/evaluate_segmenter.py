"""How well does a segmenter do? Mean IoU, accuracies, Dice from sums over a set, and its worst pictures.

    python eval/evaluate_segmenter.py --model runs/my-segmenter --data-dir photos/test
    python eval/evaluate_segmenter.py --model runs/vessels --data-dir fundus/test --window 256
    python eval/evaluate_segmenter.py --model runs/things --data-dir val2017 --panoptic-json panoptic_val2017.json

A model is a folder or Hub id of a transformers semantic segmenter; its own image processor prepares the pictures, and
what it says is resized to the labels. Data are named as train_segmenter names them, and masks count as the model's
classes in their order unless they have names of their own. Writes `report.html`, `report.json` and `classes.csv`.
"""

import argparse
import sys

from d_emo.common.command_line import CommandParser, flag
from d_emo.common.commands import command
from d_emo.common.numbers import whole_from


@command("evaluate_segmenter", extra="eval", kept="nothing is written before the end")
def main(arguments: list[str]) -> None:
    """Read the options, then predict, score, print, save."""
    options = parse(arguments)
    from d_emo.eval.segmentation import command as evaluation  # seconds of imports, which --help does without

    evaluation.run(options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("evaluate_segmenter", __doc__)
    what = parser.add_argument_group("model and pictures")
    what.add_argument("--model", required=True, help="Folder or Hub id of a transformers semantic segmenter.")
    what.add_argument("--data-dir", help="Folder of pictures whose masks lie beside it, or that holds both.")
    what.add_argument("--mask-dir", help="Folder of the masks: same sub-folders, same names. Default: looked for.")
    what.add_argument("--image-suffix", help="What pictures' names end with behind what masks share. Default: told.")
    what.add_argument("--mask-suffix", help="What masks' names end with behind that. Default: told by the names.")
    what.add_argument(
        "--images-without-masks",
        choices=["stop", "drop"],
        default="stop",
        help="Pictures in the folder that have no mask are a mistake, or are left out.",
    )
    what.add_argument("--panoptic-json", help="COCO's panoptic JSON: --data-dir and --mask-dir are its folders.")
    what.add_argument(
        "--panoptic-classes",
        choices=["categories", "things"],
        default="categories",
        help="Of --panoptic-json: every category is a class, or things are one and stuff the other.",
    )
    what.add_argument("--dataset", help="Hub id of a dataset, a local dataset folder, or .parquet files.")
    what.add_argument("--dataset-config", help="Configuration name of a Hub dataset.")
    what.add_argument("--dataset-split", default="train", help="Split of --dataset; a file alone is called train.")
    what.add_argument("--image-column", default="image", help="Column that holds the pictures.")
    what.add_argument("--mask-column", help="Column that holds the masks. Default: one with a usual name.")
    what.add_argument("--class-names", help="Names of the masks' classes: a file, one a line. Default: the model's.")
    what.add_argument("--palette", help="Of masks of colours: a file with a line R G B NAME a class.")
    what.add_argument("--reduce-zero-label", action="store_true", help="0 is no class, and the others count from 1.")
    what.add_argument("--ignore-index", type=whole_from(0, 2**16 - 1), help="A number in masks that is no class.")
    what.add_argument("--max-images", type=whole_from(1), help="Score the first so many pictures only.")
    running = parser.add_argument_group("running and output")
    running.add_argument(
        "--window", type=whole_from(1), help="Windows of this side in pixels. Default: whole pictures."
    )
    running.add_argument("--stride", type=whole_from(1), help="From a window to the next. Default: two thirds of it.")
    running.add_argument("--batch-size", type=whole_from(1), default=4, help="Windows at once.")
    running.add_argument(
        "--short-side", type=whole_from(1), help="Bring pictures to this short side. Default: as the model's processor."
    )
    running.add_argument("--full-size", action="store_true", help="Leave pictures as they are, whatever it does.")
    running.add_argument("--num-workers", type=whole_from(0), default=0, help="Loader processes.")
    running.add_argument("--pictures", type=whole_from(0), default=24, help="The worst so many pictures are shown.")
    running.add_argument("--output-dir", help="Default: evaluation in the model's folder, or runs/evaluation-MODEL.")
    options = parser.parse_args(arguments)
    for names in (
        ("data_dir", "dataset"),
        ("short_side", "full_size"),
        ("panoptic_json", "class_names"),
        ("panoptic_json", "palette"),
        ("panoptic_json", "mask_suffix"),
    ):
        given = [flag(name) for name in names if getattr(options, name)]
        if len(given) > 1:
            parser.error(f"{' and '.join(given)} are both given; choose one.")
    for name, other in (("mask_dir", "data_dir"), ("panoptic_json", "data_dir"), ("mask_column", "dataset"),
                        ("stride", "window")):  # fmt: skip
        if getattr(options, name) and not getattr(options, other):
            parser.error(f"{flag(name)} {getattr(options, name)}: it goes with {flag(other)}.")
    if not options.data_dir and not options.dataset:
        parser.error("no data was named: --data-dir FOLDER (of pictures and masks) or --dataset NAME.")
    if options.stride and options.stride > options.window:
        parser.error(f"--stride {options.stride}: leaves gaps between windows of {options.window}.")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
