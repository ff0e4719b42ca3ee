"""How far a Frechet distance would move with other samples of the same model: a jackknife over groups of them.

Samples are drawn independently, file after file, so runs of them are groups that are independent, too. With theta_g the
distance without group g, of G groups (the delete-a-group jackknife; Efron and Tibshirani 1993, chapter 11):

    variance = (G - 1) / G sum_g (theta_g - mean)^2,    interval = distance +- t_(G - 1, 0.975) sqrt(variance)

All theta_g are of as many samples, so the bias of the distance, which depends on that number, is the same in each and
drops out of the variance. It stays in the distance: the interval is about the distance expected of this many samples,
against this reference, and not about the distance of infinitely many. Where labels are balanced and a group is no whole
number of rounds through the classes, groups differ by their classes too, and the interval is wider than it need be.
"""

import math
from collections.abc import Callable

import numpy as np

from d_emo.common.output import Progress
from d_emo.eval.fid.metrics import Moments, MomentSums, frechet_distance

GROUPS = 20
# Student's t with 19 degrees of freedom, its quantile at 0.975.
QUANTILE = 2.093
# Fewer a group would make a group's share of the covariance one image's.
LEAST_SAMPLES = 2 * GROUPS


def frechet_interval(
    rows: Callable[[np.ndarray], np.ndarray], count: int, reference: Moments, about: str = ""
) -> tuple[float, float]:
    """The 95% interval of a Frechet distance.

    Args:
        rows: features (n, D) of the samples of some indices, as often as it is asked.
        count: number of samples, in the order in which they were drawn.
        reference: the other side, taken as given.
        about: what is computed, for the bar.

    Raises:
        ValueError: fewer than `LEAST_SAMPLES` samples.
    """
    if count < LEAST_SAMPLES:
        raise ValueError(f"{count} samples make no {GROUPS} groups; at least {LEAST_SAMPLES} are needed")
    groups = np.array_split(np.arange(count), GROUPS)
    whole = MomentSums(len(reference.mean))
    for group in groups:
        whole.add(rows(group))
    left: list[float] = []
    with Progress(GROUPS, "group", about, shown=bool(about)) as progress:
        for group in groups:
            left.append(frechet_distance(reference, whole.without(rows(group)).moments()))
            progress.update()
    variance = (GROUPS - 1) * float(np.var(left))  # the mean square times G - 1
    half = QUANTILE * math.sqrt(variance)
    distance = frechet_distance(reference, whole.moments())
    return max(0.0, distance - half), distance + half
