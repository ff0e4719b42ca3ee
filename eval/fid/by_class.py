"""The Frechet distance of each class, where a class has enough samples for one."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from d_emo.common.output import Progress
from d_emo.eval.fid.features import FeatureStore
from d_emo.eval.fid.metrics import MomentSums, frechet_distance
from d_emo.eval.fid.references import Reference

# Images of a class and a feature, on either side. N images of D features on a side add about D / (4 N) of the variance
# to the distance: of Gaussians 0.13 of it at two images a feature, 0.30 at one, 0.68 at half of one (for many features,
# where the covariance's eigenvalues are Marchenko and Pastur's).
IMAGES_A_FEATURE = 2
# Covariances of 2,048 features take 34 MB each.
CLASSES_AT_ONCE = 16


@dataclass(frozen=True)
class ClassDistance:
    """One class's distance.

    Attributes:
        label, name: of the class.
        samples, reference: its images on either side.
        fid: the distance; None where a side has too few images.
    """

    label: int
    name: str
    samples: int
    reference: int
    fid: float | None


def check_classes(reference: Reference, num_classes: int | None) -> None:
    """Find out before anything is drawn whether there are classes to tell apart.

    Raises:
        ValueError: there are none, or others than the model's.
    """
    labels = reference.images.labels if reference.images is not None else None
    if labels is None:
        raise ValueError(
            f"--by-class: of --reference {reference.name} the classes are not known; use class folders, a .parquet "
            "file with --label-column, or digits."
        )
    count = int(labels.max()) + 1
    if num_classes is not None and num_classes != count:
        raise ValueError(
            f"--by-class: the model has {num_classes} classes, --reference {reference.name} has {count}; they are "
            "compared by their numbers, so both need the same."
        )


def class_distances(samples: FeatureStore, reference: Reference, names: dict[int, str]) -> list[ClassDistance]:
    """The distance of every class that either side has, by its number.

    Args:
        samples: of a set with labels.
        reference: with the same classes.
        names: of the classes, where they have some.
    """
    assert reference.store is not None
    sides = (samples, reference.store)
    labels = [_labels(side) for side in sides]
    present = np.unique(np.concatenate(labels))
    counts = [{int(c): int((side == c).sum()) for c in present} for side in labels]
    least = images_needed(len(reference.moments["pool"].mean))
    enough = [int(c) for c in present if min(side[int(c)] for side in counts) >= least]
    distances: dict[int, float] = {}
    with Progress(len(enough), "class", "distances by class", shown=bool(enough)) as progress:
        for start in range(0, len(enough), CLASSES_AT_ONCE):
            chosen = enough[start : start + CLASSES_AT_ONCE]
            drawn, real = (_sums(side, known, chosen) for side, known in zip(sides, labels, strict=True))
            for c in chosen:
                distances[c] = frechet_distance(real[c].moments(), drawn[c].moments())
                progress.update()
    return [
        ClassDistance(c, names.get(c, f"class {c}"), counts[0][c], counts[1][c], distances.get(c))
        for c in map(int, present)
    ]


def images_needed(features: int) -> int:
    """Images that a class needs on either side."""
    return IMAGES_A_FEATURE * features


def _labels(side: FeatureStore) -> np.ndarray:
    if side.images.labels is None:
        raise ValueError(f"--by-class: of {side.images.name} the classes are not known; draw with --model.")
    return side.images.labels


def _sums(side: FeatureStore, labels: np.ndarray, chosen: list[int]) -> dict[int, MomentSums]:
    """Sums over the pooled features of each chosen class, in one reading of the files."""
    sums: dict[int, MomentSums] = {}
    for shard in side.shards:
        known = labels[shard.start : shard.stop]
        if not np.isin(known, chosen).any():
            continue
        features = side.read(shard, "pool")
        for c in chosen:
            sums.setdefault(c, MomentSums(features.shape[1])).add(features[known == c])
    return sums


def as_table(found: list[ClassDistance], features: int) -> dict[str, Any]:
    """What `scores.json` keeps: the classes, and the rule that left some of them out."""
    return {"images_needed": images_needed(features), "classes": [asdict(one) for one in found]}


def table_lines(stored: dict[str, Any]) -> list[str]:
    """What `as_table` made, for people: the classes with a distance from the worst on, then what was left out."""
    classes = stored["classes"]
    given = sorted((one for one in classes if one["fid"] is not None), key=lambda one: -one["fid"])
    lines = [
        f"{one['name']}: {one['fid']:.4f} ({one['samples']:,} samples, {one['reference']:,} reference images)"
        for one in given
    ]
    left = [one for one in classes if one["fid"] is None]
    if left:
        most = max(min(one["samples"], one["reference"]) for one in left)
        lines.append(
            f"{len(left)} of {len(classes)} classes have fewer than {stored['images_needed']:,} images on a side (at "
            f"most {most:,} on both), too few for a distance of their own"
        )
    return lines
