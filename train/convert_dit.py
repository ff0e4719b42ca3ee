"""Published checkpoints of DiT, SiT, LightningDiT and JiT to pipelines of this package, and its DiT models to theirs.

    python train/convert_dit.py DiT-XL-2-256x256.pt --objective dit --output-dir DiT-XL-2-256
    python train/convert_dit.py SiT-XL-2-256.pt --objective sit --output-dir SiT-XL-2-256
    python train/convert_dit.py DiT-XL-2-256-of-diffusers --output-dir DiT-XL-2-256
    python train/convert_dit.py lightningdit-xl-imagenet256-64ep.pt --vae va-vae --output-dir LightningDiT-XL-1
    python train/convert_dit.py jit-b-16/checkpoint-last.pth --output-dir JiT-B-16
    python train/convert_dit.py --export runs/DiT-B-2 dit_b_2.pt
    python train/convert_dit.py --export runs/DiT-B-2 dit-b-2-of-diffusers --layout diffusers

Reads bare state dictionaries and the trainers' full checkpoints (`ema` or `model` inside, JiT's `model_ema1` and
`model_ema2`; .pt, .pth, .bin, .safetensors), whatever the network was wrapped in, and folders of Diffusers' DiTPipeline
and DiTTransformer2DModel, without running any code that a file may hold.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import whole_from
from d_emo.common.options import kinds_of
from d_emo.train.diffusion.config import AUTO_VAE, OptimizationOptions


@command("convert_dit")
def main(arguments: Sequence[str]) -> None:
    """Convert one checkpoint; mistakes end with one line."""
    kinds = kinds_of(OptimizationOptions)
    parser = CommandParser("convert_dit", __doc__)
    parser.add_argument("checkpoint", help="The file or folder to read, or with --export to write.")
    parser.add_argument(
        "--objective",
        choices=kinds["objective"].choices,
        help="DiT and SiT: what it was trained for, which a file does not tell.",
    )
    parser.add_argument(
        "--flow-path", choices=kinds["flow_path"].choices, default="linear", help="sit: the path it was trained on."
    )
    parser.add_argument(
        "--prediction", choices=kinds["prediction"].choices, default="velocity", help="sit: what the network predicts."
    )
    parser.add_argument("--output-dir", help="Pipeline folder to write.")
    parser.add_argument(
        "--weights", choices=("ema", "ema2", "model"), default="ema",
        help="Which ones of a full checkpoint; ema2 is JiT's second average.",
    )  # fmt: skip
    parser.add_argument(
        "--vae",
        help=f"Decoder to save with it: folder, Hub id, or none; default {AUTO_VAE}, and none for JiT.",
    )
    parser.add_argument("--num-heads", type=whole_from(1), help="Attention heads, for sizes that were not published.")
    parser.add_argument("--export", metavar="PIPELINE", help="Write the DiT model of this pipeline.")
    parser.add_argument(
        "--layout", choices=("published", "diffusers"), default="published",
        help="--export: the authors' .pt file, or a folder of Diffusers' DiTPipeline.",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if not options.export and not options.output_dir:
        parser.error("--output-dir is needed to import")
    from d_emo.train.diffusion import convert  # seconds of imports, which --help does without

    if options.export and options.layout == "diffusers":
        convert.export_folder(options.export, Path(options.checkpoint))
    elif options.export:
        convert.export_checkpoint(options.export, Path(options.checkpoint))
    else:
        convert.import_checkpoint(options)


if __name__ == "__main__":
    main(sys.argv[1:])
