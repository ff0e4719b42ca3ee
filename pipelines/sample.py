"""Draw pictures of classes with a trained model.

    d-emo sample --model digits --labels three seven --num-images 8 --output grid.png
    d-emo sample --model runs/B-2 --every-class --num-images 2 --steps 50 --guidance-scale 4 --output every-class.png
    d-emo sample --model runs/B-2 --guide runs/B-2/checkpoint-0100000 --guidance-scale 2 --every-class --output a.png
    d-emo sample --model someone/DiT-XL-2 --labels 207 "golden retriever" --num-images 1000 --output retrievers/

A model is one that comes with the package (`d-emo models` lists them), else a folder, else a Hub id; ./NAME is a folder
that has a packaged model's name. Output with a suffix that Pillow writes (.png, .jpg, .webp) is one picture, the names
of classes beside its rows; without a suffix, or with / at its end, it is a folder that gets a file an image, to which
the same command adds what is missing. Image i is a function of seed and i, whatever the batch, as in `d-emo fid`. A PNG
holds the settings that made it, as text under "d_emo"; a folder's samples.json has them, too.
"""

import argparse
import sys

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import finite_from, seed, whole_from

# Those of `d_emo.pipelines.samplers`, which imports PyTorch; the model's own is the default.
SAMPLERS = ("own", "ddpm", "ddim", "euler", "heun", "sde", "sde-heun", "flow-map")
# Those of `d_emo.pipelines.guidance`.
GUIDERS = ("cfg", "zero-star", "apg", "apg-mix", "tcfg")
FORMATS = ("png", "jpg", "webp")


@command("sample", kept="in a folder of files, the same command goes on from here")
def main(arguments: list[str]) -> None:
    """Read the options, then draw."""
    options = parse(arguments)
    from d_emo.pipelines import sample_command  # seconds of imports, which --help does without

    sample_command.run(options, arguments)


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser("sample", __doc__)
    what = parser.add_argument_group("what is drawn")
    what.add_argument("--model", required=True, help="Packaged model, pipeline folder, or Hub id.")
    classes = what.add_mutually_exclusive_group()
    classes.add_argument(
        "--labels", nargs="+", metavar="CLASS", help="Names of classes, or ids where no class has that name."
    )
    classes.add_argument("--every-class", action="store_true", help="All classes of the model.")
    what.add_argument("--num-images", type=whole_from(1), default=4, help="Of each class; of a model without, in all.")
    what.add_argument("--size", type=whole_from(1), nargs="+", metavar="PIXELS", help="Side, or height and width.")
    how = parser.add_argument_group("how it is drawn (by default as the model was saved)")
    how.add_argument("--sampler", choices=SAMPLERS, default="own", help="Of those that fit what the model predicts.")
    how.add_argument("--steps", type=whole_from(1), help="Sampler steps.")
    how.add_argument("--guidance-scale", "--guidance", type=finite_from(1), default=1.5, help="1 is no guidance.")
    how.add_argument("--guidance-channels", type=whole_from(1), help="Guide the first so many channels only.")
    how.add_argument(
        "--guidance-interval", type=finite_from(0), nargs=2, metavar=("START", "STOP"),
        help="Guide in this part of the way from noise (0) to data (1) only.",
    )  # fmt: skip
    how.add_argument("--guider", choices=GUIDERS, help="Diffusers' formula of guidance. Default: the plain one.")
    how.add_argument(
        "--guide", help='Weaker model to steer away from in the place of "no class": packaged, folder, or Hub id.'
    )
    how.add_argument(
        "--internal-guidance", type=finite_from(1), default=1.0,
        help="Scale, of models trained with --guide-block; 1 is none.",
    )  # fmt: skip
    how.add_argument("--seed", type=seed, default=0, help="Image i is a function of (seed, i).")
    how.add_argument("--vae", help="Decoder, where the model was saved without: folder or Hub id.")
    running = parser.add_argument_group("running and output")
    running.add_argument("--output", required=True, help="Picture, or folder.")
    running.add_argument("--format", choices=FORMATS, help="Of the files in a folder. Default: png.")
    running.add_argument("--overwrite", action="store_true", help="Replace a picture, or a folder of this command's.")
    running.add_argument("--batch-size", type=whole_from(1), default=32, help="Images drawn at once.")
    running.add_argument("--device", help="cpu, cuda, cuda:1, mps. Default: the accelerator, if there is one.")
    running.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Of weights.")
    options = parser.parse_args(arguments)
    if options.size and len(options.size) > 2:
        parser.error(f"--size {' '.join(map(str, options.size))}: give one side, or height and width.")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
