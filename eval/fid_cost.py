"""What the scores cost on this machine once features are there, beside the libraries' own functions.

    python eval/fid_cost.py --samples 50000 --reference 10000

Random features of Inception's size. `peer` is SciPy's `sqrtm` for the Frechet distance and torch-fidelity for precision
and recall; `ratio` is the peer's time over ours. `--peers` runs them too, which takes minutes. Peak memory is the
process's so far, the features included.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_part

from d_emo.eval.fid.metrics import (
    NEIGHBOURS,
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


def main(arguments: list[str]) -> None:
    """Print a row a score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000, help="Number of samples.")
    parser.add_argument("--reference", type=int, default=10_000, help="Number of reference images.")
    parser.add_argument("--peers", action="store_true", help="Time the libraries' functions too.")
    options = parser.parse_args(arguments)
    random = np.random.default_rng(0)
    drawn = random.standard_normal((options.samples, FEATURES), dtype=np.float32)
    real = random.standard_normal((options.reference, FEATURES), dtype=np.float32)
    logits = random.standard_normal((options.samples, CLASSES), dtype=np.float32)
    moments_seconds, sides = timed(lambda: (moments_of(real), moments_of(drawn)))
    tensors = torch.from_numpy(drawn), torch.from_numpy(real)
    rows: list[tuple[str, float, Any, Callable[[], Any] | None]] = [
        ("moments of both", moments_seconds, None, None),
        ("Frechet distance", *timed(frechet_distance, *sides), lambda: sqrtm_distance(*sides)),
        ("Inception Score", *timed(inception_score, logits), None),
        ("KID", *timed(kernel_distance, real, drawn), None),
        (
            "precision, recall",
            *timed(precision_recall, real, drawn),
            lambda: calculate_precision_recall_part(*tensors, NEIGHBOURS, 2500),
        ),
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{options.samples:,} samples, {options.reference:,} reference images, peak memory {peak:.1f} GiB")
    print("| score | seconds | peer's seconds | ratio |\n|---|---|---|---|")
    for name, seconds, answer, peer in rows:
        cells = ["", ""]
        if peer is not None and options.peers:
            peer_seconds, expected = timed(peer)
            np.testing.assert_allclose(answer, expected, rtol=1e-6)
            cells = [f"{peer_seconds:.1f}", f"{peer_seconds / seconds:.1f}"]
        print(f"| {name} | {seconds:.1f} | {cells[0]} | {cells[1]} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
