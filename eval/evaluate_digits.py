"""Does the README's model draw the digit that was asked for, and does it draw or remember?

    python eval/evaluate_digits.py --model runs/digits

A support vector machine fitted on real digits (scikit-learn) reads samples of a saved pipeline. The nearest real image
of each sample is compared with how close real images are to each other. Writes a picture of samples beside their
nearest real neighbours, and a JSON file.
"""

import sys

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import finite_from, seed, whole_from


@command("evaluate_digits", extra="train")
def main(arguments: list[str]) -> None:
    """Read the options, then sample, score, print, save."""
    parser = CommandParser("evaluate_digits", __doc__)
    parser.add_argument("--model", required=True, help="Packaged model, or pipeline folder that the trainer wrote.")
    parser.add_argument("--per-class", type=whole_from(1), default=20, help="Samples a class.")
    parser.add_argument("--steps", type=whole_from(1), default=50, help="Sampler steps.")
    parser.add_argument("--guidance-scale", type=finite_from(1), default=1.5, help="Guidance scale; 1.0 is off.")
    parser.add_argument("--seed", type=seed, default=0, help="Seed of the first sample.")
    parser.add_argument("--output-dir", help="Default: evaluation in the model's folder.")
    options = parser.parse_args(arguments)
    from d_emo.eval import digits_report  # seconds of imports, which --help does without

    digits_report.run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
