"""From a checkpoint, or from images, to FID, sFID, Inception Score, precision, recall and KID.

    python -m d_emo.eval.evaluate_fid --model runs/digits --preset quick --reference digits --features pixels
    accelerate launch -m d_emo.eval.evaluate_fid --model runs/B-2 --preset dit-400k --reference ADM.npz
    python -m d_emo.eval.evaluate_fid --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    python -m d_emo.eval.evaluate_fid --model runs/B-2 --checkpoints all --preset quick --reference imagenet/train
    python -m d_emo.eval.evaluate_fid --model runs/B-2 --preset repa --sweep guidance=1.0:2.0:0.25 --reference ADM.npz

Run it again to go on after any interruption. It writes samples, features, scores.json and report.html.
"""

import argparse
import sys
from collections.abc import Sequence

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import finite_by, finite_from, seed, whole_from
from d_emo.common.ranges import RELATIVE_LENGTH
from d_emo.eval.fid.names import GUIDERS, METRICS, PRESET_NOTES


@command("evaluate_fid", kept="the same command goes on from here", extra="eval")
def main(arguments: Sequence[str]) -> None:
    """Read the options, then evaluate."""
    options = parse_options(arguments)
    from d_emo.eval.fid import command as fid  # seconds of imports, which --help does without

    fid.run(options)


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    presets = "\n".join(f"  {name:<12} {note}" for name, note in PRESET_NOTES.items())
    parser = CommandParser("evaluate_fid", __doc__, epilog=f"presets:\n{presets}")
    what = parser.add_argument_group("what is scored").add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="Packaged model, pipeline folder, checkpoint-STEP folder, run folder, or Hub id.")
    what.add_argument(
        "--samples", help="Images that exist: .npz, folder, .parquet, or a samples folder of this command."
    )
    parser.add_argument("--checkpoints", help='With --model RUN: "all", or steps such as 100000,200000,400000.')
    against = parser.add_argument_group("what it is compared with")
    against.add_argument(
        "--reference",
        required=True,
        help="ADM's or pytorch-fid's .npz, a folder or .parquet of images, or 'digits'. Images are cropped and resized "
        "to the samples' size as ADM prepares ImageNet.",
    )
    against.add_argument(
        "--reference-images", type=whole_from(1), help="Take so many images of the reference. Default: all."
    )
    against.add_argument("--image-column", default="image", help="Column of a parquet file.")
    against.add_argument("--label-column", default="label", help="Its column of classes, for --by-class.")
    against.add_argument(
        "--features",
        nargs="+",
        default=["inception"],
        help="inception, fd-dinov2, clip, dinov2, pixels, or a transformers model; several are reported side by side.",
    )
    against.add_argument("--inception-weights", help="File of torch-fidelity's Inception weights; checked by its hash.")
    against.add_argument("--unverified-inception", action="store_true", help="Take other Inception weights.")
    against.add_argument("--metrics", nargs="+", choices=METRICS, default=METRICS, help="Default: all that apply.")
    against.add_argument(
        "--confidence", action="store_true", help="Also 95%% intervals of distances (20 times their cost)."
    )
    against.add_argument("--by-class", action="store_true", help="Also the distance of classes with enough images.")
    drawing = parser.add_argument_group("how samples are drawn (each overrides the preset)")
    drawing.add_argument("--preset", help="See below. Default: dit-400k or sit-sde, as fits the model.")
    drawing.add_argument("--num-images", type=whole_from(1), help="Images to draw, or to take of --samples.")
    drawing.add_argument(
        "--sampler", choices=("ddpm", "ddim", "euler", "heun", "sde", "sde-heun", "flow-map", "own", "fast")
    )
    drawing.add_argument("--steps", type=whole_from(1), help="Sampler steps.")
    drawing.add_argument(
        "--time-shift", type=shift, help="Of a flow's steps; 1 is none, auto is RAE's rule. Default: the model's own."
    )
    drawing.add_argument("--guidance-scale", type=finite_from(0), help="1 is no guidance.")
    drawing.add_argument("--guidance-channels", type=whole_from(1), help="Guide the first so many channels only.")
    drawing.add_argument(
        "--guidance-interval",
        type=finite_from(0),
        nargs=2,
        metavar=("START", "STOP"),
        help="Guide in this part of the way from noise (0) to data (1) only.",
    )
    drawing.add_argument("--guider", choices=GUIDERS, help="Diffusers' formula of guidance. Default: the plain one.")
    drawing.add_argument(
        "--guide", help='Weaker model to steer away from in the place of "no class": packaged, folder, or Hub id.'
    )
    drawing.add_argument(
        "--internal-guidance", type=finite_from(1), help="Scale, of models trained with --guide-block; 1 is none."
    )
    drawing.add_argument("--labels", choices=("random", "balanced"), help="Uniformly drawn classes, or in turn.")
    drawing.add_argument("--vae", help="Decoder: folder or Hub id.")
    drawing.add_argument("--seed", type=seed, help="Image i is a function of (seed, i).")
    drawing.add_argument("--weights", choices=("averaged", "raw"), help="Raw ones are in training checkpoints only.")
    drawing.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="Type of model and decoder.")
    drawing.add_argument(
        "--ema",
        type=finite_by(RELATIVE_LENGTH),
        help="Relative length of an average that is made of the run's snapshots. Default: the stored one.",
    )
    sweeping = parser.add_argument_group("finding the best settings")
    sweeping.add_argument(
        "--sweep",
        nargs="+",
        metavar="NAME=VALUES",
        help="guidance, internal-guidance, ema, steps, shift, interval-start or interval-stop, each with "
        "START:STOP:STEP or VALUE,VALUE: every combination is scored on a small set, the best one on the full set.",
    )
    sweeping.add_argument("--sweep-images", type=whole_from(2), default=5000, help="Images of the small set.")
    running = parser.add_argument_group("running and output")
    running.add_argument("--output-dir", help="Default: evaluation/PRESET in the model's folder, else evaluation/NAME.")
    running.add_argument(
        "--cache-dir", help="For references' features. Default: features/ in $D_EMO_CACHE or ~/.cache/d_emo."
    )
    running.add_argument("--batch-size", type=whole_from(1), default=32, help="Images drawn at once by a process.")
    running.add_argument(
        "--feature-batch-size", type=whole_from(1), default=50, help="Images at once in the feature network."
    )
    running.add_argument(
        "--num-workers", type=whole_from(0), help="Loader processes for images. Default: 4 beside a GPU."
    )
    running.add_argument("--export-npz", help="Also write the samples for ADM's original evaluator.")
    options = parser.parse_args(arguments)
    if options.checkpoints and not options.model:
        parser.error("--checkpoints goes with --model RUN")
    if options.checkpoints and options.export_npz:
        parser.error("--export-npz writes one file; choose one checkpoint with --model RUN/checkpoint-STEP")
    if options.sweep and (not options.model or options.checkpoints):
        parser.error("--sweep goes with --model and one model; choose one with --model RUN/checkpoint-STEP")
    return options


def shift(text: str) -> float | str:
    """The type of --time-shift."""
    from d_emo.eval.fid.protocol import read_shift  # brings torch, which --help does without

    return read_shift(text)


if __name__ == "__main__":
    main(sys.argv[1:])
