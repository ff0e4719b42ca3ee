"""What `throughput` does after it has read its options: models in turns, a table, a plot."""

import argparse
import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from d_emo.common.commands import CommandError
from d_emo.common.files import check_writable, write_json, written_whole
from d_emo.common.gpus import peak_flops
from d_emo.common.messages import kind_and_line
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
    flops: int = 0
    parameters: int = 0
    seconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    error: str | None = None  # why it was not measured, in a line

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

    def speed_over(self, baseline: "Result") -> float | None:
        """The baseline's time over this model's: median of the rounds' ratios, as a slow minute slows both.

        None where one of the two was not measured.
        """
        if self.error or baseline.error:
            return None
        return statistics.median(theirs / ours for ours, theirs in zip(self.seconds, baseline.seconds, strict=True))

    def share_of_peak(self, device: torch.device) -> float | None:
        """The share of the card's peak that the job's products reach (MFU); None where the peak is not known."""
        peak = peak_flops(device_name(device)) if self.case.dtype == "bfloat16" else None
        return self.flops / self.median / peak if peak and not self.error else None


# Rows and columns, and what is summed over, of the matrix product that models are compared with.
PRODUCT, PRODUCT_ON_CPU = (8192, 8192), (2048, 1024)


def timed(job: Callable[[], None]) -> float:
    """Seconds that a job takes."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Callable[[], None], int]:
    """A product whose rate stands for what the machine can do, and its FLOPs."""
    rows, inner = PRODUCT_ON_CPU if device.type == "cpu" else PRODUCT
    left, right = torch.randn(rows, inner, device=device).to(dtype), torch.randn(inner, rows, device=device).to(dtype)

    def job(repeats: int) -> None:
        for _ in range(repeats):
            left @ right
        synchronize(device)

    # A slow one (bfloat16 on a processor without it) is not repeated.
    repeats = 1 if timed(lambda: job(1)) > 1 else 8
    return lambda: job(repeats), 2 * rows * rows * inner * repeats


def measure(names: list[str], case: Case, repeats: int, device: torch.device) -> tuple[list[Result], float | None]:
    """Run every model in turns; results in the order of `names`, and the matrix product's FLOP/s.

    What a model raises ends that model alone: its result says why.
    """
    torch.compiler.reset()  # graphs of the case before would make sizes dynamic, and count against a limit
    results = [Result(name, case) for name in names]
    subjects: dict[int, Subject] = {}  # by place; one that failed is gone, with its memory
    scale = {"forward": 1, "train": 3, "sample": 2 * SAMPLE_STEPS}[case.job]

    def prepare(place: int) -> None:
        subject = subjects[place] = Subject(names[place], case, device)
        results[place].flops, results[place].parameters = subject.flops * scale, subject.parameters
        subject.run()  # warm-up: compiles, allocates, makes the optimizer's state
        with PeakMemory(device) as peak:
            subject.run()
        results[place].peak_mib = peak.mib

    def measure_once(place: int) -> None:
        results[place].seconds.append(timed(subjects[place].run))

    def attempt(work: Callable[[int], None], place: int) -> None:
        try:
            work(place)
        except Exception as error:  # whatever a compiler, a driver or a full memory raises
            results[place].error = kind_and_line(error)
            subjects.pop(place, None)
        if results[place].error:  # by now no traceback holds anything
            free_memory(device)

    product, product_flops = matrix_product(DTYPES[case.dtype], device)
    for place in range(len(names)):
        attempt(prepare, place)
    rates = []
    for _ in range(repeats):
        for place in list(subjects):
            attempt(measure_once, place)
        with contextlib.suppress(torch.OutOfMemoryError):
            rates.append(product_flops / timed(product))
    return results, statistics.median(rates) if rates else None


def free_memory(device: torch.device) -> None:
    """Give back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


HEADER = (
    "| case | model | parameters | MMACs | ms | spread | images/s | ratio | GFLOP/s | of matrix product | MFU "
    "| peak MiB | published |\n" + "|---" * 13 + "|"
)


def row(result: Result, baseline: Result, rate: float | None, device: torch.device) -> str:
    """A line of the table."""
    case = result.case
    if result.error:
        return f"| {case.label} | {result.model} | not measured: {result.error.replace('|', '/')} |" + " |" * 10
    achieved = result.flops / result.median
    ratio, share = result.speed_over(baseline), result.share_of_peak(device)
    published = published_score(split_name(result.model)[0], case.size)
    return (
        f"| {case.label} | {result.model} | {result.parameters / 1e6:.2f}M | {result.macs / 1e6:,.0f} "
        f"| {1e3 * result.median:.3g} | {result.spread:.1%} | {case.batch / result.median:.1f} "
        f"| {known(ratio, '.2f')} | {achieved / 1e9:.0f} | {known(rate and achieved / rate, '.0%')} "
        f"| {known(share, '.1%')} | {known(result.peak_mib, '.0f')} | {published} |"
    )


def known(value: float | None, form: str) -> str:
    """A number as text, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratio to the baseline, one group a case; nothing where no case has one."""
    from matplotlib.figure import Figure

    rows = [entry for entry in rows if entry["ratio"] is not None]
    if not rows:
        return
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
    """Measure every case, print the table and write the files as they grow.

    Raises:
        CommandError: at the end, if something could not be measured.
    """
    if options.output:
        check_writable(options.output, "--output", folder=True)
    keep_freed_memory()
    device = default_device()
    if options.threads:
        torch.set_num_threads(options.threads)
    about = machine(device)
    print(f"{about['device']}, {about['threads']} threads, torch {about['torch']}\n\n{HEADER}", flush=True)
    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    family = family_of(split_name(options.models[0])[0])
    sizes = getattr(options, family.size_option)
    frames = [CLIP_FRAMES if family.given == "clips" else 0]
    grid = (options.jobs, options.dtypes, options.compile, options.batch, sizes, options.depth, frames)
    cases = [Case(*values) for values in itertools.product(*grid)]
    with Progress(len(cases), "case", lines=False) as progress:  # each case prints its lines
        for case in cases:
            results, rate = measure(options.models, case, options.repeats, device)
            for result in results:
                lines.append(row(result, results[-1], rate, device))
                say(lines[-1])
                found = {"ratio": result.speed_over(results[-1]), "mfu": result.share_of_peak(device)}
                rows.append(asdict(result) | {"label": case.label, "matrix_product_flops": rate} | found)
            if options.output:
                write(options.output, about, rows, lines)
            progress.update()
            free_memory(device)
    if options.output:
        plot(rows, options.output / "ratios.png")
    if failed := [entry for entry in rows if entry["error"]]:
        raise CommandError(f"{len(failed)} of {len(rows)} lines could not be measured; the table says why.")


def write(folder: Path, about: dict[str, Any], rows: list[dict[str, Any]], lines: list[str]) -> None:
    """Write what is known so far, in place of what was known before."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", {"machine": about, "results": rows})
    with written_whole(folder / "table.md") as partial:
        partial.write_text("\n".join([HEADER, *lines]) + "\n", encoding="utf-8")
