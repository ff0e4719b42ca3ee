"""Recipes of the diffusion trainer side by side, for equal time: a table in Markdown, curves of loss and distance.

    python eval/recipe_table.py --minutes 2 --seeds 0 1 --cpu-threads 1 --output-dir runs/recipes
    python eval/recipe_table.py --config train/configs/cifar10.yaml --dataset cifar10-train.parquet \\
        --reference cifar10-test.parquet --minutes 10 --seeds 0 1 --output-dir runs/recipes-cifar10

Measures how fast each recipe trains and gives it the steps that fill the minutes; trains it from every seed; scores its
samples. Run it again to go on after any interruption, and with more seeds or recipes to add them.
"""

import sys

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import positive, seed, whole_from


@command("recipe_table", kept="the same command goes on from here", extra="train")
def main(arguments: list[str]) -> None:
    """Read the options, then train, score, print, draw."""
    parser = CommandParser("recipe_table", __doc__)
    what = parser.add_argument_group("what is compared")
    what.add_argument("--recipes", help="YAML of names and flags. Default: eval/recipes/recipes.yaml.")
    what.add_argument("--only", nargs="+", help="Names of it, the one that others are compared with first.")
    what.add_argument("--seeds", type=seed, nargs="+", default=[0], help="Of every recipe's runs.")
    length = what.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=positive, help="Training time of a run. Default: 2.")
    length.add_argument("--steps", type=whole_from(1), help="So many optimizer steps in place of equal time.")
    what.add_argument("--probe-steps", type=whole_from(4), default=40, help="Steps of a measurement of speed.")
    what.add_argument("--rounds", type=whole_from(1), default=2, help="Measurements of each, in turns.")
    trained = parser.add_argument_group("what all are trained on")
    trained.add_argument("--config", default="train/configs/digits.yaml", help="The trainer's options in all runs.")
    source = trained.add_mutually_exclusive_group()
    source.add_argument("--dataset", help="As the trainer's. Default: the digits.")
    source.add_argument("--train-data-dir", help="As the trainer's.")
    trained.add_argument("--cpu-threads", type=whole_from(1), help="As the trainer's.")
    scored = parser.add_argument_group("how samples are scored")
    scored.add_argument("--reference", help="As evaluate_fid's. Default: the training images.")
    scored.add_argument("--features", default="pixels", help="As evaluate_fid's, one of them.")
    scored.add_argument("--num-images", type=whole_from(2), default=1000, help="Samples of a run.")
    scored.add_argument("--curve-points", type=whole_from(0), default=4, help="Distances on the way; 0 for none.")
    scored.add_argument("--curve-images", type=whole_from(2), default=500, help="Samples of each of these.")
    parser.add_argument("--output-dir", required=True, help="Gets runs, results.json, table.md and curves.png.")
    options = parser.parse_args(arguments)
    from d_emo.eval.recipes import command as recipes  # seconds of imports, which --help does without

    recipes.run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
