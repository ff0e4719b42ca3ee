"""What a run scores on its way: a table, a line, curves."""

import csv
from collections.abc import Sequence
from pathlib import Path

from d_emo.common.files import written_whole
from d_emo.train.engine.log import LOG_FILE, append_row, truncate_log
from d_emo.train.engine.run import AnyRun

VALIDATION_FILE = "validation.csv"
CURVES = "curves.png"
# The one column that is no share.
LOSS = "loss"


def log_validation(run: AnyRun, names: Sequence[str], values: Sequence[float], text: str) -> None:
    """Say, write and track the scores of a step, and draw the curves; the main process calls this.

    Args:
        run: at that step.
        names: of the scores, the first the one that matters; "loss" is no share.
        values: the scores.
        text: the same for people.
    """
    path = run.output_dir / VALIDATION_FILE
    # No step has two rows, whatever a run that was continued left there.
    truncate_log(path, run.step - 1, ("step", *names))
    append_row(path, (run.step, *values))
    plot_validation(run.output_dir, run.plan.model_name)
    run.report(f"validation {text}")
    tracked = {f"validation_{name}": value for name, value in zip(names, values, strict=True)}
    run.accelerator.log(tracked, step=run.step)


def read_validation(folder: Path) -> list[dict[str, float]]:
    """The table of a run's folder, oldest first; empty where nothing was validated."""
    path = folder / VALIDATION_FILE
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def plot_validation(folder: Path, title: str) -> None:
    """Draw losses and validation scores against the step, `curves.png`."""
    from matplotlib.figure import Figure

    with (folder / LOG_FILE).open(newline="", encoding="utf-8") as file:
        training = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    validation = read_validation(folder)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    if training:
        left.plot(*zip(*training, strict=True), linewidth=1, label="training loss")
    if validation:
        steps = [row["step"] for row in validation]
        shares = [name for name in validation[0] if name not in ("step", LOSS)]
        if LOSS in validation[0]:
            left.plot(steps, [row[LOSS] for row in validation], marker=".", label="validation loss")
        for name in shares:
            right.plot(steps, [100 * row[name] for row in validation], marker=".", label=name)
        best, last = max(row[shares[0]] for row in validation), validation[-1][shares[0]]
        right.set_title(f"best {shares[0]} {best:.2%}, last {last:.2%}")
        right.legend()
    left.legend()
    left.set(xlabel="optimizer step", ylabel="loss", title=title)
    right.set(xlabel="optimizer step", ylabel="validation, %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with written_whole(folder / CURVES) as partial:
        figure.savefig(partial, format="png", dpi=120)
