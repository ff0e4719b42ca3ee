"""Training runs side by side: loss, scores and speed.

    python eval/compare_runs.py runs/D-EMOv2-N-4-cifar10 runs/DiT-N-4-cifar10 --output comparison.png

Reads what a trainer left: `train_log.csv`, and scores, of `fid/` where it ran with --fid-every, or of a classifier's
`validation.csv`. Prints a table at each scored step (or at the last one) and draws the curves.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.files import written_whole


@dataclass(frozen=True)
class RunCurves:
    """What a run left.

    Attributes:
        name: its folder's name.
        losses: step -> mean loss since the line before.
        scores: step -> score, of the first metric, or top-1 accuracy in %.
        score_title: what to call it; empty without scores.
        images_per_second: of the last line.
    """

    name: str
    losses: dict[int, float]
    scores: dict[int, float]
    score_title: str
    images_per_second: float


def read_run(folder: Path) -> RunCurves:
    """Read a run's folder.

    Raises:
        ValueError: there is no log in it, or it is damaged.
    """
    log = folder / "train_log.csv"
    if not log.is_file():
        raise ValueError(f"{folder}: there is no train_log.csv; name folders that a trainer wrote.")
    rows = read_columns(log, "step", "loss", "images_per_second")
    if not rows:
        raise ValueError(f"{log} has no line yet; wait for the first, which --log-every of the trainer decides.")
    scores, score_title = read_scores(folder)
    return RunCurves(
        name=folder.name,
        losses={int(step): loss for step, loss, _ in rows},
        scores=scores,
        score_title=score_title,
        images_per_second=rows[-1][2],
    )


def read_columns(path: Path, *names: str) -> list[tuple[float, ...]]:
    """The numbers of a .csv file's columns, line by line.

    Raises:
        ValueError: it is damaged; the message names file and line.
    """
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows.append(tuple(float(row[name]) for name in names))
    except (ValueError, KeyError, TypeError, csv.Error) as error:  # also of text that is no UTF-8
        raise ValueError(
            f"{path}, line {len(rows) + 2} is damaged: it does not hold {', '.join(names)} as numbers."
        ) from error
    return rows


def read_scores(folder: Path) -> tuple[dict[int, float], str]:
    """Scores by step, and what they are; empty where nothing was scored."""
    validation = folder / "validation.csv"
    if validation.is_file():
        return {int(step): 100 * top1 for step, top1 in read_columns(validation, "step", "top1")}, "top-1 in %"
    from d_emo.eval.fid.report import load_entries
    from d_emo.eval.fid.scoring import TITLES, title

    entries = load_entries(folder / "fid", folder.name)
    metric = next((name for name in TITLES if entries and name in entries[-1].scores.values), "")
    scores = {entry.step: entry.scores.values[metric] for entry in entries if entry.step is not None}
    return scores, title(metric, entries[-1].extractor, entries[-1].count) if metric else ""


def table(runs: list[RunCurves]) -> str:
    """Score of every run at the steps that all of them have, with the loss last logged before."""
    steps = set.intersection(*(set(run.scores) or {max(run.losses)} for run in runs))
    lines = ["| step | " + " | ".join(f"{run.name}: loss | {run.score_title or 'score'}" for run in runs) + " |"]
    lines.append("|---" * (1 + 2 * len(runs)) + "|")
    for step in sorted(steps):
        cells = []
        for run in runs:
            logged = max((logged for logged in run.losses if logged <= step), default=min(run.losses))
            cells.append(f"{run.losses[logged]:.4f} | " + (f"{run.scores[step]:.4f}" if step in run.scores else "-"))
        lines.append(f"| {step:,} | {' | '.join(cells)} |")
    lines.append("images/s: " + ", ".join(f"{run.name} {run.images_per_second:.1f}" for run in runs))
    return "\n".join(lines)


def plot(runs: list[RunCurves], path: Path) -> None:
    """Loss on the left, scores on the right where there are some."""
    from matplotlib.figure import Figure

    scored = [run for run in runs if run.scores]
    figure = Figure(figsize=(11 if scored else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    for run in runs:
        axes[0].plot(list(run.losses), list(run.losses.values()), linewidth=1, label=run.name)
    for run in scored:
        axes[1].plot(list(run.scores), list(run.scores.values()), marker="o", label=run.name)
    for axis, label in zip(axes, ("training loss", scored[0].score_title if scored else ""), strict=False):
        axis.set(xlabel="optimizer step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend()
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


@command("compare_runs")
def main(arguments: list[str]) -> None:
    """Print the table, draw the curves."""
    parser = CommandParser("compare_runs", __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="Folders of training runs.")
    parser.add_argument("--output", type=Path, help="PNG to draw.")
    options = parser.parse_args(arguments)
    runs = [read_run(folder) for folder in options.runs]
    print(table(runs))
    if options.output:
        plot(runs, options.output)
        print(f"curves in {options.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
