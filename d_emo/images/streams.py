"""Data sets that are read as they come and never stored: of the Hub, parquet files, WebDataset shards, local or by URL.

The order of a stream is that of its shards, shuffled, and within them of a buffer, shuffled: a function of (seed,
epoch, process, number of processes), so that it can be continued exactly by reading up to the same place.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from d_emo.common.messages import first_line, printable
from d_emo.images.decode import UnreadableImageError, decode
from d_emo.images.labels import english_names
from d_emo.images.listing import hidden_path
from d_emo.images.source import EncodedImage, ImageSource, no_image, power_of_two_side
from d_emo.images.stored_labels import ClassNames
from d_emo.images.tables import (
    IMAGE_COLUMN,
    LABEL_COLUMN,
    WEBDATASET_JSON,
    WEBDATASET_LABEL,
    as_files,
    find_columns,
    load_dataset,
    source_name,
    stored_file,
)


@dataclass(frozen=True)
class DatasetStream:
    """A data set that is read from front to back; see `ImageStream`.

    Attributes:
        dataset: an undecoded `datasets.IterableDataset`.
        image_column: its images.
        label_column: its classes, or their key in KEY.json; None where they are not wanted.
        classes: their names.
        buffer_size: images from which the next one is drawn.
    """

    dataset: Any
    image_column: str
    label_column: str | None
    classes: ClassNames
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
        for row in _rows(share):
            key, stored = row.get("__key__"), row[self.image_column]
            if key and hidden_path(key):
                continue
            name = printable(str(key or (stored and stored["path"]) or "an image of the stream"))
            yield EncodedImage(stored_file(stored), self._label(row, name), name)

    def _label(self, row: dict[str, Any], name: str) -> int:
        if self.label_column is None:
            return 0
        try:
            return self.classes.id(row.get(self.label_column, (row.get(WEBDATASET_JSON) or {}).get(self.label_column)))
        except ValueError as error:
            raise ValueError(f"{name}: {error} (--class-names).") from None


def _rows(share: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from share
    except Exception as error:  # parsers of damaged files fail in any way
        raise ValueError(f"the stream cannot be read on ({printable(first_line(error))})") from error


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
    dataset = load_dataset(name, config, split, streaming=True)
    if dataset.features is None:
        raise ValueError("its files do not tell their columns' types; use parquet or WebDataset files.")
    in_json = not {label_column, WEBDATASET_LABEL} & {*dataset.features} and WEBDATASET_JSON in dataset.features
    image_column, found = find_columns(dataset.features, image_column, None if in_json else label_column)
    label_column = label_column if in_json else found
    feature = dataset.features.get(label_column)
    classes = ClassNames(getattr(feature, "names", None) or class_names or [])
    if label_column is not None and not classes.names:
        raise ValueError(
            f"column {label_column!r} has no class names, which a stream cannot collect by itself; pass "
            "--class-names FILE (one a line, or JSON; 'imagenet' for ImageNet's) or --unconditional."
        )
    dataset = as_files(dataset, image_column)
    split_info = (dataset.info.splits or {}).get(split)
    stream = DatasetStream(
        dataset=dataset,
        image_column=image_column,
        label_column=label_column,
        classes=classes,
        buffer_size=buffer_size,
    )
    try:
        first = next(_rows(dataset))[image_column]
        resolution = power_of_two_side(decode(stored_file(first), "the first image"))
    except StopIteration:
        raise ValueError("there are no images in it.") from None
    except UnreadableImageError:
        resolution = 256
    return ImageSource(
        name=source_name(name),
        size=getattr(split_info, "num_examples", 0) or 0,
        read=no_image(f"{name} is a stream"),
        labels=np.zeros(0, dtype=np.int64),
        id2label=dict(enumerate(english_names(classes.names))) if label_column is not None else {},
        resolution=resolution,
        stream=stream,
    )
