"""A detector's report: scores for the terminal and as JSON, classes as CSV, and an HTML page of its worst pictures."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d_emo.common.files import write_json
from d_emo.eval.detection.matching import OVERLAP, Confusion, match
from d_emo.eval.detection.scores import NAMES, DetectionScores
from d_emo.eval.reports.boxes import Objects, compare_objects
from d_emo.eval.reports.evaluation import write_table
from d_emo.eval.reports.page import Table, Tile, WorstTiles, write_page
from d_emo.images.objects import ObjectSource, Scene

FILES = ("report.json", "classes.csv", "report.html")
HARDEST = 5
MOST_CONFUSED = 20
NOT_THERE = "nothing"


class Evaluation:
    """What is said of pictures beside the mean average precision: mistakes by class, F1, the worst ones.

    Args:
        names: of all classes.
        score: from which findings count.
        pictures: how many of the worst are kept.
    """

    def __init__(self, names: Mapping[int, str], score: float, pictures: int):
        self.names, self.score = names, score
        self.confusion = Confusion(len(names))
        self.worst = WorstTiles(pictures)
        self._f1: list[float] = []

    @property
    def mean_f1(self) -> float:
        """Of all pictures, in [0, 1]."""
        return sum(self._f1) / len(self._f1)

    def add(self, scene: Scene, found: Mapping[str, torch.Tensor]) -> None:
        """Count a picture; the worst are drawn, truth beside the findings that count."""
        matches = match(found, scene, self.score)
        self.confusion.add(matches)
        self._f1.append(matches.score)

        def tile() -> Tile:
            truth = Objects(scene.boxes, scene.labels, masks=scene.masks, crowd=scene.crowd)
            picture = compare_objects(scene.image, truth, _counted(found, self.score), self.names)
            return Tile(picture, f"{Path(scene.name).name}: {matches.describe()}", matches.score)

        self.worst.offer(matches.score, tile)


@dataclass(frozen=True)
class ClassScore:
    """One class; average precisions in [0, 1], nan without objects; counts as in `ClassCounts`."""

    label: int
    name: str
    objects: int
    ap: float
    ap50: float
    mask_ap: float
    mask_ap50: float
    right: int
    other_class: int
    missed: int
    found: int
    found_wrongly: int
    taken_for: str


def write_report(
    scores: DetectionScores, evaluation: Evaluation, source: ObjectSource, folder: Path, options: argparse.Namespace
) -> None:
    """Print the scores and write them into a folder.

    Args:
        scores, evaluation: of the source's pictures.
        source: with the model's class names.
        folder: which is there.
        options: of the command.
    """
    names = source.id2label
    values = scores.compute()
    classes = class_scores(scores, evaluation.confusion, names)
    for kind, prefix in kinds(scores):
        print(f"{kind}: " + ", ".join(f"{name} {_percent(values[prefix + name])}" for name in NAMES.values()))
    _print_hardest(classes)
    about = {**vars(options), "data": source.name}
    numbers = {name: None if math.isnan(value) else value for name, value in values.items()}
    counts = {"images": scores.images, "objects": int(scores.objects.sum())}
    write_json(folder / FILES[0], {**counts, **numbers, "mean_f1": evaluation.mean_f1, "options": about})
    columns = [field.name for field in fields(ClassScore)]
    write_table(folder / FILES[1], columns, [[*vars(entry).values()] for entry in classes])
    write_page(
        folder / FILES[2],
        f"{Path(options.model).name} on {source.name}",
        {
            "model": options.model,
            "data": f"{source.name}: {source.describe_size()}",
            "mean F1 of pictures": f"{_percent(evaluation.mean_f1)} (findings of score {options.score_threshold:g} or "
            f"more that overlap an object by {OVERLAP:g} or more)",
        },
        [_score_table(scores, values), _class_table(scores, classes), _confusion_table(evaluation.confusion, names)],
        evaluation.worst.tiles,
        score_name="F1",
        options=about,
    )
    print(f"{', '.join(FILES[:-1])} and {FILES[-1]} in {folder}")


def kinds(scores: DetectionScores) -> list[tuple[str, str]]:
    """What is scored, for people, and how the names of its scores begin."""
    return [("boxes", ""), ("masks", "mask_")] if scores.masks else [("boxes", "")]


def class_scores(scores: DetectionScores, confusion: Confusion, names: Mapping[int, str]) -> list[ClassScore]:
    """A line for every class that has objects or was found."""
    precisions, objects = scores.by_class(), scores.objects
    nothing = np.full(len(names), np.nan)
    lines = []
    for label, name in names.items():
        counts = confusion.of_class(label)
        if not objects[label] and not counts.found:
            continue
        lines.append(
            ClassScore(
                label=label,
                name=name,
                objects=int(objects[label]),
                ap=float(precisions["AP"][label]),
                ap50=float(precisions["AP50"][label]),
                mask_ap=float(precisions.get("mask_AP", nothing)[label]),
                mask_ap50=float(precisions.get("mask_AP50", nothing)[label]),
                right=counts.right,
                other_class=counts.other,
                missed=counts.missed,
                found=counts.found,
                found_wrongly=counts.wrongly,
                taken_for="" if counts.taken_for is None else names[counts.taken_for],
            )
        )
    return lines


def _counted(found: Mapping[str, torch.Tensor], score: float) -> Objects:
    chosen = found["scores"] >= score
    taken = {name: values[chosen].numpy() for name, values in found.items()}
    return Objects(taken["boxes"], taken["labels"], scores=taken["scores"], masks=taken.get("masks"))


def _print_hardest(classes: list[ClassScore]) -> None:
    scored = sorted((entry for entry in classes if not math.isnan(entry.ap)), key=lambda entry: entry.ap)
    for number, entry in enumerate(scored[:HARDEST]):
        taken = f", often taken for {entry.taken_for}" if entry.taken_for else ""
        print(
            f"{'hardest' if number == 0 else '':<8} {entry.name}: AP {_percent(entry.ap)}, {entry.right} of "
            f"{entry.objects} found{taken}"
        )


def _score_table(scores: DetectionScores, values: Mapping[str, float]) -> Table:
    rows: list[list[Any]] = [
        [kind, *(100 * values[f"{prefix}{name}"] for name in NAMES.values())] for kind, prefix in kinds(scores)
    ]
    return Table("Mean average precision, in %", ["", *NAMES.values()], rows)


def _class_table(scores: DetectionScores, classes: list[ClassScore]) -> Table:
    """Classes by their average precision, the lowest first; those without objects last."""
    columns = ["class", "objects", "AP", "AP50", *(["mask AP"] if scores.masks else []), "right", "missed",
               "as another", "mostly as", "findings", "of nothing"]  # fmt: skip
    rows = [
        [entry.name, entry.objects, 100 * entry.ap, 100 * entry.ap50,
         *([100 * entry.mask_ap] if scores.masks else []), entry.right, entry.missed, entry.other_class,
         entry.taken_for, entry.found, entry.found_wrongly]
        for entry in sorted(classes, key=lambda entry: (math.isnan(entry.ap), entry.ap))
    ]  # fmt: skip
    return Table("Classes, the lowest average precision (in %) first", columns, rows)


def _confusion_table(confusion: Confusion, names: Mapping[int, str]) -> Table:
    """What happened most besides right findings: missed, of nothing, of another class."""
    wrong = confusion.matrix.copy()
    np.fill_diagonal(wrong, 0)
    places = [divmod(int(place), len(wrong)) for place in np.argsort(-wrong, axis=None, kind="stable")[:MOST_CONFUSED]]
    rows = [
        [names.get(true, NOT_THERE), names.get(found, NOT_THERE), int(wrong[true, found])]
        for true, found in places
        if wrong[true, found]
    ]
    return Table("Most frequent mistakes", ["there was", "found was", "times"], rows)


def _percent(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.1%}"
