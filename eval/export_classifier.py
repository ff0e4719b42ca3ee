"""Export a network to ONNX, torch.export or Core ML, and check that the file answers as the model does.

    python eval/export_classifier.py --model runs/digits-classifier --formats onnx torch
    python eval/export_classifier.py --model EMOv2-5M-folder --formats onnx torch coreml --output-dir exported
    python eval/export_classifier.py --model my-segmenter --image-size 384 512      # height and width
    python eval/export_classifier.py --model V-EMOv2-5M --frames 8

A model is a folder or Hub id of a transformers image classifier, segmenter or video classifier, or a name with fresh
weights, for measuring: one of `d_emo.list_classifiers()`, `EMOv2-5M/segformer` and the like, `U-EMOv2-5M`,
`EMOv2-5M/ssdlite` and `/retinanet` (scores and boxes of all anchors; `d_emo.export` writes trained ones), and one of
`d_emo.list_video_classifiers()`. Every file is run on batches of one and of three and compared with the model; one that
differs is not kept. Core ML files run on Apple's systems only: elsewhere the conversion is all that is checked.
"""

import sys
from pathlib import Path

from d_emo.common.block_ranges import SIDE
from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import whole_by, whole_from

# Those of `d_emo.export`, which imports PyTorch.
FORMATS = ("onnx", "torch", "coreml")


@command("export_classifier", extra="export")
def main(arguments: list[str]) -> None:
    """Read the options, then export, compare, print."""
    parser = CommandParser("export_classifier", __doc__)
    parser.add_argument("--model", required=True, help="Packaged model, folder or Hub id, or a name such as EMOv2-5M.")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["onnx"])
    parser.add_argument(
        "--image-size", type=whole_by(SIDE), nargs="+",
        help="Side in pixels, or height and width. Default: what the model's processor makes.",
    )  # fmt: skip
    parser.add_argument("--frames", type=whole_from(1), help="Frames of a clip. Default: the video classifier's own.")
    parser.add_argument("--output-dir", type=Path, help="Default: exported in the model's folder, or runs/exported.")
    options = parser.parse_args(arguments)
    if options.image_size and len(options.image_size) > 2:
        given = " ".join(map(str, options.image_size))
        parser.error(f"--image-size {given}: expected one side, or height and width.")
    from d_emo.eval.systems import export_command  # seconds of imports, which --help does without

    export_command.run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
