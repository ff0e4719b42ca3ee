"""What the scores cost on this machine once features are there.

    python eval/benchmarks/fid_cost.py --samples 50000 --reference 10000

Random features of Inception's size. The Frechet distance is also computed as ADM does, by SciPy's `sqrtm`. Peak memory
is the process's, the features included.
"""

import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.numbers import whole_from
from d_emo.eval.fid.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments_of,
    precision_recall,
)

FEATURES, CLASSES = 2048, 1008


def sqrtm_distance(first: Moments, second: Moments) -> float:
    """The Frechet distance as ADM computes it."""
    root = scipy.linalg.sqrtm(first.covariance @ second.covariance)
    difference = first.mean - second.mean
    return float(difference @ difference + np.trace(first.covariance + second.covariance - 2 * root.real))


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds of a call, and its answer."""
    start = time.perf_counter()
    answer = function(*arguments)
    return time.perf_counter() - start, answer


@command("fid_cost")
def main(arguments: list[str]) -> None:
    """Print a row a score."""
    parser = CommandParser("fid_cost", __doc__)
    parser.add_argument("--samples", type=whole_from(1), default=50_000, help="Number of samples.")
    parser.add_argument("--reference", type=whole_from(1), default=10_000, help="Number of reference images.")
    options = parser.parse_args(arguments)
    random = np.random.default_rng(0)
    drawn = random.standard_normal((options.samples, FEATURES), dtype=np.float32)
    real = random.standard_normal((options.reference, FEATURES), dtype=np.float32)
    logits = random.standard_normal((options.samples, CLASSES), dtype=np.float32)
    moments_seconds, sides = timed(lambda: (moments_of(real), moments_of(drawn)))
    rows = [("moments of both", moments_seconds)]
    for name, function, values in (
        ("Frechet distance", frechet_distance, sides),
        ("the same by sqrtm", sqrtm_distance, sides),
        ("Inception Score", inception_score, (logits,)),
        ("KID", kernel_distance, (real, drawn)),
        ("precision, recall", precision_recall, (real, drawn)),
    ):
        rows.append((name, timed(function, *values)[0]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{options.samples:,} samples, {options.reference:,} reference images, peak memory {peak:.1f} GiB")
    print("| score | seconds |\n|---|---|")
    for name, seconds in rows:
        print(f"| {name} | {seconds:.1f} |")
    print(f"sqrtm over ours: {rows[2][1] / rows[1][1]:.1f}")


if __name__ == "__main__":
    main(sys.argv[1:])
