"""Models beside DiT, as `throughput` measures them, in the order of what matters first; until the time is over."""

import functools
import math

from d_emo.eval.benchmarks.families import Case
from d_emo.eval.benchmarks.gpu.results import Results
from d_emo.eval.benchmarks.side_by_side import free_memory, measure

# job, compile, batch, sizes, what beside DiT ("three": plain PyTorch in the block, too), the latents' side.
CASES = (
    ("train", "blocks", 64, "XL-2", "two", 32),
    ("train", "blocks", 256, "S-2", "two", 32),
    ("train", "blocks", 256, "B-2", "two", 32),
    ("train", "none", 64, "XL-2", "two", 32),
    ("train", "none", 256, "S-2", "three", 32),
    ("forward", "blocks", 256, "XL-2", "two", 32),
    ("forward", "blocks", 32, "XL-2", "two", 64),
    ("train", "blocks", 128, "XL-2", "two", 32),
    ("forward", "blocks", 256, "B-2", "two", 32),
    ("train", "none", 32, "XL-2", "two", 32),
    ("train", "none", 32, "S-2", "two", 32),
    ("train", "graphs", 32, "S-2", "two", 32),
    ("train", "graphs", 256, "S-2", "two", 32),
    ("train", "none", 256, "XL-2", "checkpointed", 32),
)
TINY = (("forward", "none", 2, "N-8", "three", 16), ("train", "none", 2, "N-8", "two", 16))
# A case is not begun with less than this.
LEAST = 15.0


def models_of(size: str, which: str) -> list[str]:
    """The names to measure in turns, the baseline last."""
    ours, theirs = f"D-EMOv2-{size}", f"DiT-{size}"
    if which == "checkpointed":
        return [f"{ours}@checkpointed", f"{theirs}@checkpointed"]
    return [ours, f"{ours}@reference", theirs] if which == "three" else [ours, theirs]


def run(results: Results) -> None:
    """Lines `speed`, one a model and case, and `bench`, one a case."""
    for job, compiled, batch, size, which, side in TINY if results.tiny else CASES:
        models = models_of(size, which)
        name = f"{job} b{batch} {side}x{side} {compiled} {' '.join(models)}"
        depth = 1 if results.tiny else None
        dtype = "float32" if results.tiny else "bfloat16"
        case = Case(job, dtype, compiled, batch, side, depth)
        results.attempt("bench", name, functools.partial(measured, results, models, case), LEAST)
        free_memory(results.device)


def measured(results: Results, models: list[str], case: Case) -> dict[str, object]:
    """Write a line a model; whether all were measured."""
    found, rate = measure(models, case, 2 if results.tiny else 5, results.device)
    for result in found:
        values: dict[str, object] = {"model": result.model, "case": case.label}
        if result.error:
            results.add("speed", **values, error=result.error)
            continue
        achieved = result.flops / result.median
        values |= {"ms": 1e3 * result.median, "spread": result.spread, "images_s": case.batch / result.median}
        values |= {"ratio": result.speed_over(found[-1]), "tflops": achieved / 1e12, "peak_mib": result.peak_mib}
        values |= {"mfu": result.share_of_peak(results.device), "of_product": achieved / (rate or math.nan)}
        results.add("speed", **values)
    return {"ok": not any(result.error for result in found)}
