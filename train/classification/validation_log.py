"""A classifier's accuracy on its way: a table, a line, a curve."""

import csv
from pathlib import Path

from d_emo.common.files import written_whole
from d_emo.eval.classification.accuracy import Predictions
from d_emo.train.engine.log import LOG_FILE, append_row, truncate_log
from d_emo.train.engine.run import TrainingRun

VALIDATION_FILE = "validation.csv"
CURVES = "curves.png"
VALIDATION_COLUMNS = ("step", "top1", "top5", "loss")


def log_validation(run: TrainingRun, predictions: Predictions) -> None:
    """Say, write and track the scores of a step, and draw the curve; every process calls this."""
    if not run.accelerator.is_main_process:
        return
    path = run.output_dir / VALIDATION_FILE
    truncate_log(path, run.step - 1, VALIDATION_COLUMNS)  # a finished run that is resumed scores its last step again
    values = (run.step, predictions.accuracy(1), predictions.accuracy(5), predictions.loss)
    append_row(path, values)
    plot_validation(run.output_dir, run.plan.model_name)
    label, share = predictions.hardest()
    run.report(
        f"validation top-1 {values[1]:.2%}, top-5 {values[2]:.2%}, loss {values[3]:.4f} "
        f"({len(predictions.labels):,} images, averaged weights), hardest {run.plan.source.id2label[label]} {share:.1%}"
    )
    tracked = {f"validation_{name}": value for name, value in zip(VALIDATION_COLUMNS[1:], values[1:], strict=True)}
    run.accelerator.log(tracked, step=run.step)


def read_validation(folder: Path) -> list[dict[str, float]]:
    """The table of a run's folder, oldest first; empty where nothing was validated."""
    path = folder / VALIDATION_FILE
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def plot_validation(folder: Path, title: str) -> None:
    """Draw training loss and validation accuracy against the step, `curves.png`."""
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
        left.plot(steps, [row["loss"] for row in validation], marker=".", label="validation loss")
        best = max(row["top1"] for row in validation)
        for name, label in (("top1", "top-1"), ("top5", "top-5")):
            right.plot(steps, [100 * row[name] for row in validation], marker=".", label=label)
        right.set_title(f"best top-1 {best:.2%}, last {validation[-1]['top1']:.2%}")
        right.legend()
    left.legend()
    left.set(xlabel="optimizer step", ylabel="loss", title=title)
    right.set(xlabel="optimizer step", ylabel="accuracy in %")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with written_whole(folder / CURVES) as partial:
        figure.savefig(partial, format="png", dpi=120)
