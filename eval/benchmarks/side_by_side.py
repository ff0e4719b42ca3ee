"""What `throughput` does after it has read its options: models in turns, a table, a plot."""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from d_emo.common.files import check_writable, write_json, written_whole
from d_emo.common.output import Progress, say
from d_emo.common.processes import default_device, device_name, keep_freed_memory
from d_emo.eval.benchmarks.families import CLIP_FRAMES, Case, family_of
from d_emo.eval.benchmarks.peak_memory import PeakMemory
from d_emo.eval.benchmarks.published import published_score
from d_emo.eval.benchmarks.subjects import (
    DTYPES,
    SAMPLE_STEPS,
    Subject,
    check_name,
    split_name,
    synchronize,
)


@dataclass
class Result:
    """Measurements of one model in one case; seconds a run, one entry a round."""

    model: str
    case: Case
    flops: int
    parameters: int
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None

    @property
    def macs(self) -> float:
        """Multiply-adds of the job, an image."""
        return self.flops / 2 / self.case.batch

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, over the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median

    def speed_over(self, baseline: "Result") -> float:
        """The baseline's time over this model's: median of the rounds' ratios, as a slow minute slows both."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.seconds, baseline.seconds, strict=True))


def timed(job: Callable[[], None]) -> float:
    """Seconds that a job takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], None], int]:
    """A product whose rate stands for what the machine can do, and its FLOPs."""
    rows, inner = (2048, 1024) if device.type == "cpu" else (8192, 8192)
    left, right = torch.randn(rows, inner, device=device).to(dtype), torch.randn(inner, rows, device=device).to(dtype)

    def job(repeats: int) -> None:
        for _ in range(repeats):
            left @ right
        synchronize(device)

    # A slow one (bfloat16 on a processor without it) is not repeated.
    repeats = 1 if timed(lambda: job(1)) > 1 else 8
    return lambda: job(repeats), 2 * rows * rows * inner * repeats


def measure(names: list[str], case: Case, repeats: int, device: torch.device) -> tuple[list[Result], float]:
    """Run every model in turns; results in the order of `names`, and the matrix product's FLOP/s."""
    subjects = [Subject(name, case, device) for name in names]
    scale = {"forward": 1, "train": 3, "sample": 2 * SAMPLE_STEPS}[case.job]
    results = [Result(subject.name, case, subject.flops * scale, subject.parameters) for subject in subjects]
    product, product_flops = matrix_product(DTYPES[case.dtype], device)
    for subject, result in zip(subjects, results, strict=True):
        subject.run()  # warm-up: compiles, allocates, makes the optimizer's state
        with PeakMemory(device) as peak:
            subject.run()
        result.peak_mib = peak.mib
    rates = []
    for _ in range(repeats):
        for subject, result in zip(subjects, results, strict=True):
            result.seconds.append(timed(subject.run))
        rates.append(product_flops / timed(product))
    return results, statistics.median(rates)


HEADER = (
    "| case | model | parameters | MMACs | ms | spread | images/s | ratio | GFLOP/s | of matrix product | peak MiB "
    "| published |\n" + "|---" * 12 + "|"
)


def row(result: Result, baseline: Result, rate: float) -> str:
    """A line of the table."""
    case = result.case
    achieved = result.flops / result.median
    peak = "-" if result.peak_mib is None else f"{result.peak_mib:.0f}"
    return (
        f"| {case.label} | {result.model} | {result.parameters / 1e6:.2f}M | {result.macs / 1e6:,.0f} "
        f"| {1e3 * result.median:.3g} | {result.spread:.1%} | {case.batch / result.median:.1f} "
        f"| {result.speed_over(baseline):.2f} | {achieved / 1e9:.0f} "
        f"| {achieved / rate:.0%} | {peak} | {published_score(split_name(result.model)[0], case.size)} |"
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratio to the baseline, one group a case."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(entry["label"] for entry in rows))
    models = list(dict.fromkeys(entry["model"] for entry in rows))
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(labels) * len(models)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(models)
    for place, model in enumerate(models):
        chosen = [entry for entry in rows if entry["model"] == model]
        positions = [labels.index(entry["label"]) + place * height for entry in chosen]
        bars = axes.barh(positions, [entry["ratio"] for entry in chosen], height * 0.9, label=model)
        axes.bar_label(bars, [f"{entry['ratio']:.2f}" for entry in chosen], padding=3, fontsize=8)
    axes.set_yticks([index + 0.4 - height / 2 for index in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)  # room for the figures beside the bars
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(f"speed, {models[-1]} = 1")
    axes.legend(fontsize=8)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    return {"device": device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}


def check_models(options: argparse.Namespace) -> None:
    """Whether the models can be measured, and beside each other.

    Raises:
        ValueError: they cannot; the message names the option.
    """
    for name in options.models:
        try:
            check_name(name, options.jobs, options.dtypes)
        except ValueError as error:
            raise ValueError(f"--models {error}") from error
    given = sorted({family_of(split_name(name)[0]).given for name in options.models})
    if len(given) > 1:
        raise ValueError(f"--models: networks of {' and of '.join(given)} cannot be measured side by side.")
    if options.depth != [None] and given != ["latents"]:
        raise ValueError(f"--depth is for networks of latents; the models are of {given[0]}.")


def run(options: argparse.Namespace) -> None:
    """Measure every case, print the table as it grows, write the files."""
    if options.output:
        check_writable(options.output, "--output", folder=True)
    keep_freed_memory()
    device = default_device()
    if options.threads:
        torch.set_num_threads(options.threads)
    about = machine(device)
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}\n\n{HEADER}", flush=True)
    rows, lines = [], []
    family = family_of(split_name(options.models[0])[0])
    sizes = getattr(options, family.size_option)
    frames = [CLIP_FRAMES if family.given == "clips" else 0]
    grid = (options.jobs, options.dtypes, options.compile, options.batch, sizes, options.depth, frames)
    cases = [Case(*values) for values in itertools.product(*grid)]
    with Progress(len(cases), "case", lines=False) as progress:  # each case prints its lines
        for case in cases:
            results, rate = measure(options.models, case, options.repeats, device)
            for result in results:
                lines.append(row(result, results[-1], rate))
                say(lines[-1])
                ratio = result.speed_over(results[-1])
                rows.append(asdict(result) | {"label": case.label, "ratio": ratio, "matrix_product_flops": rate})
            progress.update()
            gc.collect()
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "results.json", {"machine": about, "results": rows})
        with written_whole(options.output / "table.md") as partial:
            partial.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
        plot(rows, options.output / "ratios.png")
