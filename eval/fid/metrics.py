"""The scores, as pure functions of features or of their moments, in float64.

Sources: FID arXiv 1706.08500; Inception Score arXiv 1606.03498; sFID arXiv 2103.03841; precision and recall arXiv
1904.06991; KID arXiv 1801.01401; all as ADM's evaluator computes them (github.com/openai/guided-diffusion, evaluations/
evaluator.py at 22e0df8), which DiT, SiT and the paper's tables use. It has no KID: that is torch-fidelity's.

Shapes: N samples, M reference images, D features.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from d_emo.common import checks

# ADM's chunk of samples for one Inception Score, and its neighbourhood for precision and recall.
IS_CHUNK = 5000
NEIGHBOURS = 3
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
# Rows of a block of distances: 1,000 x 50,000 in float32 are 200 MB.
DISTANCE_ROWS = 1000


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of features.

    Attributes:
        count: number of samples; 0 where a file of statistics does not say.
        mean: (D,) float64.
        covariance: (D, D) float64, with N - 1 in the denominator.
    """

    count: int
    mean: np.ndarray
    covariance: np.ndarray


class MomentSums:
    """Sums from which moments follow; adding them up over processes gives the moments of all samples.

    Attributes:
        count, total, products: number of samples, sum of x (D,), sum of x x^T (D, D), all float64.
    """

    def __init__(self, dimension: int):
        self.count = 0.0
        self.total = np.zeros(dimension)
        self.products = np.zeros((dimension, dimension))

    def add(self, features: np.ndarray) -> None:
        """Add features (n, D) of any floating-point type."""
        wide = features.astype(np.float64)
        self.count += len(wide)
        self.total += wide.sum(axis=0)
        self.products += wide.T @ wide

    def without(self, features: np.ndarray) -> "MomentSums":
        """The sums as they were before some of the features (n, D) came in."""
        less, taken = MomentSums(len(self.total)), MomentSums(len(self.total))
        taken.add(features)
        less.count = self.count - taken.count
        less.total, less.products = self.total - taken.total, self.products - taken.products
        return less

    def moments(self) -> Moments:
        """Mean and covariance.

        Raises:
            ValueError: fewer than two samples have no covariance.
        """
        if self.count < 2:
            raise ValueError(f"{int(self.count)} image(s) have no covariance; at least 2 are needed.")
        mean = self.total / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Moments(int(self.count), mean, covariance)


def check_features(features: Any, name: str, least: int = 1, width: int | None = None) -> np.ndarray:
    """Features (N, D) at hand.

    Raises:
        ValueError: they are no finite numbers of that shape, fewer than `least`, or of another number than `width`.
    """
    found = np.asarray(features)
    if found.ndim != 2 or found.dtype.kind not in "fiu" or len(found) < least or not found.shape[1]:
        raise ValueError(f"{name}: {found.dtype} of shape {found.shape}; at least {least} rows of numbers are needed.")
    if width is not None and found.shape[1] != width:
        raise ValueError(f"{name}: {found.shape[1]} features a row, the other side has {width}.")
    if not np.isfinite(found.sum(dtype=np.float64)):
        raise ValueError(f"{name}: they hold NaN or infinite values; check the images and the network they come from.")
    return found


