"""Settings that a model is best sampled with: every point of a grid scored on a small set, the best one then on all.

    --sweep guidance=1.0:2.0:0.25 steps=25,50        5 x 2 points
    --sweep ema=0.02,0.05,0.1                        averages made of a run's snapshots

Papers sweep guidance for every model that they train. Points share the seed, so image i begins with the same noise and
class in each, and differences between points are less noisy than the points. The small set is the beginning of the full
one: the best point is chosen on images that are scored again with it.

A point's folder keeps its manifest, scores and a grid; samples and features go once they are scored. A killed sweep
goes on with the points that have no scores.
"""

import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from d_emo.common import numbers
from d_emo.common.files import write_json, written_whole
from d_emo.common.options import blamed
from d_emo.common.output import say
from d_emo.eval.fid.averages import apply_average
from d_emo.eval.fid.evaluation import FEATURES_FOLDER, SCORES_FILE, Evaluator
from d_emo.eval.fid.protocol import SamplingSettings
from d_emo.eval.fid.sampling import SAMPLES_FOLDER, check_samples, guidance_of, make_manifest, sampled_by
from d_emo.eval.fid.scoring import Scores, load_scores, show, title
from d_emo.pipelines import DEMOPipeline
from d_emo.pipelines.guidance import make_guidance

# What may be swept, by the names that a user types.
NAMES = ("guidance", "internal-guidance", "ema", "interval-start", "interval-stop", "shift", "steps")
MAX_POINTS = 200
# Decimals that a range's values are rounded to: 1 + 3 * 0.1 is meant to be 1.3.
DECIMALS = 9
METRIC = "fid"
SWEEP_FOLDER, SWEEP_FILE, SWEEP_PLOT = "sweep", "sweep.json", "sweep.png"


@dataclass(frozen=True)
class Point:
    """One point of the grid.

    Attributes:
        values: what is swept, by name.
        settings: what it is drawn with.
    """

    values: dict[str, float]
    settings: SamplingSettings

    @property
    def label(self) -> str:
        """Name of its folder."""
        return ",".join(f"{name}-{value:.12g}" for name, value in self.values.items())


@dataclass(frozen=True)
class ScoredPoint:
    """A point with the distance that it was scored with."""

    point: Point
    distance: float


