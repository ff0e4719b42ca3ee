"""Power-function averages, and any of them from a few that were kept: EDM2's averages after the fact.

At step t such an average weights the weights of step i <= t by i^gamma. Its relative length is the deviation of that
profile over t, so that it grows with the run: with 0.1 it covers about the last tenth of a run of any length. Two are
followed while a run trains; any other one at any step is near a sum of their snapshots, with the coefficients by which
the sum of their profiles is nearest to its profile. Source: arXiv 2312.02696, section 3 and appendix C; all is float64.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from d_emo.common.ranges import RELATIVE_LENGTH


class Profile(NamedTuple):
    """An average: of the steps up to `step`, of a relative length."""

    step: int
    length: float


class Combination(NamedTuple):
    """A sum of averages in place of another.

    Attributes:
        coefficients: one for each of them; their sum is 1.
        error: of the sum's profile, as the norm of the difference over that of the profile.
    """

    coefficients: np.ndarray
    error: float


def exponent(length: float) -> float:
    """Gamma of a relative length: (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) is its square.

    Raises:
        ValueError: the length is out of range.
    """
    inverse = RELATIVE_LENGTH.check(length, "length") ** -2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots.real.max())


def decay(step: int, gamma: float) -> float:
    """Share of an average that stays at a step, from 1 on: (1 - 1 / step)^(gamma + 1); nothing stays at the first."""
    return (1 - 1 / step) ** (gamma + 1)


def overlaps(first: Sequence[Profile], second: Sequence[Profile]) -> np.ndarray:
    """Inner products of profiles as functions of time, (first, second).

    A profile of t and gamma is (gamma + 1) s^gamma / t^(gamma + 1) on [0, t]; its integral over a step's unit of time
    is the weight of that step in the average that `decay` makes, exactly.
    """
    t, u = (np.array([[profile.step for profile in part]], dtype=np.float64) for part in (first, second))
    a, b = (np.array([[exponent(profile.length) for profile in part]]) for part in (first, second))
    t, a = t.T, a.T
    early, late = np.minimum(t, u), np.maximum(t, u)
    late_exponent = np.where(t > u, a, b)
    return (a + 1) * (b + 1) / (a + b + 1) * (early / late) ** late_exponent / late


def combine(kept: Sequence[Profile], wanted: Profile) -> Combination:
    """The sum of kept averages that is nearest to another one.

    Args:
        kept: that there are; those of later steps than the wanted one are used, too.
        wanted: the average.

    Raises:
        ValueError: nothing was kept.
    """
    if not kept:
        raise ValueError("kept is empty: there are no snapshots to make an average of.")
    products, aims = overlaps(kept, kept), overlaps(kept, [wanted])[:, 0]
    norms = np.sqrt(np.diag(products))
    # Lagrange's equations for least squares among sums of coefficients that are 1, of profiles scaled to norm 1.
    ones = 1 / norms
    system = np.block([[products / np.outer(norms, norms), ones[:, None]], [ones[None], np.zeros((1, 1))]])
    solution = np.linalg.lstsq(system, np.append(aims / norms, 1.0), rcond=1e-14)[0]
    coefficients = solution[:-1] / norms
    coefficients = coefficients / coefficients.sum()
    own = overlaps([wanted], [wanted])[0, 0]
    square = coefficients @ products @ coefficients - 2 * coefficients @ aims + own
    return Combination(coefficients, float(np.sqrt(max(0.0, square) / own)))
