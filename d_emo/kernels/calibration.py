"""How fast the kernels' own matrix products are beside PyTorch's here: measured once a machine, then remembered.

It depends on the processor, on the library that PyTorch was built with (MKL keeps its fastest code for Intel's
processors, and without AVX-512 there are no fast bfloat16 products at all), and on what else the machine does: the
kernels hand out small pieces of work as threads become free. The answer is kept beside the compiled kernels, so that
later processes of the machine sum in the same order.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from diffusers.utils import logging

from ..common.files import written_by_one_of_many
from . import cpu

logger = logging.get_logger(__name__)

# Rows, inputs and outputs of the layers that stand for all: in size S, where results leave the cache, and in size XL,
# whose weight does.
SMALL, LARGE = (4096, 384, 1536), (1024, 1024, 4096)
LEAST_LARGE = 1_500_000  # numbers that a large layer's weight has
ROUNDS = 9
MOST_SECONDS = 2.0  # for all rounds of a layer; one is made in any case
CLEAR = 3.0  # times as fast: one round tells


class Speeds(NamedTuple):
    """PyTorch's time over ours for a linear layer's three products: above 1, ours are faster."""

    forward: float
    input_gradient: float
    weight_gradient: float


@torch.compiler.assume_constant_result
def product_speeds(dtype: torch.dtype, numbers: int) -> Speeds:
    """The speeds in float32 or bfloat16 for a layer whose weight has so many numbers."""
    return _speeds(dtype, numbers >= LEAST_LARGE)


@functools.cache
def _speeds(dtype: torch.dtype, large: bool) -> Speeds:
    kind = f"{str(dtype).removeprefix('torch.')}-{'large' if large else 'small'}"
    path = cpu.cached_path(f"products-{kind}-torch-{torch.__version__}", ".json")
    if path.exists():
        return Speeds(**json.loads(path.read_text(encoding="utf-8")))
    speeds = _measure(dtype, *(LARGE if large else SMALL))
    logger.info(f"Speed of the kernels' matrix products over PyTorch's, {kind}: {speeds}")
    try:
        with written_by_one_of_many(path) as partial:
            partial.write_text(json.dumps(speeds._asdict()), encoding="utf-8")
    except OSError as error:  # a cache that was filled beforehand and cannot be written, say
        logger.warning(f"The speed of matrix products cannot be kept, every process measures it again: {error}")
    return speeds


@torch.inference_mode(False)
@torch.no_grad()
def _measure(dtype: torch.dtype, rows: int, inputs: int, outputs: int) -> Speeds:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device="cpu")

    def call(function: str, shape: cpu.LinearShape, *tensors: torch.Tensor) -> None:
        cpu.call("linear", function, dtype, shape, *tensors)

    x, weight, y = ones(rows, inputs), ones(outputs, inputs), ones(rows, outputs)
    forward = cpu.LinearShape(rows, inputs, outputs, True)
    backward = cpu.LinearShape(rows, outputs, inputs, False)
    products = (
        (lambda: torch.mm(x, weight.t(), out=y), lambda: call("linear_forward", forward, x, weight, y)),
        (lambda: torch.mm(y, weight, out=x), lambda: call("linear_forward", backward, y, weight, x)),
        (lambda: torch.mm(y.t(), x, out=weight), lambda: call("linear_weight_gradient", forward, y, x, weight)),
    )
    rounds: list[list[float]] = []
    start = time.perf_counter()
    # In turns. The median, since a machine that is always disturbed is to be judged so.
    while len(rounds) < 2 or (len(rounds) <= ROUNDS and time.perf_counter() - start < MOST_SECONDS):
        for tensor in (x, weight, y):
            tensor.fill_(1)  # or the results would grow from round to round
        rounds.append([_timed(theirs) / _timed(ours) for theirs, ours in products])
        if all(ratio > CLEAR for ratio in rounds[0]):
            break
    # The first round warms up, unless it was clear.
    return Speeds(*(round(statistics.median(ratios), 3) for ratios in zip(*(rounds[1:] or rounds), strict=True)))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
