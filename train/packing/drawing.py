"""Packaged models that draw: trained by the diffusion trainer, scored beside the real digits."""

from pathlib import Path

import numpy as np

from d_emo.common.figures import save_image
from d_emo.eval import evaluate_fid
from d_emo.eval.digits_report import (
    DigitsReport,
    draw,
    load_digits_pipeline,
    neighbour_picture,
    real_digits,
    score_digits,
)
from d_emo.eval.fid import command as fid
from d_emo.eval.fid.evaluation import SCORES_FILE
from d_emo.eval.fid.scoring import load_scores
from d_emo.train.diffusion import trainer
from d_emo.train.diffusion.config import parse_config
from d_emo.train.packing.card import score_table

MARK = "model_index.json"
# Samples a class that are read and compared, and how they are drawn; what the Frechet distance is of.
PER_CLASS, STEPS, GUIDANCE, SEED = 20, 50, 1.5, 0
FRECHET = ("--preset", "quick", "--num-images", "500", "--reference", "digits", "--features", "pixels",
           "--metrics", "fid", "--confidence")  # fmt: skip
USAGE = (
    "import d_emo",
    "",
    'pipe = d_emo.DEMOPipeline.from_pretrained(d_emo.packaged("{name}"))',
    'pipe("three").images[0].save("three.png")',
)
load = load_digits_pipeline


def train(arguments: list[str]) -> None:
    """The trainer, with the arguments of its command."""
    trainer.run(parse_config(arguments, ""))


def measure(run: Path, packed: Path, shown_as: str) -> list[str]:
    """Scores of the model in float16 beside the one that it was made of, as lines of a card.

    Args:
        run: folder with the model in float32; what is written besides goes into its `evaluation`.
        packed: folder in float16, which gets a picture.
        shown_as: what commands call the latter.
    """
    side = load(str(packed)).transformer.config.sample_size
    real, classes = real_digits(side)
    requested = np.repeat(np.arange(10), PER_CLASS)
    samples = {folder: draw(load(str(folder)), PER_CLASS, STEPS, GUIDANCE, SEED) for folder in (packed, run)}
    reports = {folder: score_digits(samples[folder], requested, real, classes) for folder in samples}
    save_image(neighbour_picture(samples[packed], real, side, columns=10), packed / "neighbours.png")
    difference = np.abs(samples[packed] - samples[run]) * 127.5  # grey levels
    output = run / "evaluation" / "fid"
    fid.run(evaluate_fid.parse_options(["--model", str(packed), *FRECHET, "--output-dir", str(output)]))
    scores = load_scores(output / SCORES_FILE)
    low, high = scores.intervals["fid"]
    return [
        f"{10 * PER_CLASS} digits, {PER_CLASS} a class, {STEPS} steps, guidance {GUIDANCE}, seeds from {SEED} on:",
        "",
        "```bash",
        f"python -m d_emo.eval.evaluate_digits --model {shown_as} --per-class {PER_CLASS} --output-dir evaluation",
        "```",
        "",
        *_table(reports[packed], reports[run]),
        "",
        f"The two draw the same images: {(difference > 1.5).mean():.2%} of all pixels of these {10 * PER_CLASS} "
        f"differ by more than one grey level of 255, the most by {difference.max():.0f}.",
        "",
        "![Samples, and below each its nearest real image](neighbours.png)",
        "",
        f"Frechet distance between the pixels of {scores.count:,} samples without guidance and all 1,797 real digits: "
        f"**{scores.values['fid']:.3f}** (95% interval {low:.3f} to {high:.3f}; it is no FID, and compares only "
        "with what the same command gives):",
        "",
        "```bash",
        f"python -m d_emo.eval.evaluate_fid --model {shown_as} {' '.join(FRECHET)} --output-dir evaluation/fid",
        "```",
    ]


def _table(packed: DigitsReport, full: DigitsReport) -> list[str]:
    """Both models' scores."""
    both = (packed, full)
    rows = {
        "read as the digit that was asked for": [f"{report.requested_class:.1%}" for report in both],
        "median distance to the nearest real image": [f"{report.nearest_real_to_sample:.3f}" for report in both],
        "closer to a real image than 99% of real ones are to each other": [
            f"{report.close_share:.1%}" for report in both
        ],
    }
    return [
        *score_table(rows),
        "",
        f"They are read by a support vector machine, {packed.classifier_accuracy:.1%} accurate on real digits held out "
        "from its fit. Distances are root mean squares over pixels in [-1, 1]; the median from a real image to its "
        f"nearest other one is {packed.nearest_real_to_real:.3f}, and samples that are remembered would be far below.",
    ]
