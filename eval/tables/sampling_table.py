"""What sampling costs and gives: solvers by number of steps, and Diffusers' caches, on the README's digits.

    python eval/tables/sampling_table.py --model runs/digits

Every row draws the same labels (200 by default) from the same seeds. `read right` is the share that a classifier of
real digits reads as the digit asked for. `distance` is the Frechet distance between Gaussians fitted to samples and to
real images in pixel space ([-1, 1]). `change` is the root mean square difference from the same solver's images without
a cache. Seconds are those of the whole run, the median of `--repeats`; `speed` is relative to the first row.
"""

import ast
import contextlib
import io
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FirstBlockCacheConfig, MagCacheConfig

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.files import check_writable, make_folder, write_json
from d_emo.common.numbers import finite_from, whole_from
from d_emo.eval.digits_report import draw, load_digits_pipeline, real_digits, score_digits
from d_emo.eval.fid.metrics import frechet_distance, moments_of
from d_emo.pipelines import DEMOPipeline
from d_emo.schedulers.flow_paths import path_of

STEPS = (250, 50, 20, 10)
CACHED_STEPS = 50
COLUMNS = ("solver", "steps", "cache", "seconds", "speed", "read right", "distance", "change")


def fitting_schedulers(pipeline: DEMOPipeline) -> dict[str, Any]:
    """Solvers for the pipeline's objective; caches are compared on the first, which is deterministic."""
    config = pipeline.scheduler.config
    if pipeline.transformer.config.end_block is not None:
        return {"flow map": pipeline.scheduler}
    if path_of(pipeline.transformer.config) is not None:
        flow = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": config.get("shift", 1.0),
        }
        return {"Euler": pipeline.scheduler, "DPM-Solver++ (flow)": DPMSolverMultistepScheduler(**flow)}
    return {
        "DDIM": DDIMScheduler.from_config(config),
        "DDPM": pipeline.scheduler,
        "DPM-Solver++": DPMSolverMultistepScheduler.from_config(config),
    }


def magnitude_ratios(pipeline: DEMOPipeline, steps: int, guidance_scale: float) -> list[float]:
    """MagCache's ratios for a pipeline and number of steps, from a run that skips nothing."""
    printed = io.StringIO()
    pipeline.transformer.enable_cache(MagCacheConfig(num_inference_steps=steps, calibrate=True))
    with contextlib.redirect_stdout(printed):  # Diffusers prints what it found, and keeps it nowhere
        draw(pipeline, 1, steps, guidance_scale, seed=0)
    pipeline.transformer.disable_cache()
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    return ast.literal_eval(lines[-1])


def cache_configs(pipeline: DEMOPipeline, guidance_scale: float) -> Iterator[tuple[str, object]]:
    """Names and configurations of the caches that are compared."""
    for threshold in (0.05, 0.1, 0.2):
        yield f"FirstBlockCache {threshold}", FirstBlockCacheConfig(threshold=threshold)
    ratios = magnitude_ratios(pipeline, CACHED_STEPS, guidance_scale)
    for threshold in (0.06, 0.24):
        yield (
            f"MagCache {threshold}",
            MagCacheConfig(threshold=threshold, num_inference_steps=CACHED_STEPS, mag_ratios=ratios),
        )


@command("sampling_table")
def main(arguments: list[str]) -> None:
    """Draw, score and print row after row; write JSON beside the model."""
    parser = CommandParser("sampling_table", __doc__)
    parser.add_argument("--model", required=True, help="Pipeline folder of a digits run.")
    parser.add_argument("--per-class", type=whole_from(1), default=20, help="Samples a class.")
    parser.add_argument("--guidance-scale", type=finite_from(1), default=1.5)
    parser.add_argument("--repeats", type=whole_from(1), default=3)
    parser.add_argument(
        "--steps", type=whole_from(1), nargs="+", help="Only the first solver, in so many steps each, and no cache."
    )
    parser.add_argument("--output-dir", help="Default: evaluation in the model's folder.")
    options = parser.parse_args(arguments)
    folder = Path(options.output_dir or Path(options.model) / "evaluation")
    check_writable(folder, "--output-dir", folder=True)
    pipeline = load_digits_pipeline(options.model)
    pipeline.set_progress_bar_config(disable=True)
    real, classes = real_digits(pipeline.transformer.config.sample_size)
    requested = np.repeat(np.arange(10), options.per_class)
    rows: list[dict[str, object]] = []

    def measure(solver: str, steps: int, cache: str, plain: np.ndarray | None) -> np.ndarray:
        seconds = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            samples = draw(pipeline, options.per_class, steps, options.guidance_scale, seed=0)
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds)
        row: dict[str, object] = {
            "solver": solver,
            "steps": steps,
            "cache": cache,
            "seconds": round(median, 2),
            "speed": round(float(rows[0]["seconds"]) / median, 1) if rows else 1.0,  # type: ignore[arg-type]
            "read right": round(score_digits(samples, requested, real, classes).requested_class, 3),
            "distance": round(frechet_distance(moments_of(samples), moments_of(real)), 3),
            "change": "-" if plain is None else round(float(np.sqrt(np.square(samples - plain).mean())), 4),
        }
        rows.append(row)
        print(f"| {' | '.join(str(row[name]) for name in COLUMNS)} |", flush=True)
        return samples

    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    schedulers = fitting_schedulers(pipeline)
    first = next(iter(schedulers))
    plain = np.empty(0)
    for name, scheduler in schedulers.items():
        if options.steps and name != first:
            continue
        pipeline.scheduler = scheduler
        for steps in options.steps or STEPS:
            samples = measure(name, steps, "none", None)
            if name == first and steps == CACHED_STEPS:
                plain = samples
    pipeline.scheduler = schedulers[first]
    for name, config in () if options.steps else cache_configs(pipeline, options.guidance_scale):
        pipeline.transformer.enable_cache(config)
        measure(first, CACHED_STEPS, name, plain)
        pipeline.transformer.disable_cache()
    make_folder(folder)
    write_json(folder / "sampling.json", {"rows": rows, **vars(options)})


if __name__ == "__main__":
    main(sys.argv[1:])
