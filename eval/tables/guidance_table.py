"""What each form of guidance gives at equal cost, on digits.

    python eval/tables/guidance_table.py --model runs/digits-guide --guide runs/digits-guide/checkpoint-0000250

Every row draws the same labels (200 by default) from the same seeds with as many evaluations of networks an image:
forms that ask twice a step take half of the steps. `read right` is the share that the packaged classifier of digits
reads as the digit asked for. `distance` is the Frechet distance between Gaussians fitted to samples and real images in
pixels ([-1, 1]). Rows of internal guidance need a model that was trained with --guide-block, rows of autoguidance a
--guide: an earlier checkpoint, or a smaller model.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.files import check_writable, make_folder, write_json
from d_emo.common.numbers import whole_from
from d_emo.eval.digits_report import drawn, load_digits_pipeline, real_digits
from d_emo.eval.fid.metrics import frechet_distance, moments_of

COLUMNS = ("guidance", "scale", "steps", "evaluations", "read right", "distance")
SCALES = (1.5, 2.0, 3.0)
INTERNAL = (1.2, 1.4, 1.8)
INTERVAL = (0.2, 0.8)
GUIDERS = ("zero-star", "apg", "apg-mix", "tcfg")


def forms(guided: bool, headed: bool) -> Iterator[tuple[str, float, dict[str, Any], float]]:
    """Name, scale, arguments of a call, and evaluations a step of every row.

    Args:
        guided: whether there is a weaker model.
        headed: whether the model has a second output head.
    """
    yield "none", 1.0, {"guidance_scale": 1.0}, 1
    for scale in SCALES:
        yield "classifier-free", scale, {"guidance_scale": scale}, 2
    start, stop = INTERVAL
    for scale in SCALES:
        call = {"guidance_scale": scale, "guidance_interval": INTERVAL}
        yield f"classifier-free, {start:g} to {stop:g} of the way", scale, call, 1 + stop - start
    for guider in GUIDERS:
        for scale in SCALES[1:]:
            yield guider, scale, {"guidance_scale": scale, "guider": guider}, 2
    for scale in SCALES if guided else ():
        yield "autoguidance", scale, {"guidance_scale": scale, "guide": True}, 2
    for scale in INTERNAL if headed else ():
        yield "internal", scale, {"guidance_scale": 1.0, "internal_guidance": scale}, 1
    for scale in INTERNAL if headed else ():
        call = {"guidance_scale": SCALES[0], "internal_guidance": scale}
        yield f"internal, and classifier-free {SCALES[0]:g}", scale, call, 2


@command("guidance_table", extra="train")
def main(arguments: list[str]) -> None:
    """Draw, score and print row after row; write JSON beside the model."""
    parser = CommandParser("guidance_table", __doc__)
    parser.add_argument("--model", required=True, help="Pipeline folder of a digits run.")
    parser.add_argument("--guide", help="Pipeline folder of a weaker one.")
    parser.add_argument("--per-class", type=whole_from(1), default=20, help="Samples a class.")
    parser.add_argument("--evaluations", type=whole_from(1), default=40, help="Of networks, an image.")
    parser.add_argument("--seed", type=whole_from(0), default=0, help="Seed of the first sample.")
    parser.add_argument("--output-dir", help="Default: evaluation in the model's folder.")
    options = parser.parse_args(arguments)
    folder = Path(options.output_dir or Path(options.model) / "evaluation")
    check_writable(folder, "--output-dir", folder=True)
    pipeline = load_digits_pipeline(options.model)
    guide = None if options.guide is None else load_digits_pipeline(options.guide, "--guide")
    for one in (pipeline, *([] if guide is None else [guide])):
        one.set_progress_bar_config(disable=True)
    side = pipeline.transformer.config.sample_size
    real = moments_of(real_digits(side)[0])
    requested = np.repeat(np.arange(10), options.per_class)
    rows = []
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for name, scale, call, cost in forms(guide is not None, pipeline.transformer.config.guide_block is not None):
        steps = max(1, round(options.evaluations / cost))
        call = {**call, "guide": guide if call.get("guide") else None, "num_inference_steps": steps}
        samples, settings = drawn(pipeline, options.per_class, options.seed, **call)
        row: dict[str, Any] = {
            "guidance": name,
            "scale": scale,
            "steps": steps,
            "evaluations": settings["network_evaluations"] + settings["guide_evaluations"],
            "read right": round(float((read(samples, side) == requested).mean()), 3),
            "distance": round(frechet_distance(moments_of(samples), real), 3),
        }
        rows.append(row)
        print(f"| {' | '.join(str(row[name]) for name in COLUMNS)} |", flush=True)
    make_folder(folder)
    write_json(folder / "guidance.json", {"rows": rows, **vars(options)})


def read(samples: np.ndarray, side: int) -> np.ndarray:
    """The digits (N,) that the packaged classifier reads in samples (N, side * side) in [-1, 1]."""
    import PIL.Image
    from transformers import pipeline

    from d_emo import packaged

    classify = pipeline("image-classification", str(packaged("digits-classifier")))
    ids: Any = classify.model.config.label2id
    grey = ((samples.reshape(-1, side, side) + 1) * 127.5).round().astype(np.uint8)
    pictures = [PIL.Image.fromarray(one).convert("RGB") for one in grey]
    return np.array([ids[answer[0]["label"]] for answer in classify(pictures, top_k=1, batch_size=50)])


if __name__ == "__main__":
    main(sys.argv[1:])