def moments_of(features: np.ndarray) -> Moments:
    """Moments of features (N, D) at hand.

    Raises:
        ValueError: they are fewer than two, or no finite numbers.
    """
    features = check_features(features, "features")
    sums = MomentSums(features.shape[1])
    sums.add(features)
    return sums.moments()


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)), after Dowson and Landau (1982).

    With C = F F^T, the trace of the root is the sum of the singular values of F2^T F1. They are exact to rounding also
    where a covariance lacks full rank, which roots of eigenvalues are not (noise of 1e-16 becomes 1e-8 each).

    Raises:
        ValueError: the two have different numbers of features, or values that are not finite.
    """
    for side in (first, second):
        if not isinstance(side, Moments):
            raise ValueError(f"a side of the distance is a {type(side).__name__}; moments are wanted.")
        if side.mean.ndim != 1 or side.covariance.shape != 2 * side.mean.shape:
            raise ValueError(f"mean and covariance have shapes {side.mean.shape} and {side.covariance.shape}.")
        if not (np.isfinite(side.mean).all() and np.isfinite(side.covariance).all()):
            raise ValueError("mean or covariance holds NaN or infinite values; check the features they come from.")
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            f"one side has {len(first.mean)} features, the other {len(second.mean)}: they come from different "
            "networks, or for pixels from images of different shapes."
        )
    overlap = _factor(second.covariance).T @ _factor(first.covariance)
    difference = first.mean - second.mean
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(difference @ difference + traces - 2 * np.linalg.svd(overlap, compute_uv=False).sum())


def _factor(covariance: np.ndarray) -> np.ndarray:
    """F (D, rank) with F F^T the covariance, without the directions whose variance is rounding."""
    values, vectors = np.linalg.eigh(covariance)
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def inception_score(logits: np.ndarray, chunk: int = IS_CHUNK) -> tuple[float, float]:
    """exp(mean KL(p(y|x) || p(y))) over chunks of samples in their order; mean and standard deviation over chunks.

    Args:
        logits: (N, 1008) from the pooled features without the bias, as ADM's graph gives them.
        chunk: samples of one score. The order matters: samples sorted by class score far too low.

    Raises:
        ValueError: there are no logits, or not finite ones.
    """
    logits, chunk = check_features(logits, "logits"), checks.whole(chunk, "chunk")
    scores = []
    for start in range(0, len(logits), chunk):
        part = logits[start : start + chunk].astype(np.float64)
        part = part - part.max(axis=1, keepdims=True)
        log_p = part - np.log(np.exp(part).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        marginal = np.log(p.mean(axis=0, keepdims=True).clip(min=np.finfo(np.float64).tiny))
        scores.append(float(np.exp((p * (log_p - marginal)).sum(axis=1).mean())))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(
    reference: np.ndarray, samples: np.ndarray, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Share of samples within the reference's manifold, and of the reference within the samples'.

    A manifold is the union of balls around its points, each to its third neighbour.

    Args:
        reference: (M, D).
        samples: (N, D).
        device: where the distances are computed; memory is N times `DISTANCE_ROWS` distances.

    Raises:
        ValueError: fewer than four images on a side, features that do not fit each other or are not finite.
    """
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    reference = check_features(reference, "reference features")
    samples = check_features(samples, "sample features", width=reference.shape[1])
    if min(len(reference), len(samples)) <= NEIGHBOURS:
        raise ValueError(
            f"precision and recall compare third neighbours: {len(samples)} samples and {len(reference)} reference "
            "images are too few; at least 4 are needed."
        )
    generated, real = (
        torch.from_numpy(np.ascontiguousarray(side, dtype=np.float32)).to(device) for side in (samples, reference)
    )
    precision, recall = calculate_precision_recall_part(generated, real, NEIGHBOURS, DISTANCE_ROWS)
    # Shares of whole images: undo the rounding of the library's float32 mean.
    return round(precision * len(samples)) / len(samples), round(recall * len(reference)) / len(reference)


def kernel_distance(reference: np.ndarray, samples: np.ndarray, seed: int = 0) -> tuple[float, float, int]:
    """KID: squared maximum mean discrepancy under ((x y / D) + 1)^3, over random subsets.

    Returns:
        Mean and standard deviation over 100 subsets, and the subsets' size: 1,000, or all images where there are fewer.

    Raises:
        ValueError: fewer than two images on a side, features that do not fit each other or are not finite.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    reference = check_features(reference, "reference features")
    samples = check_features(samples, "sample features", width=reference.shape[1])
    seed = checks.whole(seed, "seed", least=0, most=2**32 - 1)
    size = min(KID_SUBSET_SIZE, len(reference), len(samples))
    if size < 2:
        raise ValueError(f"KID needs at least 2 images a side, not {size}.")
    found = kid_features_to_metric(
        torch.from_numpy(np.asarray(samples, dtype=np.float64)),
        torch.from_numpy(np.asarray(reference, dtype=np.float64)),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD], size
