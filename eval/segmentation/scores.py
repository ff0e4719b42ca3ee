"""A segmenter's scores, from sums over a whole set: mean IoU, pixel accuracy, mean accuracy and mean Dice.

As mmsegmentation computes them, and with it tables XI, XII and A4 of arXiv 2412.06674: pixels are summed over all
pictures before anything is divided, so that large pictures count for more than small ones. A class that nothing shows
and nothing was taken for has no IoU and no Dice, and one that nothing shows no accuracy; means leave such classes out.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torchmetrics.functional.classification import multiclass_confusion_matrix

from d_emo.images.mask_files import IGNORED


@dataclass
class SegmentationScores:
    """Counts of pixels by true and by predicted class, and what follows from them.

    Attributes:
        num_classes: K.
        ignore_index: label of pixels that do not count.
        matrix: (K, K) int64, pixels of class [true, predicted].
    """

    num_classes: int
    ignore_index: int = IGNORED
    matrix: np.ndarray = field(init=False)

    def __post_init__(self):
        self.matrix = np.zeros((self.num_classes, self.num_classes), dtype=np.int64)

    def update(self, predicted: Any, labels: Any) -> None:
        """Count pictures: (H, W) or (B, H, W) class ids, tensors or arrays, wherever they lie.

        Raises:
            ValueError: shapes differ, or an id is no class.
        """
        found, truth = (torch.as_tensor(ids) for ids in (predicted, labels))
        if found.shape != truth.shape:
            raise ValueError(
                f"the prediction has the shape {tuple(found.shape)}, the labels {tuple(truth.shape)}; resize the "
                "logits to the labels."
            )
        found, truth = found.flatten(), truth.to(found.device, torch.int64).flatten()
        self._check("prediction", found)
        self._check("label", truth[truth != self.ignore_index])
        counts = multiclass_confusion_matrix(
            found, truth, self.num_classes, ignore_index=self.ignore_index, validate_args=False
        )
        self.matrix += counts.cpu().numpy()

    def merge(self, other: "SegmentationScores") -> None:
        """Add what another process counted.

        Raises:
            ValueError: it counted other classes.
        """
        if other.num_classes != self.num_classes:
            raise ValueError(f"counts of {self.num_classes} and of {other.num_classes} classes do not go together.")
        self.matrix += other.matrix

    @property
    def labelled(self) -> int:
        """Pixels that count."""
        return int(self.matrix.sum())

    @property
    def iou(self) -> np.ndarray:
        """(K,) intersection over union in [0, 1]; NaN of classes that occur in neither."""
        found, truth, predicted = self._sums()
        return _ratio(found, truth + predicted - found)

    @property
    def dice(self) -> np.ndarray:
        """(K,) 2 |A and B| / (|A| + |B|) in [0, 1]; NaN of classes that occur in neither."""
        found, truth, predicted = self._sums()
        return _ratio(2 * found, truth + predicted)

    @property
    def accuracy(self) -> np.ndarray:
        """(K,) share of each class's pixels that is found, in [0, 1]; NaN of classes that occur in no label."""
        found, truth, _ = self._sums()
        return _ratio(found, truth)

    @property
    def aacc(self) -> float:
        """Share of all labelled pixels that is right; NaN where there are none."""
        found, truth, _ = self._sums()
        return float(_ratio(found.sum(), truth.sum()))

    @property
    def miou(self) -> float:
        """Mean of `iou`; NaN where no pixel has a label."""
        return _mean(self.iou)

    @property
    def macc(self) -> float:
        """Mean of `accuracy`."""
        return _mean(self.accuracy)

    @property
    def mdice(self) -> float:
        """Mean of `dice`."""
        return _mean(self.dice)

    def _sums(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels of each class that are right, that are labelled so, and that are predicted so."""
        return np.diag(self.matrix), self.matrix.sum(axis=1), self.matrix.sum(axis=0)

    def _check(self, what: str, ids: torch.Tensor) -> None:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_classes:
            wrong = ids[(ids < 0) | (ids >= self.num_classes)][0]
            raise ValueError(f"{what} {int(wrong)} is none of the {self.num_classes} classes, from 0.")


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Shares in float64, NaN where there is nothing to divide by."""
    return np.where(whole > 0, part / np.maximum(whole, 1), np.nan)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
