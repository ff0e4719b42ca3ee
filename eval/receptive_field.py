"""Which pixels does a network look at? The effective receptive field of any backbones, side by side.

    python eval/receptive_field.py --models EMOv2-5M EMOv1-5M timm:resnet50 --output erf.png
    python eval/receptive_field.py --models runs/my-classes timm/resnet50.a1_in1k --images my_photos --output erf.png

The gradient of the position in the middle of a network's map, summed over its channels, tells how much each pixel
contributes: its absolute value, summed over the colours, averaged over images (arXiv 1701.04128). Prints the smallest
square that holds 20, 30, 50 and 99% of all contributions, and its share of the image; draws the contributions.

A model is a name of `d_emo.list_classifiers()` or `timm:NAME`, with fresh weights: an untrained network's field, for
which scales of residual branches that begin near 0 (EMOv2's layer scale of 1e-6) are set to 1, as no block would
contribute otherwise. Or it is the folder or Hub id of a trained image classifier. Without --images it looks at noise.
"""

import argparse
import sys
from pathlib import Path

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.files import check_writable
from d_emo.common.numbers import whole_from

STRIDES = (2, 4, 8, 16, 32)
NO_IMAGES = "none"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("receptive_field", __doc__)
    parser.add_argument("--models", nargs="+", default=["EMOv2-5M", "EMOv1-5M"], help="Names, folders or Hub ids.")
    parser.add_argument("--images", help="Folder of pictures, at any depth. Default: none, that is noise.")
    parser.add_argument("--num-images", type=whole_from(1), default=16, help="At most so many of them, evenly spread.")
    parser.add_argument(
        "--image-size", type=whole_from(32, 4096), default=224, help="Side that networks see, in pixels."
    )
    parser.add_argument(
        "--stride", type=int, choices=STRIDES, help="Take the last map of that stride. Default: the last."
    )
    parser.add_argument("--seed", type=whole_from(0), default=0, help="Of fresh weights and noise.")
    parser.add_argument("--output", type=Path, help="PNG to draw.")
    options = parser.parse_args(arguments)
    if options.images == NO_IMAGES:
        options.images = None
    try:
        if options.output:
            check_writable(options.output, "--output")
    except ValueError as error:
        parser.error(str(error))
    return options


@command("receptive_field", extra="train")
def main(arguments: list[str]) -> None:
    """Read the options, then look."""
    options = parse(arguments)
    from d_emo.eval.classification import receptive_fields  # seconds of imports, which --help does without

    receptive_fields.run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
