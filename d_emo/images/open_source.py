"""The source of images that a user names: class folders, shards, a dataset, or scikit-learn's digits."""

import functools
from pathlib import Path

from d_emo.common import checks
from d_emo.images.digits import digits_source
from d_emo.images.folders import folder_source
from d_emo.images.labels import read_class_names
from d_emo.images.shards import tar_source
from d_emo.images.source import ImageSource
from d_emo.images.streams import streamed_source
from d_emo.images.tables import datasets_source


def open_source(
    folder: str | None,
    dataset: str | None,
    *,
    config: str | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    class_names: str | None = None,
    unconditional: bool = False,
    stream_buffer: int | None = None,
) -> ImageSource:
    """Images that are read by index, or as a stream.

    Args:
        folder: of class folders; goes before `dataset`.
        dataset: Hub id, local dataset folder, .parquet file or .tar shards. With neither, scikit-learn's digits.
        config, split, image_column: of a dataset.
        label_column: of a dataset, or key of the shards' labels.
        class_names: of data that give classes by number: a file, or "imagenet".
        unconditional: classes are not wanted.
        stream_buffer: read the data set as it comes, each image drawn from so many; None for reading by index.

    Raises:
        ValueError: no images, no such folder, dataset or column; the message gives the remedy.
    """
    if folder is not None:
        return folder_source(Path(checks.text(folder, "folder")), unconditional)
    if dataset is None:
        return digits_source()
    dataset = checks.text(dataset, "dataset")
    column = None if unconditional else label_column
    names = read_class_names(class_names) if class_names else None
    if stream_buffer is None and dataset.endswith(".tar"):
        return tar_source(dataset, column, names)
    stream = functools.partial(streamed_source, buffer_size=stream_buffer or 1)
    read = datasets_source if stream_buffer is None else stream
    return read(dataset, config=config, split=split, image_column=image_column, label_column=column, class_names=names)
