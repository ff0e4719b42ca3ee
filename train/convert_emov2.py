"""Published EMOv1 and EMOv2 checkpoints to transformers folders, which `pipeline("image-classification")` loads.

    python train/convert_emov2.py EMOv2_5M.pth --output-dir EMOv2-5M
    python train/convert_emov2.py EMOv2_5M_256.pth --image-size 256 --output-dir EMOv2-5M-256
    python train/convert_emov2.py output/train/NAME/model_best.pth.tar --class-names names.txt --output-dir mine

Reads bare state dictionaries, the authors' full checkpoints (`net` and `net_E`, the averaged weights) and those of
timm's train.py (`state_dict` and `state_dict_ema`), whatever wrappers' prefixes the names have, without running any
code that a file may hold. The size is told by the tensors.
"""

import sys
from collections.abc import Sequence

from d_emo.common.block_ranges import SIDE
from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import whole_by


@command("convert_emov2")
def main(arguments: Sequence[str]) -> None:
    """Convert one checkpoint; mistakes end with one line."""
    parser = CommandParser("convert_emov2", __doc__)
    parser.add_argument("checkpoint", help="The .pth, .pth.tar, .bin or .safetensors file.")
    parser.add_argument("--output-dir", required=True, help="Folder to write.")
    parser.add_argument(
        "--weights", choices=("averaged", "raw"), default="averaged", help="Which ones of a full checkpoint."
    )
    parser.add_argument(
        "--image-size", type=whole_by(SIDE), default=224, help="Side that it was trained at; decides the window."
    )
    parser.add_argument("--class-names", help="Names of classes other than ImageNet's: a file, one a line, or JSON.")
    options = parser.parse_args(arguments)
    from d_emo.train.classification.convert import convert  # seconds of imports, which --help does without

    convert(options)


if __name__ == "__main__":
    main(sys.argv[1:])
