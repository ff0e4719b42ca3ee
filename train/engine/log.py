"""The log of a run: a line on the screen, in `train_log.csv` and to the tracker."""

import contextlib
import csv
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from d_emo.common.files import appended, written_whole
from d_emo.common.output import duration
from d_emo.train.engine.run import AnyRun

LOG_FILE = "train_log.csv"
# `seconds` is the time that the run took so far, with that before it was interrupted and without that between.
LOG_COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "images_per_second", "seconds")


def log_progress(run: AnyRun, grad_norm: float) -> None:
    """Write the mean loss since the last line, over all processes, to screen, log file and tracker."""
    images_per_second = len(run.window) * run.plan.layout.global_batch_size / run.seconds
    loss = float(run.accelerator.reduce(torch.stack(run.window).mean(), reduction="mean"))
    more = {name: float(run.accelerator.reduce(value, reduction="mean")) for name, value in run.logged().items()}
    published = run.published.mean(run.step - len(run.window), run.step) if run.published else None
    run.window.clear()
    run.seconds = 0.0
    if not run.accelerator.is_main_process:
        return
    rate = float(run.lr_schedule.get_last_lr()[0])
    remaining = (run.plan.max_train_steps - run.step) * run.plan.layout.global_batch_size / images_per_second
    run.report(
        f"loss {loss:.4f}"
        + (f" ({', '.join(f'{name} {value:.4f}' for name, value in more.items())})" if more else "")
        + (f" ({loss / published:.3f} of the published)" if published else "")
        + f", gradient norm {grad_norm:.3f}, learning rate {rate:.2e}, "
        f"{images_per_second:.1f} images/s, {duration(run.elapsed)} elapsed, {duration(remaining)} left"
    )
    values = (run.step, loss, grad_norm, rate, images_per_second, round(run.elapsed, 3))
    append_row(run.output_dir / LOG_FILE, values)
    tracked = dict(zip(LOG_COLUMNS[1:], values[1:], strict=True)) | more
    run.accelerator.log(tracked | ({"published_loss": published} if published else {}), step=run.step)


def truncate_log(path: Path, step: int, columns: Sequence[str] = LOG_COLUMNS) -> None:
    """Keep the header and the rows up to `step`: a resumed run writes the rest again. Damaged rows go.

    Rows of an older version, which had fewer columns, get empty ones.
    """
    header, *rows = _rows(path) or [[]]
    kept = [
        row + [""] * (len(columns) - len(row)) for row in rows if _is_whole(row, len(header)) and int(row[0]) <= step
    ]
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *kept])


def _is_whole(row: Sequence[str], columns: int) -> bool:
    """Whether a row of a log has a step and numbers, or nothing, in its other columns."""
    if len(row) != columns or not re.fullmatch("[0-9]{1,18}", row[0]):
        return False
    try:
        return all(math.isfinite(float(value or 0)) for value in row)
    except ValueError:
        return False


def seconds_so_far(path: Path) -> float:
    """What the last row of a log says that the run took; 0 without one, or in a log of an older version."""
    header, *rows = _rows(path) or [[]]
    with contextlib.suppress(ValueError, IndexError):
        return float(rows[-1][header.index("seconds")])
    return 0.0


def append_row(path: Path, values: Sequence[Any]) -> None:
    """Write a line at the end of a log."""
    with appended(path) as file:
        csv.writer(file).writerow(values)


def _rows(path: Path) -> list[list[str]]:
    """The lines of a log as far as they can be read; what is damaged in it does not keep a run from going on."""
    rows: list[list[str]] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8", errors="replace") as file, contextlib.suppress(csv.Error):
            rows.extend(csv.reader(file))
    return rows
