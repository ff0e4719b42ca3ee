"""What programs of the kernels are made of, tried out: one setting after another, at a model's sizes, and how long each
kernel then takes.

Settings are constants of the kernels' modules. Which of them is fastest is a card's own; that all are right is what
`kernel_checks` says once one of them was chosen.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from d_emo.eval.benchmarks.gpu.results import Results
from d_emo.kernels.reference import Windows

# Tokens of 16 x 16, as 32 x 32 latents have.
SIZES = (("XL b64", 1152, 16, 64, 16), ("S b256", 384, 6, 256, 16))
TINY = (("tiny", 32, 2, 1, 8),)
WINDOW = (8, 8)
ATTENTION = tuple(
    {"VALUE_BLOCK": block, "WARPS": warps} for block, warps in ((64, 4), (64, 8), (128, 4), (128, 8), (32, 4))
)
WALKS = tuple(
    {"COLUMNS": columns, "CHANNELS": channels, "WARPS": warps}
    for columns, channels, warps in ((4, 128, 2), (4, 64, 1), (4, 128, 4), (4, 256, 4), (2, 128, 2), (2, 256, 2))
)
TILES = tuple(
    {"CHUNK": chunk, "TILE": tile, "TILE_WARPS": warps}
    for chunk, tile, warps in ((256, 8, 4), (256, 16, 8), (128, 16, 4), (256, 32, 8))
)
REPEATS = 5


def run(results: Results) -> None:
    """Lines `launch`, with the milliseconds of every kernel."""
    if not results.cuda:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read at Triton's first import
    from d_emo.kernels.triton import attention, local

    for size in TINY if results.tiny else SIZES:
        for module, tried, make in ((attention, ATTENTION, attend), (local, WALKS + TILES, convolve)):
            for setting in tried[:1] if results.tiny else tried:
                work = functools.partial(measured, results, module, setting, functools.partial(make, results, size))
                results.attempt("launch", f"{size[0]} {module.__name__.rpartition('.')[2]} {told(setting)}", work)


def told(setting: dict[str, int]) -> str:
    """A setting, for people."""
    return ", ".join(f"{name} {value}" for name, value in setting.items())


def measured(
    results: Results, module: ModuleType, setting: dict[str, Any], make: Callable[[], Callable[[], Any]]
) -> dict[str, Any]:
    """Compile with a setting, then measure; the second only while no other process does."""
    with mock.patch.multiple(module, **setting):
        work = make()
        for _ in range(1 if results.tiny else 2):
            work()
        results.synchronize()
        if not results.cuda:
            return {}
        with alone(results), profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(REPEATS):
                work()
            results.synchronize()
    events = [event for event in profiled.key_averages() if event.key.endswith("_kernel")]
    times = {event.key: event.self_device_time_total / 1e3 / REPEATS for event in events}
    kernels = {name: round(time, 4) for name, time in times.items()}
    return {"setting": setting, "module": module.__name__, "kernels": kernels, "all_ms": sum(times.values())}


@contextlib.contextmanager
def alone(results: Results) -> Iterator[None]:
    """Within it, no other process of the same results is."""
    import fcntl

    folder = os.open(results.folder, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def attend(results: Results, size: tuple[str, int, int, int, int]) -> Callable[[], Any]:
    """A forward and a backward pass of spanning window attention."""
    from d_emo.kernels.triton import attention

    _, dim, heads, batch, side = size
    dtype = torch.bfloat16
    qkv = torch.randn(batch, side, side, 6 * dim, device=results.device, dtype=dtype)
    grad = torch.randn(batch, side, side, 4 * dim, device=results.device, dtype=dtype)
    windows = Windows.of("spanning", dim, heads, WINDOW, (side, side))
    return lambda: (attention.forward(qkv, windows), attention.backward(grad, qkv, windows))


def convolve(results: Results, size: tuple[str, int, int, int, int]) -> Callable[[], Any]:
    """A forward and a backward pass of the local branch with a batch's statistics."""
    from d_emo.kernels.triton import local

    _, dim, _, batch, side = size
    x, grad = (torch.randn(batch, side, side, 4 * dim, device=results.device, dtype=torch.bfloat16) for _ in range(2))
    draw = functools.partial(torch.rand, device=results.device)
    given = local.Parameters(draw(25, 4 * dim), *(draw(4 * dim) for _ in range(4)))

    def work() -> Any:
        _, mean, variance, kept = local.forward(x, given, True, 1e-6)
        used = given._replace(mean=mean, variance=variance)
        return local.backward(grad, x, kept, used, True, 1e-6)

    return work
