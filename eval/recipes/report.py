"""A comparison of recipes as a table in Markdown, and as curves over the time of training."""

from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from d_emo.common.files import written_whole
from d_emo.eval.compare_runs import read_scores
from d_emo.eval.recipes.reading import Recipe
from d_emo.eval.recipes.study import Study, batch_of, log_rows, run_name

COLUMNS = ("recipe", "steps", "minutes")
# How a score is written.
FORMATS = {"distance": "{:.4g}", "read right": "{:.1%}"}


def table(study: Study) -> str:
    """A row a recipe: its mean over seeds, from lowest to highest seed, and the difference from the first recipe."""
    scored = [recipe for recipe in study.recipes if runs_of(study, recipe)]
    metrics = [name for name in FORMATS if any(name in run["scores"] for run in runs_of(study, scored[0]).values())]
    heads = [*COLUMNS, *(head for name in metrics for head in (name, "seeds", f"against {scored[0].name}"))]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    first = runs_of(study, scored[0])
    for recipe in scored:
        runs = runs_of(study, recipe)
        steps = " + ".join(f"{count:,}" for count in study.results["steps"][recipe.name])
        cells = [recipe.name, steps, f"{mean(run['seconds'] for run in runs.values()) / 60:.3g}"]
        for name in metrics:
            against = None if recipe is scored[0] else values_of(first, name)
            cells += score_cells(name, values_of(runs, name), against)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def score_cells(name: str, values: dict[int, float], first: dict[int, float] | None) -> list[str]:
    """Mean over seeds; lowest to highest; mean difference from the first recipe, over the seeds that both have.

    A difference is called within the seeds' spread where it is no larger than the wider one of the two recipes'.

    Args:
        name: of the score.
        values: by seed.
        first: the first recipe's; None for itself.
    """
    form = FORMATS[name].format
    low, high = min(values.values()), max(values.values())
    cells = [form(mean(values.values())), f"{form(low)} to {form(high)}" if len(values) > 1 else "one"]
    shared = [seed for seed in values if seed in (first or {})]
    if first is None or not shared:
        return [*cells, "-"]
    difference = mean(values[seed] - first[seed] for seed in shared)
    spread = max(high - low, max(first.values()) - min(first.values()))
    said = ("+" if difference >= 0 else "-") + form(abs(difference))
    if len(shared) > 1:
        said += ", within seeds" if abs(difference) <= spread else ", beyond seeds"
    return [*cells, said]


def runs_of(study: Study, recipe: Recipe) -> dict[int, dict[str, Any]]:
    """What is known of a recipe's finished runs, by seed."""
    runs = study.results["runs"]
    return {seed: runs[run_name(recipe, seed)] for seed in study.seeds if run_name(recipe, seed) in runs}


def values_of(runs: dict[int, dict[str, Any]], name: str) -> dict[int, float]:
    """A score by seed."""
    return {seed: run["scores"][name] for seed, run in runs.items()}


def phases(study: Study, recipe: Recipe, seed: int) -> Iterator[tuple[float, Path, list[tuple[int, float, float]]]]:
    """Of every phase of a run the minute that it began at, its folder, and (step, minute, loss) of its lines."""
    minute = 0.0
    for number in range(len(recipe.phases)):
        folder = study.folder / run_name(recipe, seed) / f"phase-{number + 1}"
        batch, last, begin, points = batch_of(folder), 0, minute, []
        for step, loss, speed in log_rows(folder):
            minute, last = minute + (step - last) * batch / speed / 60, step
            points.append((step, minute, loss))
        yield begin, folder, points


def plot(study: Study, path: Path) -> None:
    """Loss, and distance on the way where it was measured, over minutes of training; a colour a recipe."""
    from matplotlib.figure import Figure

    title, curves = "", []
    for number, recipe in enumerate(study.recipes):
        for seed in runs_of(study, recipe):
            losses, distances = [], []
            for begin, folder, points in phases(study, recipe, seed):
                losses += [(minute, loss) for _, minute, loss in points]
                scores, said = read_scores(folder)
                title = said or title
                at = {0: begin} | {step: minute for step, minute, _ in points}
                distances += [(at[max(known for known in at if known <= step)], scores[step]) for step in scores]
            curves.append(
                (f"C{number % 10}", recipe.name if seed == min(runs_of(study, recipe)) else None, losses, distances)
            )
    title = title.replace(study.terms.features, Path(study.terms.features).name)
    scored = any(distances for *_, distances in curves)
    figure = Figure(figsize=(11 if scored else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    for color, label, losses, distances in curves:
        axes[0].plot(*zip(*losses, strict=True), color=color, linewidth=1, label=label)
        if distances:
            axes[1].plot(*zip(*distances, strict=True), color=color, marker="o", linewidth=1, label=label)
    for axis, label in zip(axes, ("training loss", title), strict=False):
        axis.set(xlabel="minutes of training", ylabel=label, yscale="log")
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    # Losses of other terms may go below 0, where a logarithm ends; the first recipe's say what is to be seen.
    lowest = min(loss for _, loss in curves[0][2])
    if lowest > 0:
        axes[0].set_ylim(bottom=lowest / 2)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
