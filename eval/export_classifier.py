"""Export a classifier to ONNX, torch.export or Core ML, and check that the file answers as the model does.

    python eval/export_classifier.py --model runs/digits-classifier --formats onnx torch
    python eval/export_classifier.py --model EMOv2-5M-folder --formats onnx torch coreml --output-dir exported

A model is a folder or Hub id of a transformers image classifier, or a name of `d_emo.list_classifiers()` (fresh
weights, for measuring). Every file is run on batches of one and of three and compared with the model; one that differs
is not kept. Core ML files run on Apple's systems only: elsewhere the conversion is all that is checked.
"""

import sys
from pathlib import Path

from d_emo.common.block_ranges import SIDE
from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import whole_by

# Those of `d_emo.export`, which imports PyTorch.
FORMATS = ("onnx", "torch", "coreml")


@command("export_classifier", extra="export")
def main(arguments: list[str]) -> None:
    """Read the options, then export, compare, print."""
    parser = CommandParser("export_classifier", __doc__)
    parser.add_argument("--model", required=True, help="Folder or Hub id of a classifier, or a name such as EMOv2-5M.")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["onnx"])
    parser.add_argument(
        "--image-size", type=whole_by(SIDE), help="Side in pixels. Default: what the model's processor makes."
    )
    parser.add_argument("--output-dir", type=Path, help="Default: exported in the model's folder, or runs/exported.")
    options = parser.parse_args(arguments)
    from d_emo.eval.classification import export_command  # seconds of imports, which --help does without

    export_command.run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