def parse_sweep(texts: Sequence[str]) -> dict[str, list[float]]:
    """Values by name of NAME=START:STOP:STEP (the stop included) or NAME=VALUE,VALUE texts.

    Raises:
        ValueError: a name that cannot be swept, or one twice; no numbers; too many points.
    """
    grid: dict[str, list[float]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        if name not in NAMES:
            raise ValueError(f"--sweep {text}: {name!r} cannot be swept; NAME=VALUES with one of {', '.join(NAMES)}.")
        if name in grid:
            raise ValueError(f"--sweep {text}: {name} is swept twice; name it once.")
        try:
            grid[name] = _range(values) if ":" in values else [numbers.finite(value) for value in values.split(",")]
        except ValueError as error:
            raise ValueError(f"--sweep {text}: {error}; write {name}=START:STOP:STEP, or {name}=VALUE,VALUE.") from None
        if len(set(grid[name])) < len(grid[name]):
            raise ValueError(f"--sweep {text}: a value stands there twice; name it once.")
        count = 1
        for found in grid.values():
            count *= len(found)
        if count > MAX_POINTS:
            raise ValueError(f"--sweep {text}: {count:,} points or more; at most {MAX_POINTS} are scored.")
    return grid


def _range(text: str) -> list[float]:
    """START:STOP:STEP as values, the stop included where a step ends on it."""
    parts = [numbers.finite(part) for part in text.split(":")]
    if len(parts) != 3:
        raise ValueError(f"{text!r} is not three numbers")
    start, stop, step = parts
    if not (step > 0 and stop >= start):
        raise ValueError(f"{text!r} does not go up from START to STOP")
    count = (stop - start) / step
    if not count < MAX_POINTS:
        raise ValueError(f"{text!r} has more than {MAX_POINTS} values")
    return [round(start + place * step, DECIMALS) for place in range(int(count + 10**-DECIMALS) + 1)]


def make_points(grid: dict[str, list[float]], settings: SamplingSettings, count: int) -> list[Point]:
    """All points of a grid, each of `count` images, or as many as the settings have where that is less.

    Raises:
        ValueError: a value that the setting cannot take; the message names its option.
    """
    points = []
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        changes: dict[str, Any] = {"num_images": min(count, settings.num_images)}
        start, stop = settings.guidance_interval
        changes["guidance_interval"] = (point.get("interval-start", start), point.get("interval-stop", stop))
        if "guidance" in point:
            changes["guidance_scale"] = point["guidance"]
        if "ema" in point:
            changes["ema"] = point["ema"]
        if "internal-guidance" in point:
            changes["internal_guidance"] = point["internal-guidance"]
        if "shift" in point:
            changes["time_shift"] = point["shift"]
        if "steps" in point:
            steps = point["steps"]
            changes["steps"] = int(steps) if steps.is_integer() else steps
        points.append(Point(point, replace(settings, **changes)))
    return points


def check_points(
    points: Sequence[Point],
    count: int,
    pipeline: DEMOPipeline,
    model: str,
    folder: Path,
    guide: DEMOPipeline | None = None,
) -> None:
    """Find out before anything is drawn what would end a sweep.

    Args:
        points: of the small set.
        count: images of the full one.
        pipeline: draws them.
        model: that it is of, as the user named it.
        folder: of the report.
        guide: the weaker pipeline that settings name, if they do.

    Raises:
        ValueError: the sampler does not take a point's steps or shift, the model not its guidance, or there are no
            snapshots to average.
        ManifestError: a point's folder, or the one that its full set would get, holds other samples.
    """
    for point in points:
        with sampled_by(pipeline, point.settings), blamed(f"--sweep, {point.label}"):
            pipeline.check_steps(point.settings.steps)
            make_guidance(pipeline, **guidance_of(point.settings), guide=guide)
        apply_average(pipeline, model, point.settings)
        small = make_manifest(pipeline, point.settings, guide)
        check_samples(folder / SWEEP_FOLDER / point.label, small)
        check_samples(folder / point.label, {**small, "sampling": {**small["sampling"], "num_images": count}})


def run_sweep(
    points: Sequence[Point], evaluator: Evaluator, pipeline: DEMOPipeline, model: str, preset: str, folder: Path
) -> list[ScoredPoint]:
    """Score every point that has no scores yet, by the distance of the first features; every process calls this.

    Leaves `sweep.json`, `sweep.png` and a folder a point in `folder`.
    """
    main = evaluator.accelerator.is_main_process
    judge = replace(evaluator, metrics=(METRIC,), others=(), confidence=False, by_class=False)
    results = []
    for place, point in enumerate(points):
        target = folder / SWEEP_FOLDER / point.label
        evaluator.accelerator.wait_for_everyone()
        scores = _stored_scores(target, evaluator)
        if scores is None:
            apply_average(pipeline, model, point.settings)
            judge.score_pipeline(pipeline, point.settings, preset, target)
            scores = load_scores(target / SCORES_FILE)  # the main process alone has computed them
        results.append(ScoredPoint(point, scores.values[METRIC]))
        if main:
            for part in (SAMPLES_FOLDER, FEATURES_FOLDER):
                shutil.rmtree(target / part, ignore_errors=True)
            name = title(METRIC, evaluator.extractor.name, point.settings.num_images)
            say(f"point {place + 1} of {len(points)}, {point.label}: {name} {show(METRIC, results[-1].distance)}")
    if main:
        write_json(folder / SWEEP_FILE, sweep_as_json(results, evaluator.extractor.name))
        plot_sweep(folder / SWEEP_PLOT, results, evaluator.extractor.name)
    return results


def _stored_scores(target: Path, evaluator: Evaluator) -> Scores | None:
    """A point's scores, if they are there and of the same features and reference; its samples are (`check_points`)."""
    try:
        scores = load_scores(target / SCORES_FILE)
        reference = evaluator.reference
        same = (
            scores.conditions["features"]["identity"] == evaluator.extractor.identity
            and {**scores.conditions["reference"], "name": reference.name} == reference.as_json()
        )
        return scores if same and METRIC in scores.values else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def best_point(results: Sequence[ScoredPoint]) -> ScoredPoint:
    """The point of the smallest distance."""
    return min(results, key=lambda result: result.distance)


def sweep_as_json(results: Sequence[ScoredPoint], features: str) -> dict[str, Any]:
    """The points in their order, and the best one."""
    rows = [{**result.point.values, METRIC: result.distance} for result in results]
    best = best_point(results).point
    return {"features": features, "images": best.settings.num_images, "points": rows, "best": best.values}


def sweep_table(results: Sequence[ScoredPoint], features: str) -> str:
    """The points as a table, the best one marked."""
    best = best_point(results)
    names = list(best.point.values)
    distance = title(METRIC, features, best.point.settings.num_images)
    lines = [f"| {' | '.join(names)} | {distance} |", "|---" * (len(names) + 1) + "|"]
    for result in results:
        cells = [f"{value:g}" for value in result.point.values.values()]
        mark = " (best)" if result is best else ""
        lines.append(f"| {' | '.join(cells)} | {show(METRIC, result.distance)}{mark} |")
    return "\n".join(lines)


def plot_sweep(path: Path, results: Sequence[ScoredPoint], features: str) -> None:
    """Draw the distance against the value that takes most values, a line for each choice of the others."""
    from matplotlib.figure import Figure

    first = results[0].point
    across = max(first.values, key=lambda name: len({result.point.values[name] for result in results}))
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        others = ", ".join(f"{name} {value:g}" for name, value in result.point.values.items() if name != across)
        lines.setdefault(others, []).append((result.point.values[across], result.distance))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, line in lines.items():
        axes.plot(*zip(*sorted(line), strict=True), marker="o", label=label or None)
    best = best_point(results)
    axes.plot(best.point.values[across], best.distance, marker="*", markersize=15, linestyle="none", color="k",
              label="best")  # fmt: skip
    axes.set(xlabel=across, ylabel=title(METRIC, features, first.settings.num_images))
    axes.legend()
    axes.grid(alpha=0.3)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
