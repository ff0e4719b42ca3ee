"""The data that the options name, as sources to train on and to validate on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from d_emo.common.files import check_apart
from d_emo.common.options import blamed
from d_emo.images.labels import class_name
from d_emo.images.latent_cache import latents_source
from d_emo.images.open_source import open_source
from d_emo.images.source import ImageSource, LabelledSource, held_out
from d_emo.train.data.options import FOLDERS, DataOptions, ValidationOptions

SourceT = TypeVar("SourceT", bound=LabelledSource)
OptionsT = TypeVar("OptionsT", bound=ValidationOptions)


def load_source(options: DataOptions, named: str | None = None) -> ImageSource:
    """Open the source that the options name.

    Args:
        options: of the data.
        named: how the user named it, for messages; None for the options' own names.

    Raises:
        ValueError: no images, no such folder, dataset or column; the message gives the remedy.
    """
    if options.train_data_dir:
        flag = f"--train-data-dir {options.train_data_dir}"
    elif options.dataset:
        flag = f"--dataset {options.dataset}"
    elif options.latents:
        flag = f"--latents {options.latents}"
    else:
        flag = "no data was named"
    with blamed(named or flag):
        source = _open_source(options)
        if options.on_bad_image == "stop":
            source.refuse_unreadable("Repair or remove them, or go on: --on-bad-image skip.")
    if options.unconditional:
        return replace(source, labels=np.zeros(len(source.labels), dtype=np.int64), id2label={})
    return source


def with_validation(
    data: OptionsT, source: SourceT, load: Callable[[OptionsT, str], SourceT], share: float | None
) -> tuple[SourceT, SourceT | None]:
    """What to train on and what to validate on, with the same class ids.

    Args:
        data: the options.
        source: the training data.
        load: opens other data, of changed options; and what the user called them.
        share: that is held out where no other data are named; None for none.

    Raises:
        ValueError: the validation data do not open, or their classes differ.
    """
    own: Any = data
    for named, value, changes in (
        ("--validation-dir", data.validation_dir, {"train_data_dir": data.validation_dir}),
        ("--validation-dataset", data.validation_dataset, {"dataset": data.validation_dataset}),
        ("--validation-split", data.validation_split,
         {"dataset": own.dataset, "dataset_split": data.validation_split}),
    ):  # fmt: skip
        if not value:
            continue
        validation = load(_other(data, changes), f"{named} {value}")
        with blamed(f"{named} {value}"):
            return source, same_classes(validation, source)
    if not share:
        return source, None
    with blamed(f"--validation-share {share:g}"):
        return held_out(source, share)


def _other(data: OptionsT, changes: dict[str, Any]) -> OptionsT:
    """The same columns and names, of another source, read by index."""
    bare = {"dataset": None, "train_data_dir": None, "validation_dir": None, "validation_dataset": None,
            "validation_split": None, "validation_share": None}  # fmt: skip
    if hasattr(data, "streaming"):
        bare["streaming"] = False  # type: ignore[assignment]
    other: Any = {**bare, **changes}
    return replace(data, **other)


def same_classes(validation: SourceT, source: LabelledSource) -> SourceT:
    """The validation data with the training data's class ids.

    Raises:
        ValueError: it has a class that was not trained.
    """
    if validation.id2label == source.id2label:
        return validation
    ids = {class_name(name): number for number, name in source.id2label.items()}
    names = {number: class_name(name) for number, name in validation.id2label.items()}
    unknown = [name for name in names.values() if name not in ids]
    if unknown:
        raise ValueError(
            f"{validation.name} has classes that {source.name}, which is trained on, does not have: "
            f"{', '.join(unknown[:5])}; they have {len(validation.id2label)} and {len(ids)}. Remove those classes, or "
            "train on them, too."
        )
    table = np.array([ids[names[number]] for number in range(len(names))])
    changed: Any = {"labels": table[validation.labels], "id2label": source.id2label}
    return replace(validation, **changed)


def check_output(data: Any, folder: Path) -> None:
    """Refuse an output folder among the pictures.

    Raises:
        ValueError: it lies in a folder that the options of data name.
    """
    check_apart(folder, "--output-dir", {f"--{name.replace('_', '-')}": getattr(data, name, None) for name in FOLDERS})


def _open_source(options: DataOptions) -> ImageSource:
    if options.latents:
        return latents_source(Path(options.latents))
    return open_source(
        options.train_data_dir,
        options.dataset,
        config=options.dataset_config,
        split=options.dataset_split,
        image_column=options.image_column,
        label_column=options.label_column,
        class_names=options.class_names,
        unconditional=options.unconditional,
        stream_buffer=options.stream_buffer if options.streaming else None,
    )
