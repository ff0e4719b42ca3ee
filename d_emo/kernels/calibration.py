"""Whether the kernels' own matrix products are faster than PyTorch's here: measured once a machine, then remembered.

It depends on the processor and on the library that PyTorch was built with: MKL keeps its fastest code for Intel's
processors, and without AVX-512 there are no fast bfloat16 products at all. The answer is kept beside the compiled
kernels, so that every process of a machine, and every run, sums in the same order.
"""

import functools
import json
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.utils import logging

from . import cpu

logger = logging.get_logger(__name__)

ROWS, INPUTS, OUTPUTS = 1024, 384, 768  # of a middle-sized layer
ROUNDS = 5


@torch.compiler.assume_constant_result
def own_products_are_faster(dtype: torch.dtype) -> bool:
    """Whether `d_emo::linear` beats `F.linear` for this type, float32 or bfloat16."""
    return speed_ratios()[str(dtype).removeprefix("torch.")] >= 1


@functools.cache
def speed_ratios() -> dict[str, float]:
    """PyTorch's time over ours, by type."""
    path = cpu.cached_path(f"products-torch-{torch.__version__}", ".json")
    if not path.exists():
        ratios = {str(dtype).removeprefix("torch."): _measure(dtype) for dtype in (torch.float32, torch.bfloat16)}
        logger.info(f"Matrix products of the kernels over PyTorch's, in speed: {ratios}; remembered in {path}")
        _keep(path, json.dumps(ratios))
    return json.loads(path.read_text(encoding="utf-8"))


@torch.inference_mode(False)
@torch.no_grad()
def _measure(dtype: torch.dtype) -> float:
    inputs = torch.ones(ROWS, INPUTS, dtype=dtype, device="cpu")
    weight = torch.ones(OUTPUTS, INPUTS, dtype=dtype, device="cpu")
    out = torch.empty(ROWS, OUTPUTS, dtype=dtype, device="cpu")
    shape = cpu.LinearShape(ROWS, INPUTS, OUTPUTS, True)
    calls = (
        lambda: F.linear(inputs, weight),
        lambda: cpu.call("linear", "linear_forward", dtype, shape, inputs, weight, out),
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS + 1):  # in turns, the first to warm up; the fastest of each is the least disturbed
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    library, own = (min(times[1:]) for times in seconds)
    return round(library / own, 3)


def _keep(path: Path, content: str) -> None:
    # Several processes may measure at once: each writes a file of its own, then renames it.
    descriptor, partial = tempfile.mkstemp(prefix=".partial-", suffix=path.suffix, dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(content)
        if not path.exists():
            Path(partial).replace(path)
    finally:
        Path(partial).unlink(missing_ok=True)
