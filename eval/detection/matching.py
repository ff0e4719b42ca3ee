"""Which finding is which object: what was missed, found wrongly or taken for another class.

For people, beside the mean average precision: findings from a score on, and one overlap that is enough.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import box_area, box_iou

from d_emo.images.objects import Scene

# Findings of a smaller score do not count, unless the user says otherwise.
SCORE = 0.5
# The intersection over union of boxes from which a finding is of an object.
OVERLAP = 0.5
# What a finding is of that is of no object, and of one that lies in a crowd.
NOTHING, IN_CROWD = -1, -2


@dataclass(frozen=True)
class Matches:
    """A picture's findings beside its objects, crowds aside.

    Attributes:
        true: (N,) classes of the objects.
        found: (n,) classes of the findings that count, the best first.
        objects: (n,) which object each is of; NOTHING, or IN_CROWD.
    """

    true: np.ndarray
    found: np.ndarray
    objects: np.ndarray

    @property
    def right(self) -> int:
        """Findings that are of an object and have its class."""
        taken = self.objects >= 0
        return int((self.found[taken] == self.true[self.objects[taken]]).sum())

    @property
    def score(self) -> float:
        """The picture's F1: twice the right findings over objects and findings, in [0, 1]; 1 where there are neither.

        What lies in a crowd does not count.
        """
        counted = len(self.true) + int((self.objects != IN_CROWD).sum())
        return 2 * self.right / counted if counted else 1.0

    def describe(self) -> str:
        """For people: 2 right, 1 missed, 1 of another class, 0 where nothing is."""
        taken = int((self.objects >= 0).sum())
        return (
            f"{self.right} of {len(self.true)} right, {len(self.true) - taken} missed, {taken - self.right} of another "
            f"class, {int((self.objects == NOTHING).sum())} found where nothing is"
        )


def match(found: Mapping[str, torch.Tensor], scene: Scene, score: float = SCORE) -> Matches:
    """Match a picture's findings to its objects by their boxes.

    The best finding chooses first, whatever its class: of the objects that it overlaps by `OVERLAP` or more and that
    are still free, the one that it overlaps most. One that is left and lies in a crowd by as much of its own area is
    the crowd's; others are of nothing, such as a second finding of an object.

    Args:
        found: as torchvision's detectors answer.
        scene: what is there.
        score: from which findings count.
    """
    counted = found["scores"] >= score
    order = torch.argsort(found["scores"][counted], descending=True, stable=True)
    boxes = found["boxes"][counted][order].double()
    crowd = torch.from_numpy(np.asarray(scene.crowd, dtype=bool))
    objects = torch.from_numpy(np.asarray(scene.boxes)).double()
    overlaps = box_iou(boxes, objects[~crowd])  # (n, N)
    in_crowd = _shares(boxes, objects[crowd]).amax(dim=1) if crowd.any() else torch.zeros(len(boxes))
    chosen = np.full(len(boxes), NOTHING)
    for number in range(len(boxes)):
        best = int(overlaps[number].argmax()) if overlaps.shape[1] else 0
        if overlaps.shape[1] and overlaps[number, best] >= OVERLAP:
            chosen[number] = best
            overlaps[:, best] = 0
        elif in_crowd[number] >= OVERLAP:
            chosen[number] = IN_CROWD
    return Matches(np.asarray(scene.labels)[~crowd.numpy()], found["labels"][counted][order].numpy(), chosen)


def _shares(boxes: torch.Tensor, crowds: torch.Tensor) -> torch.Tensor:
    """(n, C) shares of the boxes' own areas that lie in each crowd, in [0, 1]: COCO's overlap with a crowd."""
    corners = torch.maximum(boxes[:, None, :2], crowds[:, :2]), torch.minimum(boxes[:, None, 2:], crowds[:, 2:])
    common = (corners[1] - corners[0]).clamp(min=0).prod(dim=2)
    return common / box_area(boxes)[:, None].clamp(min=1e-12)


@dataclass(frozen=True)
class ClassCounts:
    """One class: what became of its objects, and of what was found under its name.

    Attributes:
        objects: of this class, crowds aside.
        right: of them found, and as this class.
        other: of them found as another class.
        missed: of them not found.
        found: findings of this class, those in crowds aside.
        wrongly: of them where nothing is, or once more.
        taken_for: the class that most of `other` were taken for; None where there are none.
    """

    objects: int
    right: int
    other: int
    missed: int
    found: int
    wrongly: int
    taken_for: int | None


class Confusion:
    """Counts of objects by true class and by what they were found as.

    Attributes:
        matrix: (K + 1, K + 1) int64; row K is of findings where nothing is, column K of objects that were missed.
    """

    def __init__(self, num_classes: int):
        self.matrix = np.zeros((num_classes + 1, num_classes + 1), dtype=np.int64)

    def add(self, matches: Matches) -> None:
        """Count a picture."""
        nothing = len(self.matrix) - 1
        taken = matches.objects >= 0
        np.add.at(self.matrix, (matches.true[matches.objects[taken]], matches.found[taken]), 1)
        missed = np.setdiff1d(np.arange(len(matches.true)), matches.objects)
        np.add.at(self.matrix, (matches.true[missed], nothing), 1)
        np.add.at(self.matrix, (nothing, matches.found[matches.objects == NOTHING]), 1)

    def of_class(self, label: int) -> ClassCounts:
        """What became of one class."""
        row, nothing = self.matrix[label], len(self.matrix) - 1
        others = row.copy()
        others[[label, nothing]] = 0
        return ClassCounts(
            objects=int(row.sum()),
            right=int(row[label]),
            other=int(others.sum()),
            missed=int(row[nothing]),
            found=int(self.matrix[:, label].sum()),
            wrongly=int(self.matrix[nothing, label]),
            taken_for=int(others.argmax()) if others.any() else None,
        )
