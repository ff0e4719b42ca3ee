"""A classifier's images: those to train on and those to validate on, with one table of classes."""

from dataclasses import replace
from typing import Any

import numpy as np

from d_emo.images.labels import class_name
from d_emo.images.source import HELD_OUT_SHARE, ImageSource, held_out
from d_emo.train.classification.config import ClassifierDataOptions
from d_emo.train.data.sources import load_source


def load_sources(data: ClassifierDataOptions) -> tuple[ImageSource, ImageSource | None]:
    """The images to train on and those to validate on, with the same class ids.

    Raises:
        ValueError: either does not open, or their classes differ.
    """
    source = load_source(data)
    share = data.validation_share
    for named, value, changes in (
        ("--validation-dir", data.validation_dir, {"train_data_dir": data.validation_dir}),
        ("--validation-dataset", data.validation_dataset, {"dataset": data.validation_dataset}),
        ("--validation-split", data.validation_split,
         {"dataset": data.dataset, "dataset_split": data.validation_split}),
    ):  # fmt: skip
        if not value:
            continue
        validation = load_source(_other(data, **changes), f"{named} {value}")
        try:
            return source, same_classes(validation, source)
        except ValueError as error:
            raise ValueError(f"{named} {value}: {error}") from error
    if share is None:
        share = HELD_OUT_SHARE if not (data.dataset or data.train_data_dir) else 0.0
    if not share:
        return source, None
    try:
        return held_out(source, share)
    except ValueError as error:
        raise ValueError(f"--validation-share {share:g}: {error}") from error


def _other(data: ClassifierDataOptions, **changes: Any) -> ClassifierDataOptions:
    """The same columns and names, of another source, read by index."""
    bare = {"dataset": None, "train_data_dir": None, "streaming": False, "validation_dir": None,
            "validation_dataset": None, "validation_split": None, "validation_share": None}  # fmt: skip
    return replace(data, **{**bare, **changes})


def same_classes(validation: ImageSource, source: ImageSource) -> ImageSource:
    """The validation images with the training images' class ids.

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
    return replace(validation, labels=table[validation.labels], id2label=source.id2label)
