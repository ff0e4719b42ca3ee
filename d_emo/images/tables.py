"""Tables of pictures that the package `datasets` opens, read by index. `streams` reads the same as they come."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from d_emo.common import checks
from d_emo.common.messages import first_line
from d_emo.images.decode import decode
from d_emo.images.labels import english_names
from d_emo.images.shards import expand_braces
from d_emo.images.source import ImageSource, default_resolution
from d_emo.images.stored_labels import class_ids, describe_gaps, no_classes

# Columns that are taken where the user named none and the usual ones are missing: by name, then by type.
IMAGE_COLUMN, VIDEO_COLUMN, LABEL_COLUMN = "image", "video", "label"
WEBDATASET_LABEL, WEBDATASET_JSON = "cls", "json"
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}


def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
    """What `datasets` makes of a Hub id, a folder or files.

    Raises:
        ValueError: it cannot be opened.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError("data sets need the datasets package; pip install 'd-emo[train]'.") from error
    name = checks.text(name, "dataset")
    try:
        builder = BUILDERS.get(Path(name).suffix)
        if builder is not None:
            files = {split: expand_braces(name)}
            return datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming)
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # parsers of damaged files fail in any way
        if "invalid literal for int()" in str(error):
            raise ValueError(
                "its KEY.cls members hold words, where a stream takes numbers; write words to KEY.json, or read the "
                "shards without --streaming."
            ) from error
        raise ValueError(
            f"cannot be opened ({first_line(error)}). It is looked for as a local path, then on the Hub; when "
            "offline, pass a .parquet file or a folder."
        ) from error


def find_columns(
    features: Any, image_column: str, label_column: str | None, default: str = IMAGE_COLUMN
) -> tuple[str, str | None]:
    """The columns of images, or videos, and labels: as named, or what stands for a missing default.

    Args:
        features: of the table.
        image_column, label_column: as named.
        default: IMAGE_COLUMN or VIDEO_COLUMN, which says what is looked for.

    Raises:
        ValueError: a named column is missing, or several could be meant.
    """
    images = [name for name, feature in features.items() if isinstance(feature, _feature(default))]
    classes = [name for name, feature in features.items() if getattr(feature, "names", None)]
    if image_column == default and default not in features and len(images) == 1:
        image_column = images[0]
    if label_column == LABEL_COLUMN and LABEL_COLUMN not in features:
        if WEBDATASET_LABEL in features:
            label_column = WEBDATASET_LABEL
        elif len(classes) == 1:
            label_column = classes[0]
    for column in [image_column] + ([] if label_column is None else [label_column]):
        if column not in features:
            without = " (or --unconditional)" if default == IMAGE_COLUMN else ""
            flag = f"--{default}-column" if column == image_column else f"--label-column{without}"
            raise ValueError(f"no column {column!r} among {', '.join(features)}; set {flag}.")
    return image_column, label_column


def source_name(name: str) -> str:
    """What to call a data set: of the Hub by its id, a file or folder by its own name."""
    if Path(name).is_dir():
        return Path(name).resolve().name
    return Path(name).stem if Path(name).suffix in BUILDERS else name.replace("/", "--")


def stored_file(stored: Any) -> Any:
    """What to open of an undecoded image: its bytes, or the path where it lies; None where there is nothing."""
    if not isinstance(stored, Mapping):
        return None
    return stored.get("path") if stored.get("bytes") is None else io.BytesIO(stored["bytes"])


def _feature(default: str) -> type:
    """The type of columns that `datasets` has for images or videos."""
    import datasets

    return {IMAGE_COLUMN: datasets.Image, VIDEO_COLUMN: datasets.Video}[default]


def as_files(data: Any, column: str, default: str = IMAGE_COLUMN) -> Any:
    """A table or stream whose images, or videos, stay files.

    Raises:
        ValueError: the column holds something else.
    """
    try:
        return data.cast_column(column, _feature(default)(decode=False))
    except Exception as error:
        held = f"{data.features[column]}, not {'pictures' if default == IMAGE_COLUMN else 'videos'}"
        raise ValueError(f"column {column!r} holds {held} ({first_line(error)}); set --{default}-column.") from error


def labelled_table(
    name: str,
    *,
    config: str | None,
    split: str,
    column: str,
    label_column: str | None,
    class_names: Sequence[str] | None,
    default: str = IMAGE_COLUMN,
) -> tuple[Any, str, np.ndarray, list[str]]:
    """A table, its column of images or videos, class ids (N,) and names; see `datasets_source` and `find_columns`.

    Raises:
        ValueError: it cannot be opened, is empty, or lacks a column or labels.
    """
    table = load_dataset(name, config, split, streaming=False)
    column, label_column = find_columns(table.features, column, label_column, default)
    if not len(table):
        raise ValueError(f"the split {split!r} is empty.")
    labels, names = no_classes(len(table))
    if label_column is not None:
        stored_names = getattr(table.features[label_column], "names", None)
        values = table.select_columns([label_column]).with_format("arrow")[:][label_column].to_pylist()
        labels, names = class_ids(values, stored_names or class_names, lambda row: f"split {split!r}, row {row}")
    return table, column, labels, names


def datasets_source(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    image_column: str = IMAGE_COLUMN,
    label_column: str | None = LABEL_COLUMN,
    class_names: Sequence[str] | None = None,
) -> ImageSource:
    """Anything that `datasets.load_dataset` reads into a table.

    Args:
        name: Hub id, local dataset folder, or .parquet file.
        config: configuration name of a Hub dataset.
        split: split of the dataset.
        image_column: column of images; where "image" is missing, the only one of that type.
        label_column: column of classes, likewise; None where they are not wanted.
        class_names: names by class id, where the column has none itself.

    Raises:
        ValueError: it cannot be opened, is empty, or lacks a column or labels.
    """
    table, image_column, labels, names = labelled_table(
        name, config=config, split=split, column=image_column, label_column=label_column, class_names=class_names
    )
    images = as_files(table.select_columns([image_column]), image_column)

    def read(index: int) -> PIL.Image.Image:
        stored = images[index][image_column]
        path = f" ({stored['path']})" if stored and stored["path"] else ""
        return decode(stored_file(stored), f"{name}, row {index}{path}")

    return ImageSource(
        name=source_name(name),
        size=len(table),
        read=read,
        labels=labels,
        id2label=dict(enumerate(english_names(names))),
        resolution=default_resolution(read, len(table)),
        files=[Path(name)] if Path(name).is_file() else (),
        note=describe_gaps(names),
    )
