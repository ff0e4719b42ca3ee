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
    if data.validation_dir:
        other = _other(data, train_data_dir=data.validation_dir)
        return source, same_classes(load_source(other, f"--validation-dir {data.validation_dir}"), source)
    if data.validation_dataset:
        other = _other(data, dataset=data.validation_dataset)
        return source, same_classes(load_source(other, f"--validation-dataset {data.validation_dataset}"), source)
    if data.validation_split:
        other = _other(data, dataset=data.dataset, dataset_split=data.validation_split)
        return source, same_classes(load_source(other, f"--validation-split {data.validation_split}"), source)
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
            f"{validation.name}, to validate on, has classes that {source.name} does not have: "
            f"{', '.join(unknown[:5])}; they have {len(validation.id2label)} and {len(ids)}."
        )
    table = np.array([ids[names[number]] for number in range(len(names))])
    return replace(validation, labels=table[validation.labels], id2label=source.id2label)
