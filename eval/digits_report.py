"""What `evaluate_digits.py` does after it has read its options: draw digits, read them, look for their neighbours."""

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch

from d_emo.common.figures import caption_grid, save_image
from d_emo.common.files import check_writable, write_json
from d_emo.common.output import has_terminal
from d_emo.common.packaged import model_place
from d_emo.common.saved_folders import evaluation_folder
from d_emo.images.decode import to_tensor
from d_emo.images.digits import digits_source

if TYPE_CHECKING:
    from d_emo.pipelines import DEMOPipeline

# Samples closer to a real image than this share of real images are to each other count as suspiciously close.
CLOSE_QUANTILE = 0.01


@dataclass(frozen=True)
class DigitsReport:
    """Scores of a set of samples; distances are root mean squares over pixels in [-1, 1].

    Attributes:
        num_samples: images drawn, the same number a class.
        requested_class: share of them that the classifier reads as the class asked for.
        classifier_accuracy: the classifier's own accuracy on real images held out from its fit.
        nearest_real_to_sample: median distance from a sample to its nearest real image.
        nearest_real_to_real: median distance from a real image to its nearest other one.
        close_share: share of samples closer to a real image than 99% of real images are to another.
    """

    num_samples: int
    requested_class: float
    classifier_accuracy: float
    nearest_real_to_sample: float
    nearest_real_to_real: float
    close_share: float


def real_digits(side: int) -> tuple[np.ndarray, np.ndarray]:
    """All real digits as (1797, side * side) in [-1, 1], and their classes."""
    source = digits_source()
    images = [to_tensor(source.read(index), 1, side).flatten().numpy() for index in range(source.size)]
    return np.stack(images), source.labels


def nearest(points: np.ndarray, others: np.ndarray, exclude_self: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Index of and root-mean-square distance to the nearest of `others` (M, D) for each of `points` (N, D)."""
    # Differences, not a matrix product: identical images are at distance 0 exactly.
    distances = torch.cdist(
        torch.from_numpy(points).double(),
        torch.from_numpy(others).double(),
        compute_mode="donot_use_mm_for_euclid_dist",
    )
    if exclude_self:
        distances.fill_diagonal_(float("inf"))
    values, indices = distances.min(dim=1)
    return indices.numpy(), values.numpy() / np.sqrt(points.shape[1])


def load_digits_pipeline(name: str, option: str = "--model") -> "DEMOPipeline":
    """The pipeline of a digits run, or the packaged one, that an option names.

    Raises:
        ValueError: the folder is no pipeline, or not one of digits.
    """
    from d_emo.pipelines import DEMOPipeline

    folder = Path(model_place(name))
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{option} {name} is not a pipeline folder; train one with train/train_dit.py.")
    pipeline = DEMOPipeline.from_pretrained(folder)
    config = pipeline.transformer.config
    if config.in_channels != 1 or config.num_classes != 10:
        raise ValueError(f"{option} {name} was not trained on the digits.")
    pipeline.set_progress_bar_config(disable=not has_terminal())
    return pipeline


def score_digits(samples: np.ndarray, requested: np.ndarray, real: np.ndarray, classes: np.ndarray) -> DigitsReport:
    """Score samples (N, D) that were asked to be of `requested` classes (N,) against real images (M, D)."""
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    fit_x, test_x, fit_y, test_y = train_test_split(real, classes, test_size=0.2, random_state=0, stratify=classes)
    classifier = SVC().fit(fit_x, fit_y)
    _, sample_distance = nearest(samples, real)
    _, real_distance = nearest(real, real, exclude_self=True)
    return DigitsReport(
        num_samples=len(samples),
        requested_class=float((classifier.predict(samples) == requested).mean()),
        classifier_accuracy=float(classifier.score(test_x, test_y)),
        nearest_real_to_sample=float(np.median(sample_distance)),
        nearest_real_to_real=float(np.median(real_distance)),
        close_share=float((sample_distance < np.quantile(real_distance, CLOSE_QUANTILE)).mean()),
    )


def draw(pipeline: "DEMOPipeline", per_class: int, steps: int, guidance_scale: float, seed: int) -> np.ndarray:
    """Samples (10 * per_class, D) in [-1, 1], sorted by class, rounded to 8 bits as a saved image would be."""
    return drawn(pipeline, per_class, seed, num_inference_steps=steps, guidance_scale=guidance_scale)[0]


def drawn(pipeline: "DEMOPipeline", per_class: int, seed: int, **call: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """The same by other arguments of a call, and the settings that the pipeline reports."""
    output = pipeline(
        range(10),
        num_images_per_label=per_class,
        generator=[torch.Generator().manual_seed(seed + index) for index in range(10 * per_class)],
        output_type="np",
        **call,
    )
    samples = ((output.images * 255).round() / 127.5 - 1).reshape(len(output.images), -1).astype(np.float32)
    return samples, output.settings


def neighbour_picture(samples: np.ndarray, real: np.ndarray, side: int, columns: int) -> PIL.Image.Image:
    """Rows in pairs: samples of one class, then the nearest real image of each."""
    indices, _ = nearest(samples, real)

    def picture(pixels: np.ndarray) -> PIL.Image.Image:
        return PIL.Image.fromarray(((pixels.reshape(side, side) + 1) * 127.5).round().astype(np.uint8))

    per_class = len(samples) // 10
    rows, captions = [], []
    for digit in range(10):
        chosen = range(digit * per_class, digit * per_class + min(columns, per_class))
        rows += [[picture(samples[i]) for i in chosen], [picture(real[indices[i]]) for i in chosen]]
        captions += [f"{digit}: samples", "nearest real images"]
    return caption_grid(rows, captions)


def run(options: argparse.Namespace) -> None:
    """Sample, score, print, save."""
    folder = Path(options.output_dir or evaluation_folder(options.model))
    check_writable(folder, "--output-dir", folder=True)
    pipeline = load_digits_pipeline(options.model)
    side = pipeline.transformer.config.sample_size
    real, classes = real_digits(side)
    samples = draw(pipeline, options.per_class, options.steps, options.guidance_scale, options.seed)
    report = score_digits(samples, np.repeat(np.arange(10), options.per_class), real, classes)
    print(f"{report.num_samples} samples, {options.steps} steps, guidance {options.guidance_scale}")
    print(f"classifier on held-out real digits  {report.classifier_accuracy:.3f}")
    print(f"samples read as the requested class {report.requested_class:.3f}")
    print(
        f"median distance to the nearest real image: sample {report.nearest_real_to_sample:.3f}, "
        f"real to real {report.nearest_real_to_real:.3f}"
    )
    print(f"samples closer to a real image than 99% of real ones are: {report.close_share:.3f}")
    save_image(neighbour_picture(samples, real, side, columns=10), folder / "neighbours.png")
    write_json(folder / "digits.json", {**asdict(report), **vars(options)})
    print(f"picture and scores in {folder}")
