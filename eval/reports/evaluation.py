"""What all evaluators of networks do beside predicting: the report's folder, the model, the data's name, tables."""

import argparse
import contextlib
import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from d_emo.common.command_line import flag
from d_emo.common.files import check_apart, check_writable, written_whole
from d_emo.common.messages import first_line
from d_emo.common.options import blamed
from d_emo.common.saved_folders import LOADING_ERRORS, evaluation_folder, refuse_other_tasks

# Options that name folders or files of data.
PLACES = ("data_dir", "mask_dir", "dataset")


def report_folder(options: argparse.Namespace) -> Path:
    """Where the report goes, found to be possible before a model is fetched.

    Raises:
        ValueError: it lies among the data, or nothing may be written there.
    """
    folder = Path(options.output_dir or evaluation_folder(options.model))
    check_apart(folder, "--output-dir", {flag(name): getattr(options, name, None) for name in PLACES})
    check_writable(folder, "--output-dir", folder=True)
    return folder


def load_model(name: str, kind: str, model: Any, processor: Any, **options: Any) -> tuple[Any, Any]:
    """A model of transformers and its processor.

    Args:
        name: folder or Hub id.
        kind: what it is loaded as, one of `saved_folders.TASKS`.
        model, processor: Auto classes.
        **options: of the processor.

    Raises:
        ValueError: it does not load, or is of another task.
    """
    with blamed(f"--model {name}"):
        refuse_other_tasks(name, kind)
    try:
        return model.from_pretrained(name), processor.from_pretrained(name, **options)
    except LOADING_ERRORS as error:
        raise ValueError(f"--model {name} does not load as {kind} ({first_line(error)}).") from error


@contextlib.contextmanager
def opening_data(options: argparse.Namespace) -> Iterator[None]:
    """Within it, what goes wrong is said of the data that the options name."""
    try:
        yield
    except ValueError as error:
        place = f"--data-dir {options.data_dir}" if options.data_dir else f"--dataset {options.dataset}"
        raise ValueError(f"{place}: {error}") from error


def write_table(path: Path, columns: Iterable[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, whole; names that are no text of UTF-8 are escaped."""
    with (
        written_whole(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
