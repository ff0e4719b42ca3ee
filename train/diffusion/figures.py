"""What a run shows: samples class by class, and the loss curve."""

import csv
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from d_emo.common.files import written_whole
from d_emo.pipelines import DEMOPipeline
from d_emo.train.diffusion.on_track import PublishedLoss

MAX_CLASSES = 10
SAMPLES = "samples"


def grid_path(folder: Path, step: int) -> Path:
    """Where the grid of a step lies in a run's folder."""
    return folder / SAMPLES / f"step-{step:07d}.png"


def last_grid(folder: Path, step: int) -> Path | None:
    """The newest grid up to a step; None where none was drawn."""
    grids = sorted(path for path in (folder / SAMPLES).glob("step-*.png") if path <= grid_path(folder, step))
    return grids[-1] if grids else None


def classes_to_show(num_classes: int) -> list[int]:
    """At most ten classes, evenly spread over the ids."""
    count = min(MAX_CLASSES, num_classes)
    return [index * num_classes // count for index in range(count)]


def draw_samples(
    pipeline: DEMOPipeline, per_class: int, steps: int, guidance_scale: float, seed: int
) -> tuple[list[list[PIL.Image.Image]], list[str]]:
    """Sample rows of images, one row a class, and their captions. The same seed gives the same noise every time."""
    classes = classes_to_show(pipeline.transformer.config.num_classes)
    count = per_class * max(1, len(classes))
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    images = pipeline(
        classes or None,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        num_images_per_label=per_class,
        generator=generators,
    ).images
    rows = [images[start : start + per_class] for start in range(0, count, per_class)]
    return rows, [pipeline.id2label.get(label, str(label)) for label in classes] or ["unconditional"]


def plot_loss(log: Path, path: Path, title: str, published: PublishedLoss | None = None) -> None:
    """Draw the loss column of a training log against its step column, over the published curve if there is one."""
    from matplotlib.figure import Figure

    with log.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps, losses = [int(row["step"]) for row in rows], [float(row["loss"]) for row in rows]
    if published is not None:
        shown = published.steps <= max(steps)
        axes.plot(published.steps[shown], published.losses[shown], linewidth=3, alpha=0.4, label="published")
        # The first steps' losses would hide the rest of the curves.
        axes.set_ylim(0.95 * min(losses), 1.1 * float(np.quantile(losses, 0.95)))
    axes.plot(steps, losses, linewidth=1, label="this run")
    if published is not None:
        axes.legend()
    axes.set(xlabel="optimizer step", ylabel="training loss", title=title)
    axes.grid(alpha=0.3)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
