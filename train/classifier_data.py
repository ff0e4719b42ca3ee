"""A classifier's images: those to train on and those to validate on, with one table of classes."""

from dataclasses import replace
from typing import Any

import numpy as np

from d_emo.images import ImageSource, first_line
from d_emo.train.classifier_config import ClassifierDataOptions
from d_emo.train.data import load_source

DIGITS_SHARE = 0.2


def load_sources(data: ClassifierDataOptions) -> tuple[ImageSource, ImageSource | None]:
    """The images to train on and those to validate on, with the same class ids.

    Raises:
        ValueError: either does not open, or their classes differ.
    """
    source = load_source(data)
    share = data.validation_share
    if data.validation_dir:
        return source, same_classes(load_source(_other(data, train_data_dir=data.validation_dir)), source)
    if data.validation_dataset:
        return source, same_classes(load_source(_other(data, dataset=data.validation_dataset)), source)
    if data.validation_split:
        other = _other(data, dataset=data.dataset, dataset_split=data.validation_split)
        return source, same_classes(load_source(other), source)
    if share is None:
        share = DIGITS_SHARE if not (data.dataset or data.train_data_dir) else 0.0
    return held_out(source, share) if share else (source, None)


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
    ids = {name: number for number, name in source.id2label.items()}
    unknown = [name for name in validation.id2label.values() if name not in ids]
    if unknown:
        raise ValueError(
            f"{validation.name}, to validate on, has classes that {source.name} does not have: "
            f"{', '.join(unknown[:5])}; they have {len(validation.id2label)} and {len(ids)}."
        )
    table = np.array([ids[validation.id2label[number]] for number in range(len(validation.id2label))])
    return replace(validation, labels=table[validation.labels], id2label=source.id2label)


def held_out(source: ImageSource, share: float) -> tuple[ImageSource, ImageSource]:
    """Split a source into two, each class by the same share; the same split every time.

    Raises:
        ValueError: it is a stream, or too small.
    """
    from sklearn.model_selection import train_test_split

    if source.stream is not None:
        raise ValueError(f"--validation-share {share:g}: a stream has no index; name other images to validate on.")
    try:
        parts = train_test_split(np.arange(source.size), test_size=share, random_state=0, stratify=source.labels)
    except ValueError as error:
        raise ValueError(f"--validation-share {share:g}: {first_line(error)}") from error
    train, held = (subset(source, np.sort(part)) for part in parts)
    return train, replace(held, name=f"{source.name}, held out")


def subset(source: ImageSource, indices: np.ndarray) -> ImageSource:
    """Some images of a source."""
    return replace(
        source, size=len(indices), read=lambda index: source.read(int(indices[index])), labels=source.labels[indices]
    )
