"""WebDataset shards on a disk, read by index: tar files whose members `KEY.jpg` and `KEY.cls` make one sample.

The shards are listed once (headers only, plus the small label files) and the list is kept in the user's cache, so that
a sample is one seek and one read, in any order, with the same resume guarantees as a folder of images and a thousandth
of its files. The format: https://github.com/webdataset/webdataset.
"""

import glob
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from d_emo.common.files import cache_folder
from d_emo.images.labels import english_names
from d_emo.images.source import IMAGE_SUFFIXES, ImageSource, decode, default_resolution

LABEL_SUFFIXES = (".cls", ".json")
# Changes when the cached list does.
INDEX_FORMAT = 1


@dataclass(frozen=True)
class TarIndex:
    """Where each image is: shard number, offset and length in bytes, label; arrays of (N,), in the shards' order."""

    shards: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray


def expand_braces(pattern: str) -> list[str]:
    """WebDataset's numbered braces: `train-{0000..0127}.tar` as 128 names; others stay one.

    Raises:
        ValueError: the range is empty.
    """
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces is None:
        return [pattern]
    first, last = braces.groups()
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if not numbers:
        raise ValueError(f"{braces.group()} is empty; write the lower number first.")
    return [name for number in numbers for name in expand_braces(pattern.replace(braces.group(), number, 1))]


def expand_shards(pattern: str) -> list[Path]:
    """Files of a pattern of numbered braces and wildcards, in order.

    Raises:
        ValueError: one of its names has no file.
    """
    found = {
        name: [Path(path) for path in sorted(glob.glob(name))]  # noqa: PTH207, the pattern may be absolute
        for name in expand_braces(pattern)
    }
    missing = [name for name, paths in found.items() if not paths]
    if missing:
        raise ValueError(f"{len(missing)} of {len(found)} shards are missing, first {missing[0]}.")
    return [path for paths in found.values() for path in paths]


def tar_source(pattern: str, label_column: str | None = "cls", class_names: Sequence[str] | None = None) -> ImageSource:
    """Images of WebDataset shards.

    Args:
        pattern: see `expand_shards`.
        label_column: key of the label in `KEY.json` members; `KEY.cls` members hold the label itself. None where
            labels are not wanted.
        class_names: names by class id; by default the ids themselves, or the labels where these are words.

    Raises:
        ValueError: no shards, no images, no labels, a damaged shard, or a label without a name; the message says which.
    """
    paths = expand_shards(pattern)
    index, words = read_index(paths, label_column)

    def read(position: int) -> PIL.Image.Image:
        path = paths[index.shards[position]]
        with path.open("rb") as file:
            file.seek(index.offsets[position])
            content = file.read(index.lengths[position])
        return decode(io.BytesIO(content), f"{path}, image {position} at byte {index.offsets[position]}")

    labels, names = _named_labels(index.labels, words, class_names) if label_column else (index.labels, [])
    return ImageSource(
        name=re.sub(r"[-_]*\{.*?\}|[-_]*\*", "", Path(pattern).stem) or Path(pattern).parent.name,
        size=len(index.labels),
        read=read,
        labels=labels,
        id2label=dict(enumerate(english_names(names))),
        resolution=default_resolution(read, len(index.labels)),
    )


def _named_labels(
    labels: np.ndarray, words: list[str], class_names: Sequence[str] | None
) -> tuple[np.ndarray, list[str]]:
    """Class ids and names; `words` are the labels where they are no numbers."""
    if words:
        names = list(class_names or sorted(set(words)))
        ids = {name: number for number, name in enumerate(names)}
        unknown = sorted({word for word in words if word not in ids})
        if unknown:
            raise ValueError(f"label {unknown[0]!r} is not among the {len(names)} --class-names.")
        return np.array([ids[words[label]] for label in labels], dtype=np.int64), names
    names = list(class_names or map(str, range(int(labels.max()) + 1)))
    if labels.min() < 0 or labels.max() >= len(names):
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}, --class-names has {len(names)} names.")
    return labels, names


def read_index(paths: Sequence[Path], label_column: str | None) -> tuple[TarIndex, list[str]]:
    """The list of a set of shards, from the cache or by reading them, and the labels where they are words."""
    digest = hashlib.sha256(repr((INDEX_FORMAT, label_column)).encode())
    for path in paths:
        status = path.stat()
        digest.update(repr((str(path.resolve()), status.st_size, status.st_mtime_ns)).encode())
    cached = cache_folder() / "tar-index" / f"{digest.hexdigest()[:32]}.npz"
    if cached.is_file():
        with np.load(cached, allow_pickle=False) as stored:
            index = TarIndex(*(stored[name] for name in ("shards", "offsets", "lengths", "labels")))
            return index, stored["words"].tolist()
    index, words = _list_shards(paths, label_column)
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_name(f".partial-{os.getpid()}-{cached.name}")  # several processes may write the same
    with partial.open("wb") as file:
        np.savez(file, **vars(index), words=np.array(words, dtype=np.str_))
    partial.replace(cached)
    return index, words


def _list_shards(paths: Sequence[Path], label_column: str | None) -> tuple[TarIndex, list[str]]:
    rows: list[tuple[int, int, int]] = []
    labels: list[Any] = []
    for number, path in enumerate(paths):
        images: dict[str, tuple[int, int, int]] = {}
        found: dict[str, Any] = {}
        try:
            with tarfile.open(path, "r:") as archive:  # uncompressed: only then a member can be reached by its offset
                for member in archive:
                    key, dot, suffix = _split_name(member.name)
                    if not member.isfile() or not dot:
                        continue
                    if f".{suffix}" in IMAGE_SUFFIXES:
                        images[key] = (number, member.offset_data, member.size)
                    elif label_column and f".{suffix}" in LABEL_SUFFIXES:
                        label = _label(archive.extractfile(member).read(), suffix, label_column)  # type: ignore[union-attr]
                        if label is not None:
                            found[key] = label
                # The end of a tar file is a block of zeros; without it tarfile just stops.
                if path.stat().st_size < archive.offset + tarfile.BLOCKSIZE:
                    raise ValueError("its end is missing")
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a tar file of samples ({error}); it must be whole and not "
                             "compressed.") from error  # fmt: skip
        without = [key for key in images if label_column and key not in found]
        if without:
            raise ValueError(
                f"{path}: {len(without)} images have no label, first {without[0]}; expected {without[0]}.cls, or "
                f"{label_column!r} in {without[0]}.json (--label-column). Or train without classes: --unconditional."
            )
        rows += images.values()
        labels += [found.get(key, 0) for key in images]
    if not rows:
        raise ValueError("there are no images in these shards.")
    words: list[str] = []
    if any(isinstance(label, str) for label in labels):
        words = sorted({str(label) for label in labels})
        ids = {word: position for position, word in enumerate(words)}
        labels = [ids[str(label)] for label in labels]
    shards, offsets, lengths = np.array(rows, dtype=np.int64).T
    return TarIndex(shards, offsets, lengths, np.array(labels, dtype=np.int64)), words


def _split_name(name: str) -> tuple[str, str, str]:
    """WebDataset's rule: the key ends at the first dot of the file's own name."""
    folder, _, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return f"{folder}/{key}" if folder else key, dot, suffix.lower()


def _label(content: bytes, suffix: str, label_column: str) -> int | str | None:
    """The label of a `.cls` or `.json` member; None if the latter has none."""
    text = content.decode("utf-8").strip()
    value = text if suffix == "cls" else json.loads(text).get(label_column)
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?\d+", value) else value
    return None if value is None else int(value)
