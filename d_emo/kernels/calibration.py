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

from ..files import written_by_one_of_many
from . import cpu

logger = logging.get_logger(__name__)

# Of a middle-sized layer and a batch whose results do not stay in the cache: in a network they have left it, too.
ROWS, INPUTS, OUTPUTS = 4096, 384, 1536
ROUNDS = 9
MOST_SECONDS = 3.0  # for all rounds of a type; one is made in any case


class Speeds(NamedTuple):
    """PyTorch's time over ours for a linear layer's three products: above 1, ours are faster."""

    forward: float
    input_gradient: float
    weight_gradient: float


@torch.compiler.assume_constant_result
def product_speeds(dtype: torch.dtype) -> Speeds:
    """The speeds in float32 or bfloat16."""
    return _speeds()[str(dtype).removeprefix("torch.")]


@functools.cache
def _speeds() -> dict[str, Speeds]:
    path = cpu.cached_path(f"product-speeds-torch-{torch.__version__}", ".json")
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {dtype: Speeds(**speeds) for dtype, speeds in stored.items()}
    speeds = {str(dtype).removeprefix("torch."): _measure(dtype) for dtype in (torch.float32, torch.bfloat16)}
    logger.info(f"Speed of the kernels' matrix products over PyTorch's: {speeds}")
    try:
        with written_by_one_of_many(path) as partial:
            partial.write_text(
                json.dumps({dtype: value._asdict() for dtype, value in speeds.items()}), encoding="utf-8"
            )
    except OSError as error:  # a cache that was filled beforehand and cannot be written, say
        logger.warning(f"The speed of matrix products cannot be kept, every process measures it again: {error}")
    return speeds


@torch.inference_mode(False)
@torch.no_grad()
def _measure(dtype: torch.dtype) -> Speeds:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device="cpu")

    def call(function: str, shape: cpu.LinearShape, *tensors: torch.Tensor) -> None:
        cpu.call("linear", function, dtype, shape, *tensors)

    x, weight, y = ones(ROWS, INPUTS), ones(OUTPUTS, INPUTS), ones(ROWS, OUTPUTS)
    forward = cpu.LinearShape(ROWS, INPUTS, OUTPUTS, True)
    backward = cpu.LinearShape(ROWS, OUTPUTS, INPUTS, False)
    products = (
        (lambda: torch.mm(x, weight.t(), out=y), lambda: call("linear_forward", forward, x, weight, y)),
        (lambda: torch.mm(y, weight, out=x), lambda: call("linear_forward", backward, y, weight, x)),
        (lambda: torch.mm(y.t(), x, out=weight), lambda: call("linear_weight_gradient", forward, y, x, weight)),
    )
    rounds: list[list[float]] = []
    start = time.perf_counter()
    # In turns, once to warm up. The median, since a machine that is always disturbed is to be judged so.
    while len(rounds) < 2 or (len(rounds) <= ROUNDS and time.perf_counter() - start < MOST_SECONDS):
        for tensor in (x, weight, y):
            tensor.fill_(1)  # or the results would grow from round to round
        rounds.append([_timed(theirs) / _timed(ours) for theirs, ours in products])
    return Speeds(*(round(statistics.median(ratios), 3) for ratios in zip(*rounds[1:], strict=True)))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
