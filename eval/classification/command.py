"""What `evaluate_classifier` does after it has read its options: predict, score, draw."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from transformers import AutoImageProcessor, AutoModelForImageClassification

import d_emo  # noqa: F401  makes transformers know EMOv2
from d_emo.common.files import write_json, written_whole
from d_emo.common.locks import output_folder
from d_emo.common.processes import default_device
from d_emo.common.saved_folders import CLASSIFIER
from d_emo.eval.classification.accuracy import Predictions, predict
from d_emo.eval.reports.evaluation import load_model, opening_data, report_folder, write_table
from d_emo.images.digits import digits_source
from d_emo.images.matching import match_classes
from d_emo.images.open_source import open_source
from d_emo.images.source import ImageSource, LabelledSource, held_out

SourceT = TypeVar("SourceT", bound=LabelledSource)
# More classes than this are drawn without their names.
NAMED_CLASSES = 40
WORST_PAIRS = 10


@dataclass(frozen=True)
class ClassScore:
    """One class: how many images, which share was found, which share of the answers was right."""

    label: int
    name: str
    images: int
    recall: float
    precision: float
    confused_with: str


def run(options: argparse.Namespace) -> None:
    """Predict, score, print, save; what is quickly found to be wrong comes first."""
    folder = report_folder(options, CLASSIFIER)
    images = chosen_images(options)
    model, processor = open_classifier(options.model)
    source, note = align_labels(images, model.config.id2label)
    with output_folder(folder):
        evaluate(options, folder, model, processor, source, note)


def evaluate(
    options: argparse.Namespace, folder: Path, model: Any, processor: Any, source: ImageSource, note: str
) -> None:
    """Predict on images whose classes are the model's, and write the report; `note` is a remark on the classes."""
    device = default_device()
    print(f"{options.model} on {source.name}: {source.describe_size()}, {len(np.unique(source.labels))} classes{note}")
    predictions = predict(
        model.to(device).eval(),
        source,
        processor,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=device,
        progress=True,
    )
    report(predictions, model.config.id2label, folder, {**vars(options), "images": source.name})


def open_classifier(name: str) -> tuple[Any, Any]:
    """A model and its image processor; see `load_model`."""
    return load_model(name, CLASSIFIER, AutoModelForImageClassification, AutoImageProcessor)


def chosen_images(options: argparse.Namespace) -> ImageSource:
    """The images that the options name.

    Raises:
        ValueError: they do not open; the message names the option.
    """
    if not options.data_dir and not options.dataset:
        return held_out(digits_source())[1]
    with opening_data(options):
        source = open_source(
            options.data_dir,
            options.dataset,
            split=options.dataset_split,
            image_column=options.image_column,
            label_column=options.label_column,
            class_names=options.class_names,
        )
        source.refuse_unreadable()
    return source


def align_labels(source: SourceT, id2label: Mapping[int, str]) -> tuple[SourceT, str]:
    """The images, or other things, with the model's class ids, and a remark for people; see `match_classes`.

    Raises:
        ValueError: the classes do not go together.
    """
    found, note = match_classes(source.id2label, id2label, source.name)
    table = np.array([found[label] for label in range(len(found))])
    changed: Any = {"labels": table[source.labels], "id2label": dict(id2label)}
    return replace(source, **changed), note


def report(
    predictions: Predictions, names: Mapping[int, str], folder: Path, about: dict[str, Any], things: str = "images"
) -> list[ClassScore]:
    """Print the scores and write them with the table of classes, which is returned, and the picture.

    Args:
        predictions: of things.
        names: of all classes.
        folder: which is there.
        about: what was done, for report.json.
        things: what was classified.
    """
    truth, answers = predictions.labels.numpy(), predictions.ranked[:, 0].numpy()
    shown = np.unique(truth)
    ids = np.arange(len(names))
    matrix = confusion_matrix(truth, answers, labels=ids)
    scores = {
        things: len(truth),
        "top1": predictions.accuracy(1),
        "top5": predictions.accuracy(5),
        "loss": predictions.loss,
    }
    # The standard error of a share of n independent images.
    error = (scores["top1"] * (1 - scores["top1"]) / len(truth)) ** 0.5
    print(
        f"top-1 {scores['top1']:.2%} (standard error {error:.2%}), top-5 {scores['top5']:.2%}, "
        f"cross-entropy {scores['loss']:.4f}"
    )
    classes = class_scores(truth, answers, matrix, names)
    for number, entry in enumerate(sorted(classes, key=lambda entry: entry.recall)[:5]):
        print(f"{'hardest' if number == 0 else '':<8} {entry.name}: {entry.recall:.1%} of {entry.images} found"
              + (f", often taken for {entry.confused_with}" if entry.confused_with else ""))  # fmt: skip
    write_json(folder / "report.json", {**scores, "top1_standard_error": error, "options": about})
    write_table(folder / "classes.csv", ClassScore.__dataclass_fields__, [[*vars(entry).values()] for entry in classes])
    draw_confusion(matrix[np.ix_(shown, shown)], [names[label] for label in shown], folder / "confusion.png")
    print(f"report.json, classes.csv and confusion.png in {folder}")
    return classes


def class_scores(
    truth: np.ndarray, answers: np.ndarray, matrix: np.ndarray, names: Mapping[int, str]
) -> list[ClassScore]:
    """A line for every class that has images.

    Args:
        truth, answers: (N,) class ids.
        matrix: (K, K) counts, true classes by answers.
        names: of all classes.
    """
    ids = np.unique(truth)
    precision, recall, _, counts = precision_recall_fscore_support(truth, answers, labels=ids, zero_division=0)
    rows = []
    for number, label in enumerate(ids):
        others = matrix[label].copy()
        others[label] = 0
        worst = int(others.argmax())
        rows.append(
            ClassScore(
                label=int(label),
                name=names[int(label)],
                images=int(counts[number]),
                recall=float(recall[number]),
                precision=float(precision[number]),
                confused_with=names[worst] if others[worst] else "",
            )
        )
    return rows


def draw_confusion(matrix: np.ndarray, names: list[str], path: Path) -> None:
    """Shares of each true class (row) by answer (column), and the pairs that are confused most."""
    from matplotlib.figure import Figure

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    named = len(names) <= NAMED_CLASSES
    side = max(5.0, 0.35 * len(names)) if named else 9.0
    figure = Figure(figsize=(side + 5, side + 1), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[side, 3])
    image = left.imshow(shares, cmap="magma", vmin=0, vmax=1)
    figure.colorbar(image, ax=left, shrink=0.6, label="share of the true class")
    left.set(xlabel="answer", ylabel="true class")
    if named:
        short = [name.split(",")[0][:18] for name in names]
        left.set_xticks(range(len(names)), short, rotation=90, fontsize=8)
        left.set_yticks(range(len(names)), short, fontsize=8)
        for row, column in zip(*np.nonzero(matrix), strict=True):
            tone = "black" if shares[row, column] > 0.6 else "white"
            left.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=tone)
    off_diagonal = matrix - np.diag(np.diag(matrix))
    worst = [divmod(int(flat), len(names)) for flat in np.argsort(off_diagonal, axis=None)[::-1][:WORST_PAIRS]]
    worst = [pair for pair in worst if off_diagonal[pair]][::-1]
    right.barh([f"{names[a].split(',')[0]} taken for\n{names[b].split(',')[0]}" for a, b in worst],
               [off_diagonal[pair] for pair in worst])  # fmt: skip
    right.tick_params(axis="y", labelsize=8)
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="images", title="confused most")
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
