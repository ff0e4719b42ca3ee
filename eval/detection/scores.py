"""A detector's mean average precision as COCO defines it: torchmetrics' `MeanAveragePrecision` on faster-coco-eval.

COCO's protocol (cocodataset.org/#detection-eval): a finding is right if its intersection over union with an object of
its class, free so far, reaches a threshold; the precision at 101 recalls is averaged, over thresholds of 0.5, 0.55 to
0.95, and over the classes that have objects. At most 100 findings a picture and class count, the best ones. What lies
in a crowd is neither right nor wrong. An object is small below 32 x 32 pixels of area, large from 96 x 96 on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchmetrics.detection import MeanAveragePrecision

from d_emo.images.objects import Scene

# Float64, as COCO's own tool has them: torchmetrics' float32 ones miss an overlap of exactly 0.6 and a recall of 0.8.
THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0, 1, 101).tolist()
# torchmetrics' names, and ours.
NAMES = {
    "map": "mAP",
    "map_50": "mAP50",
    "map_75": "mAP75",
    "map_small": "mAP_small",
    "map_medium": "mAP_medium",
    "map_large": "mAP_large",
}
# Of masks that are probabilities.
MASK_THRESHOLD = 0.5
# An area of 0 is an area: torchmetrics would measure the box in its place.
NO_AREA = 1e-6
# Places of all areas, and of 100 findings, in what faster-coco-eval returns.
ALL_AREAS, MOST_FINDINGS = 0, -1


class DetectionScores:
    """Mean average precision over a set of pictures, of boxes and perhaps of masks.

    Pictures count in the order of their ids, as in COCO's own tool, whoever added them: equal scores in two pictures
    make the order matter.

    Args:
        num_classes: of objects; labels are 0 to `num_classes` - 1.
        masks: whether masks are scored, too.
    """

    def __init__(self, num_classes: int, masks: bool):
        self.num_classes, self.masks = num_classes, masks
        self._ids: list[int] = []
        self._metric = MeanAveragePrecision(
            iou_type=("bbox", "segm") if masks else ("bbox",),
            iou_thresholds=THRESHOLDS,
            rec_thresholds=RECALLS,
            extended_summary=True,
            backend="faster_coco_eval",
            sync_on_compute=False,  # the parts of several processes are merged by hand
            compute_with_cache=False,  # of the parts that were there before a merge
        )
        self._metric.warn_on_many_detections = False
        self._metric.update([], [])
        self._results: dict[str, Any] | None = None

    @property
    def images(self) -> int:
        """How many pictures were added."""
        return len(self._ids)

    @property
    def objects(self) -> np.ndarray:
        """(K,) how many objects each class has, crowds aside."""
        counts = np.zeros(self.num_classes, dtype=np.int64)
        state = self._metric.metric_state
        for labels, crowds in zip(state["groundtruth_labels"], state["groundtruth_crowds"], strict=True):
            np.add.at(counts, labels[crowds == 0].numpy(), 1)
        return counts

    def update(self, found: Sequence[Mapping[str, torch.Tensor]], scenes: Sequence[Scene]) -> None:
        """Add pictures.

        Args:
            found: for each, as torchvision's detectors answer: `boxes` (n, 4) as (x1, y1, x2, y2) in pixels, `labels`
                (n,) from 0 on, `scores` (n,), and where masks are scored `masks`, (n, 1, H, W) probabilities or
                (n, H, W) of 0 and 1. n may be 0.
            scenes: what is there.

        Raises:
            ValueError: the lists differ in length, a label is no class, masks are missing or of another size, or a
                value is not finite.
        """
        if len(found) != len(scenes):
            raise ValueError(f"found is of {len(found)} pictures, scenes of {len(scenes)}; pass one each.")
        answers = [self._answer(one, scene) for one, scene in zip(found, scenes, strict=True)]
        truths = [self._truth(scene) for scene in scenes]
        self._metric.update(answers, truths)
        self._ids += [int(scene.image_id) for scene in scenes]
        self._results = None

    def merge(self, other: "DetectionScores") -> None:
        """Add another one's pictures, such as another process's.

        Raises:
            ValueError: it is of other classes, or scores other things.
        """
        if (other.num_classes, other.masks) != (self.num_classes, self.masks):
            raise ValueError(
                f"scores of {other.num_classes} classes with masks={other.masks} do not join those of "
                f"{self.num_classes} with masks={self.masks}."
            )
        mine: dict[str, Any] = self._metric.metric_state
        for name, values in other._metric.metric_state.items():
            mine[name].extend(values)
        self._ids += other._ids
        self._results = None

    def compute(self) -> dict[str, float]:
        """The scores in [0, 1]: "mAP", "mAP50", "mAP75", "mAP_small", "mAP_medium", "mAP_large".

        Where masks are scored, "mask_mAP" and so on, too. Nan where no object could be found: COCO's -1.
        """
        results = self._computed()
        return {
            f"{ours}{name}": _nan_for_nothing(float(results[f"{theirs}{key}"]))
            for ours, theirs in self._kinds()
            for key, name in NAMES.items()
        }

    def by_class(self) -> dict[str, np.ndarray]:
        """(K,) float64 each, by class: "AP", "AP50", and of masks "mask_AP", "mask_AP50"; nan without objects.

        Their means over the classes that have objects are `compute`'s mAP and mAP50.
        """
        results = self._computed()
        scores = {}
        for ours, theirs in self._kinds():
            columns = {f"{ours}AP": slice(None), f"{ours}AP50": slice(0, 1)}
            for name, thresholds in columns.items():
                scores[name] = np.full(self.num_classes, np.nan)
                if self.images:
                    precision = results[f"{theirs}precision"].numpy()  # (thresholds, recalls, classes, areas, numbers)
                    precision = precision[thresholds, :, :, ALL_AREAS, MOST_FINDINGS]
                    means = [_nan_for_nothing(value) for value in precision.mean(axis=(0, 1))]
                    scores[name][results["classes"].numpy().reshape(-1)] = means
        return scores

    def _kinds(self) -> list[tuple[str, str]]:
        """How our names and torchmetrics' begin, for boxes and for masks."""
        return [("", "bbox_"), ("mask_", "segm_")] if self.masks else [("", "")]

    def _computed(self) -> dict[str, Any]:
        if self._results is None:
            state: dict[str, Any] = self._metric.metric_state
            order = np.argsort(self._ids, kind="stable")
            for values in state.values():
                values[:] = [values[index] for index in order] if values else []
            self._ids = [self._ids[index] for index in order]
            # Overlaps of all pictures are among the results, and large.
            results = self._metric.compute()
            self._results = {name: values for name, values in results.items() if not name.endswith("ious")}
        return self._results

    def _answer(self, found: Mapping[str, torch.Tensor], scene: Scene) -> dict[str, torch.Tensor]:
        """A picture's findings as torchmetrics takes them."""
        taken = {name: found[name].detach().cpu() for name in ("boxes", "scores", "labels")}
        for name in ("boxes", "scores"):
            if not taken[name].isfinite().all():
                raise ValueError(f"{scene.name}: {name} of what was found are not finite numbers.")
        self._check_labels(taken["labels"].numpy(), "what was found", scene)
        answer = {"boxes": taken["boxes"].double(), "scores": taken["scores"].double(), "labels": taken["labels"]}
        if self.masks:
            if "masks" not in found:
                raise ValueError(f"{scene.name}: masks are scored, and none were found; masks=False.")
            masks = found["masks"].detach()
            masks = masks[:, 0] if masks.dim() == 4 else masks
            known = masks.shape[1:] if scene.masks is None else scene.masks.shape[1:]
            if len(masks) and tuple(masks.shape[1:]) != tuple(known):
                raise ValueError(
                    f"{scene.name}: the masks found are of {tuple(masks.shape[1:])} pixels, those of the "
                    f"objects of {tuple(known)}."
                )
            answer["masks"] = (masks > MASK_THRESHOLD).to("cpu", torch.uint8)
        return answer

    def _truth(self, scene: Scene) -> dict[str, torch.Tensor]:
        """A picture's objects as torchmetrics takes them."""
        self._check_labels(scene.labels, "its objects", scene)
        truth = {
            "boxes": torch.from_numpy(np.asarray(scene.boxes, dtype=np.float64).reshape(-1, 4)),
            "labels": torch.from_numpy(np.asarray(scene.labels, dtype=np.int64)),
            "iscrowd": torch.from_numpy(np.asarray(scene.crowd, dtype=np.int64)),
            "area": torch.from_numpy(np.maximum(np.asarray(scene.areas, dtype=np.float64), NO_AREA)),
        }
        if self.masks:
            if scene.masks is None:
                raise ValueError(f"{scene.name}: masks are scored, and its objects have none.")
            truth["masks"] = torch.from_numpy(np.asarray(scene.masks, dtype=np.uint8))
        return truth

    def _check_labels(self, labels: np.ndarray, whose: str, scene: Scene) -> None:
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(
                f"{scene.name}: labels of {whose} go from {labels.min()} to {labels.max()}; classes are 0 "
                f"to {self.num_classes - 1}."
            )


def _nan_for_nothing(value: float) -> float:
    return float("nan") if value < 0 else float(value)
