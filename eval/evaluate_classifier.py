"""How well does a classifier do? Top-1, top-5, a report by class, and a picture of what it confuses.

    python eval/evaluate_classifier.py --model runs/digits-classifier
    python eval/evaluate_classifier.py --model EMOv2-5M --data-dir imagenet/val
    python eval/evaluate_classifier.py --model timm/resnet50.a1_in1k --dataset cats.parquet --dataset-split test

A model is a folder or Hub id of a transformers image classifier; its own image processor prepares the images. Without
images of its own it is shown scikit-learn's digits, the fifth that the trainer holds out by default. Writes
`report.json`, `classes.csv` and `confusion.png`.
"""

import argparse
import sys

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import whole_from


@command("evaluate_classifier", extra="eval", kept="nothing is written before the end")
def main(arguments: list[str]) -> None:
    """Read the options, then predict, score, print, save."""
    options = parse(arguments)
    from d_emo.eval.classification import command as evaluation  # seconds of imports, which --help does without

    evaluation.run(options)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("evaluate_classifier", __doc__)
    what = parser.add_argument_group("model and images")
    what.add_argument("--model", required=True, help="Packaged model, folder or Hub id of an image classifier.")
    what.add_argument("--data-dir", help="Folder of class folders, named by class or WordNet id.")
    what.add_argument("--dataset", help="Hub id, folder, .parquet file or .tar shards.")
    what.add_argument("--dataset-split", default="train", help="Split of --dataset; a file alone is called train.")
    what.add_argument("--image-column", default="image", help="Column that holds the images.")
    what.add_argument("--label-column", default="label", help="Column that holds the classes.")
    what.add_argument("--class-names", help="Names of classes that shards give by number: a file, or 'imagenet'.")
    running = parser.add_argument_group("running and output")
    running.add_argument("--batch-size", type=whole_from(1), default=64, help="Images at once.")
    running.add_argument("--num-workers", type=whole_from(0), default=0, help="Loader processes.")
    running.add_argument("--output-dir", help="Default: evaluation in the model's folder, or runs/evaluation-MODEL.")
    options = parser.parse_args(arguments)
    if options.data_dir and options.dataset:
        parser.error("--data-dir and --dataset are both given; choose one.")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
