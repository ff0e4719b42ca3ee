"""How fast the kernels' own matrix products are beside PyTorch's here: measured once a machine, then remembered.

It depends on the processor and on the library that PyTorch was built with: MKL keeps its fastest code for Intel's
processors, and without AVX-512 there are no fast bfloat16 products at all. The answer is kept beside the compiled
kernels, so that later processes of the machine sum in the same order.
"""

import functools
import json
import time
from collections.abc import Callable

import torch
from diffusers.utils import logging

from ..files import written_by_one_of_many
from . import cpu

logger = logging.get_logger(__name__)

ROWS, INPUTS, OUTPUTS = 1024, 384, 768  # of a middle-sized layer
ROUNDS = 9


@torch.compiler.assume_constant_result
def product_speed(dtype: torch.dtype) -> float:
    """PyTorch's time over ours for a linear layer's three products in float32 or bfloat16: above 1, ours are faster."""
    return _speeds()[str(dtype).removeprefix("torch.")]


@functools.cache
def _speeds() -> dict[str, float]:
    path = cpu.cached_path(f"products-torch-{torch.__version__}", ".json")
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    speeds = {str(dtype).removeprefix("torch."): _measure(dtype) for dtype in (torch.float32, torch.bfloat16)}
    logger.info(f"Speed of the kernels' matrix products over PyTorch's: {speeds}")
    try:
        with written_by_one_of_many(path) as partial:
            partial.write_text(json.dumps(speeds), encoding="utf-8")
    except OSError as error:  # a cache that was filled beforehand and cannot be written, say
        logger.warning(f"The speed of matrix products cannot be kept, every process measures it again: {error}")
    return speeds


@torch.inference_mode(False)
@torch.no_grad()
def _measure(dtype: torch.dtype) -> float:
    def ones(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device="cpu")

    def call(function: str, shape: cpu.LinearShape, *tensors: torch.Tensor) -> None:
        cpu.call("linear", function, dtype, shape, *tensors)

    x, weight, y = ones(ROWS, INPUTS), ones(OUTPUTS, INPUTS), ones(ROWS, OUTPUTS)
    forward = cpu.LinearShape(ROWS, INPUTS, OUTPUTS, True)
    backward = cpu.LinearShape(ROWS, OUTPUTS, INPUTS, False)
    calls = (
        lambda: torch.mm(x, weight.t(), out=y),
        lambda: torch.mm(y, weight, out=x),
        lambda: torch.mm(y.t(), x, out=weight),
        lambda: call("linear_forward", forward, x, weight, y),
        lambda: call("linear_forward", backward, y, weight, x),
        lambda: call("linear_weight_gradient", forward, y, x, weight),
    )
    seconds = []
    for _ in range(ROUNDS + 1):  # in turns, once to warm up; the fastest of each is the least disturbed
        for tensor in (x, weight, y):
            tensor.fill_(1)  # or the results would grow from round to round
        seconds.append([_timed(call) for call in calls])
    fastest = [min(times) for times in zip(*seconds[1:], strict=True)]
    return round(sum(fastest[:3]) / sum(fastest[3:]), 3)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
