"""Images of anything that the package `datasets` opens: whole tables read by index, or streams read as they come.

A stream reads a Hub data set, parquet files or WebDataset shards on a disk or behind URLs without storing them. Its
order is that of its shards, shuffled, and within them of a buffer, shuffled: a function of (seed, epoch, process,
number of processes), so that it can be continued exactly by reading up to the same place.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from d_emo.images.labels import english_names
from d_emo.images.source import (
    EncodedImage,
    ImageSource,
    UnreadableImageError,
    decode,
    default_resolution,
    first_line,
    no_image,
    power_of_two_side,
)
from d_emo.images.tar_source import expand_braces

# Columns that are taken where the user named none and the usual ones are missing: by name, then by type.
IMAGE_COLUMN, LABEL_COLUMN = "image", "label"
WEBDATASET_LABEL = "cls"
BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}


def _load(name: str, config: str | None, split: str, streaming: bool) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError("data sets need the datasets package; pip install 'd-emo[train]'.") from error
    try:
        builder = BUILDERS.get(Path(name).suffix)
        if builder is not None:
            files = {split: expand_braces(name)}
            return datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming)
        return datasets.load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"cannot be opened ({first_line(error)}). It is looked for as a local path, then on the Hub; when "
            "offline, pass a .parquet file or a folder."
        ) from error


def _columns(features: Any, image_column: str, label_column: str | None) -> tuple[str, str | None]:
    """The columns of images and labels: as named, or what stands for a missing default.

    Raises:
        ValueError: a named column is missing, or several could be meant.
    """
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    classes = [name for name, feature in features.items() if hasattr(feature, "names")]
    if image_column == IMAGE_COLUMN and IMAGE_COLUMN not in features and len(images) == 1:
        image_column = images[0]
    if label_column == LABEL_COLUMN and LABEL_COLUMN not in features:
        if WEBDATASET_LABEL in features:
            label_column = WEBDATASET_LABEL
        elif len(classes) == 1:
            label_column = classes[0]
    for column in [image_column] + ([] if label_column is None else [label_column]):
        if column not in features:
            flag = "--image-column" if column == image_column else "--label-column (or --unconditional)"
            raise ValueError(f"no column {column!r} among {', '.join(features)}; set {flag}.")
    return image_column, label_column


def _source_name(name: str) -> str:
    return Path(name).stem if Path(name).suffix in BUILDERS else name.replace("/", "--")


def _binary(stored: dict[str, Any]) -> Any:
    """What to open of an undecoded image: its bytes, or the path where it lies."""
    return io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]


def datasets_source(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    image_column: str = IMAGE_COLUMN,
    label_column: str | None = LABEL_COLUMN,
) -> ImageSource:
    """Anything that `datasets.load_dataset` reads into a table.

    Args:
        name: Hub id, local dataset folder, or .parquet file.
        config: configuration name of a Hub dataset.
        split: split of the dataset.
        image_column: column of images; where "image" is missing, the only one of that type.
        label_column: column of classes, likewise; None where they are not wanted.

    Raises:
        ValueError: it cannot be opened, is empty, or lacks a column or labels.
    """
    table = _load(name, config, split, streaming=False)
    image_column, label_column = _columns(table.features, image_column, label_column)
    if not len(table):
        raise ValueError(f"the split {split!r} is empty.")
    labels, names = _table_labels(table, label_column, split)
    images = table.select_columns([image_column])
    images = images.cast_column(image_column, _undecoded())

    def read(index: int) -> PIL.Image.Image:
        stored = images[index][image_column]
        return decode(_binary(stored), f"{name}, row {index}" + (f" ({stored['path']})" if stored["path"] else ""))

    return ImageSource(
        name=_source_name(name),
        size=len(table),
        read=read,
        labels=labels,
        id2label=dict(enumerate(english_names(names))),
        resolution=default_resolution(read, len(table)),
    )


def _undecoded() -> Any:
    import datasets

    return datasets.Image(decode=False)


def _table_labels(table: Any, label_column: str | None, split: str) -> tuple[np.ndarray, list[str]]:
    if label_column is None:
        return np.zeros(len(table), dtype=np.int64), []
    feature = table.features[label_column]
    column = table.with_format("numpy").select_columns([label_column])[:][label_column]
    if hasattr(feature, "names"):
        labels, names = column, list(feature.names)
    else:
        values, labels = np.unique(column, return_inverse=True)
        names = [str(value) for value in values]
    if labels.min() < 0:
        raise ValueError(
            f"split {split!r} has samples without a label (-1); choose a labelled split or --unconditional."
        )
    return labels.astype(np.int64), names


@dataclass(frozen=True)
class DatasetStream:
    """A data set that is read from front to back; see `ImageStream`.

    Attributes:
        dataset: an undecoded `datasets.IterableDataset`.
        image_column: its images.
        label_column: its classes; None where they are not wanted.
        ids: class id by label, for labels that are no ids.
        num_classes: classes that there are names for.
        buffer_size: images from which the next one is drawn.
    """

    dataset: Any
    image_column: str
    label_column: str | None
    ids: dict[str, int]
    num_classes: int
    buffer_size: int

    @property
    def num_shards(self) -> int:
        """Files that it is dealt out by; best a multiple of the processes."""
        return self.dataset.num_shards

    def epoch(self, seed: int, epoch: int, rank: int, world_size: int) -> Iterator[EncodedImage]:
        """See `ImageStream.epoch`."""
        from datasets.distributed import split_dataset_by_node

        shuffled = self.dataset.shuffle(seed=seed % 2**32, buffer_size=self.buffer_size)
        share = split_dataset_by_node(shuffled, rank=rank, world_size=world_size)
        share.set_epoch(epoch)
        for row in share:
            stored = row[self.image_column]
            name = row.get("__key__") or stored["path"] or "an image of the stream"
            yield EncodedImage(_binary(stored), self._label(row, name), str(name))

    def _label(self, row: dict[str, Any], name: str) -> int:
        if self.label_column is None:
            return 0
        value = row[self.label_column]
        label = self.ids.get(str(value), -1) if isinstance(value, str) else int(value)
        if not 0 <= label < self.num_classes:
            raise ValueError(f"{name}: label {value!r} is none of the {self.num_classes} classes (--class-names).")
        return label


def streamed_source(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    image_column: str = IMAGE_COLUMN,
    label_column: str | None = LABEL_COLUMN,
    class_names: Sequence[str] | None = None,
    buffer_size: int = 10_000,
) -> ImageSource:
    """A data set that is read as it comes, never stored.

    Args:
        name: Hub id, or .parquet or .tar (WebDataset) files: paths or URLs, with wildcards or `{0000..0127}`.
        config, split, image_column, label_column: as of `datasets_source`; WebDataset's label is "cls".
        class_names: names by class id, where the data set has none itself.
        buffer_size: images in memory from which the next one is drawn.

    Raises:
        ValueError: it cannot be opened, lacks a column, class names or readable images.
    """
    dataset = _load(name, config, split, streaming=True)
    if dataset.features is None:
        raise ValueError("its files do not tell their columns' types; use parquet or WebDataset files.")
    image_column, label_column = _columns(dataset.features, image_column, label_column)
    feature = dataset.features.get(label_column)
    names = list(getattr(feature, "names", None) or class_names or [])
    if label_column is not None and not names:
        raise ValueError(
            f"column {label_column!r} has no class names, which a stream cannot collect by itself; pass "
            "--class-names FILE (one a line, or JSON; 'imagenet' for ImageNet's) or --unconditional."
        )
    dataset = dataset.cast_column(image_column, _undecoded())
    split_info = (dataset.info.splits or {}).get(split)
    stream = DatasetStream(
        dataset=dataset,
        image_column=image_column,
        label_column=label_column,
        ids={label: number for number, label in enumerate(names)},
        num_classes=len(names),
        buffer_size=buffer_size,
    )
    try:
        first = next(iter(dataset))[image_column]
        resolution = power_of_two_side(decode(_binary(first), "the first image"))
    except StopIteration:
        raise ValueError("there are no images in it.") from None
    except UnreadableImageError:
        resolution = 256
    return ImageSource(
        name=_source_name(name),
        size=getattr(split_info, "num_examples", 0) or 0,
        read=no_image(f"{name} is a stream"),
        labels=np.zeros(0, dtype=np.int64),
        id2label=dict(enumerate(english_names(names))) if label_column is not None else {},
        resolution=resolution,
        stream=stream,
    )
