"""Where the GPU's time goes in a training step: the longest kernels, of D-EMOv2 and DiT, plain and compiled."""

import functools
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from d_emo.eval.benchmarks.families import Case
from d_emo.eval.benchmarks.gpu.results import Results
from d_emo.eval.benchmarks.side_by_side import free_memory
from d_emo.eval.benchmarks.subjects import Subject

CASES = (
    *(("D-EMOv2-XL-2", "blocks", 64), ("DiT-XL-2", "blocks", 64)),
    *(("D-EMOv2-S-2", "blocks", 256), ("DiT-S-2", "blocks", 256)),
)
TINY = (("D-EMOv2-N-8", "none", 2),)
LONGEST = 30
# A profile is not begun with less than this.
LEAST = 10.0


def run(results: Results) -> None:
    """Lines `profile`, and a table of every step."""
    for name, compiled, batch in TINY if results.tiny else CASES:
        dtype, size = ("float32", 16) if results.tiny else ("bfloat16", 32)
        case = Case("train", dtype, compiled, batch, size, 1 if results.tiny else None)
        results.attempt("profile", f"{name} {compiled}", functools.partial(profiled, results, name, case), LEAST)
        free_memory(results.device)


def profiled(results: Results, name: str, case: Case) -> dict[str, Any]:
    """The milliseconds of a step's kernels in all, their number, and the longest of them."""
    torch.compiler.reset()
    subject = Subject(name, case, results.device)
    for _ in range(1 if results.tiny else 3):
        subject.run()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if results.cuda else [])
    with profile(activities=activities) as found:
        subject.run()
    averages = found.key_averages()
    key = "self_device_time_total" if results.cuda else "self_cpu_time_total"
    table = averages.table(sort_by=key, row_limit=LONGEST, max_name_column_width=70)
    (results.folder / f"profile-{name}-{case.compile}.txt").write_text(table, encoding="utf-8")
    if not results.cuda:
        return {}
    # Steps of optimizers are marked among the kernels, beside the kernels that they are made of.
    kernels = [
        event
        for event in averages
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.key.startswith("Optimizer")
    ]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    longest = [(e.key[:60], e.count, round(e.self_device_time_total / 1e3, 2)) for e in kernels[:LONGEST]]
    total = sum(event.self_device_time_total for event in kernels) / 1e3
    return {"gpu_ms": total, "kernels": sum(event.count for event in kernels), "top": longest}
