"""The benchmark: any model of the package beside any other, in one process, in turns.

    python eval/throughput.py                                            # D-EMOv2-S-2 against DiT-S-2 on this machine
    python eval/throughput.py --models D-EMOv2-XL-2 DiT-XL-2 --batch 32 64 128 256 --dtypes bfloat16 --compile blocks
    python eval/throughput.py --latent 32 64 128 --jobs forward          # cost as the image grows
    python eval/throughput.py --models D-EMOv2-S-2 D-EMOv2-S-2@reference diffusers:DiT-S-2
    python eval/throughput.py --models EMOv2-1M EMOv2-1M@onnx timm:mobilenetv4_conv_small timm:edgenext_x_small \
        --jobs forward --dtypes float32 --batch 1                        # a classifier's latency
    python eval/throughput.py --models EMOv2-5M/deeplabv3 EMOv2-5M/segformer transformers:segformer-b0 \
        torchvision:deeplabv3_mobilenet_v3_large --image 512 --jobs forward --dtypes float32 --batch 1

A model is a name of `d_emo.list_models()`, `diffusers:DiT-S-2` (Diffusers' own network at that size), or, among
networks of images, a name of `d_emo.list_classifiers()`, `timm:NAME`, a system (`EMOv2-5M/` and one of deeplabv3,
pspnet, segformer, semantic_fpn, ssdlite, retinanet, mask_rcnn; `U-EMOv2-5M`, `UNet-S5-D16`), or its nearest elsewhere:
`transformers:segformer-b0`, `torchvision:deeplabv3_mobilenet_v3_large`, `torchvision:lraspp_mobilenet_v3_large`,
`torchvision:ssdlite320_mobilenet_v3_large`; among networks of clips, 4 frames each, a name of
`d_emo.list_video_classifiers()`. `NAME@reference` runs plain PyTorch in place of the fast kernels, `NAME@checkpointed`
recomputes activations, `NAME@onnx` runs in onnxruntime, and `NAME@reference+checkpointed` does both. The last model is
the baseline of every ratio. Weights are fresh; "published" is what the papers and torchvision print of trained ones.
Segmenters give the logits that they give (torchvision's, U-EMOv2's and UNet's at the image's size, the others coarser)
over 150 classes (U-EMOv2 and UNet: 2); detectors take pictures and give the boxes of 80 classes that are left, few with
fresh weights.
Every model runs once a round, for `--repeats` rounds after a warm-up; a matrix product is timed in every round too.

Jobs: `forward` (no gradients), `train` (forward, backward, AdamW step), `sample` (DEMOPipeline, guidance 4). bfloat16
is the weights' type in `forward` and `sample`, and autocast in `train`, as users run them. FLOPs are those of products
and convolutions; a training step counts as three forward passes. MFU is their share of the card's peak in bfloat16,
where that is known (H100, H200, A100). Memory is the peak above what is held before the job. What fails or does not
fit is a line that says why; the rest is measured, and the command ends with an error.
"""

import argparse
import sys
from pathlib import Path

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.files import check_writable
from d_emo.common.numbers import whole_from

JOBS = ("forward", "train", "sample")
# Those of `d_emo.eval.benchmarks.subjects`, which imports PyTorch.
DTYPES = ("float32", "bfloat16")
# Not at all, or one of `d_emo.models.compiling.WAYS`.
COMPILED = ("none", "blocks", "whole", "graphs")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("throughput", __doc__)
    parser.add_argument("--models", nargs="+", default=["D-EMOv2-S-2", "DiT-S-2"], help="The last is the baseline.")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=["forward", "train"])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--compile", nargs="+", choices=COMPILED, default=["none"])
    parser.add_argument("--batch", nargs="+", type=whole_from(1), default=[8])
    parser.add_argument("--latent", nargs="+", type=whole_from(1), default=[32], help="Side of the latent.")
    parser.add_argument("--image", nargs="+", type=whole_from(1), default=[224], help="Side of an image or frame.")
    parser.add_argument(
        "--depth", nargs="+", type=whole_from(1), default=[None], help="Blocks in place of the model's own."
    )
    parser.add_argument("--repeats", type=whole_from(2), default=7, help="Rounds, for a median and a spread.")
    parser.add_argument("--threads", type=whole_from(1), help="CPU threads. Default: all cores.")
    parser.add_argument(
        "--output", type=Path, help="Folder for results.json and table.md, written as they grow, and ratios.png."
    )
    options = parser.parse_args(arguments)
    from d_emo.eval.benchmarks.side_by_side import check_models  # seconds of imports, which --help does without

    try:
        if options.output:
            check_writable(options.output, "--output", folder=True)
        check_models(options)
    except ValueError as error:
        parser.error(str(error))
    return options


@command("throughput", extra="eval")
def main(arguments: list[str]) -> None:
    """Read the options, then measure."""
    options = parse(arguments)
    from d_emo.eval.benchmarks import side_by_side

    side_by_side.run(options)


if __name__ == "__main__":
    main(sys.argv[1:])
