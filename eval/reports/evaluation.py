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
from d_emo.common.packaged import is_packaged, model_place, packaged
from d_emo.common.saved_folders import LOADING_ERRORS, evaluation_folder, refuse_nobodys, refuse_other_tasks

# Options that name folders or files of data.
PLACES = ("data_dir", "mask_dir", "dataset")


def report_folder(options: argparse.Namespace, kind: str) -> Path:
    """Where the report goes, found to be possible before data are opened and a model is fetched.

    Args:
        options: of the command.
        kind: what `--model` is loaded as, one of `saved_folders.TASKS`.

    Raises:
        ValueError: the model is of another task, the report lies among the data, or nothing may be written there.
    """
    with blamed(f"--model {options.model}"):
        refuse_other_tasks(packaged(options.model) if is_packaged(options.model) else options.model, kind)
    folder = Path(options.output_dir or evaluation_folder(options.model))
    check_apart(folder, "--output-dir", {flag(name): getattr(options, name, None) for name in PLACES})
    check_writable(folder, "--output-dir", folder=True)
    return folder


def load_model(name: str, kind: str, model: Any, processor: Any, **options: Any) -> tuple[Any, Any]:
    """A model of transformers and its processor.

    Args:
        name: see `model_place`.
        kind: what it is loaded as, one of `saved_folders.TASKS`.
        model, processor: Auto classes.
        **options: of the processor.

    Raises:
        ValueError: it does not load.
    """
    place = model_place(name)
    try:
        refuse_nobodys(place)
        return model.from_pretrained(place), processor.from_pretrained(place, **options)
    except LOADING_ERRORS as error:
        raise ValueError(f"--model {name} does not load as {kind} ({first_line(error)}).") from error


@contextlib.contextmanager
def opening_data(options: argparse.Namespace) -> Iterator[None]:
    """Within it, what goes wrong is said of the data that the options name."""
    with blamed(f"--data-dir {options.data_dir}" if options.data_dir else f"--dataset {options.dataset}"):
        yield


def write_table(path: Path, columns: Iterable[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a CSV file, whole; names that are no text of UTF-8 are escaped."""
    with (
        written_whole(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
