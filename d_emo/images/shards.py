"""WebDataset shards on a disk, read by index: tar files whose members `KEY.jpg` and `KEY.cls` make one sample.

The shards are listed once (headers only, plus the small label files) and the list is kept in the user's cache, so that
a sample is one seek and one read, in any order, with the same resume guarantees as a folder of images and a thousandth
of its files. The format: https://github.com/webdataset/webdataset.
"""

import collections
import contextlib
import copy
import glob
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from d_emo.common import checks
from d_emo.common.files import cache_folder, remove, written_whole
from d_emo.common.messages import first_line, own_line, printable
from d_emo.images.decode import decode
from d_emo.images.labels import english_names
from d_emo.images.listing import HIDDEN, describe_left_out, hidden_path, picture_suffixes
from d_emo.images.source import ImageSource, default_resolution
from d_emo.images.stored_labels import class_ids, describe_gaps, no_classes

LABEL_SUFFIXES = (".cls", ".json")
DEFAULT_LABEL_COLUMNS = ("cls", "label")
MAX_LABEL_BYTES = 2**24
MAX_SHARDS = 10**6
# Changes when the cached list does.
INDEX_FORMAT = 3


@dataclass(frozen=True)
class TarIndex:
    """Where each image is, and its class, in the shards' order.

    Attributes:
        shards, offsets, lengths: (N,) number of the shard, place and length in it in bytes.
        labels: (N,) class ids; zeros where classes are not wanted.
        names: class names by id.
        note: what was left out, for people.
    """

    shards: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    names: np.ndarray
    note: np.ndarray


def expand_braces(pattern: str) -> list[str]:
    """WebDataset's numbered braces: `train-{0000..0127}.tar` as 128 names; others stay one.

    Raises:
        ValueError: the range is empty, or longer than any data set.
    """
    pattern = checks.text(pattern, "pattern")
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if braces is None:
        return [pattern]
    first, last = braces.groups()
    if int(last) - int(first) >= MAX_SHARDS:
        raise ValueError(f"{braces.group()} stands for more than {MAX_SHARDS:,} files; name those that there are.")
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
    index = read_index(paths, label_column, class_names)

    def read(position: int) -> PIL.Image.Image:
        path = paths[index.shards[position]]
        with path.open("rb") as file:
            file.seek(index.offsets[position])
            content = file.read(index.lengths[position])
        return decode(io.BytesIO(content), f"{path}, image {position} at byte {index.offsets[position]}")

    return ImageSource(
        name=re.sub(r"[-_]*\{.*?\}|[-_]*\*", "", Path(pattern).stem) or Path(pattern).parent.name,
        size=len(index.labels),
        read=read,
        labels=index.labels,
        id2label=dict(enumerate(english_names(index.names.tolist()))),
        resolution=default_resolution(read, len(index.labels)),
        files=paths,
        note=str(index.note),
    )


def read_index(paths: Sequence[Path], label_column: str | None, class_names: Sequence[str] | None) -> TarIndex:
    """The list of a set of shards, from the cache or by reading them."""
    digest = hashlib.sha256(repr((INDEX_FORMAT, label_column, class_names)).encode())
    for path in paths:
        status = path.stat()
        digest.update(repr((str(path.resolve()), status.st_size, status.st_mtime_ns)).encode())
    cached = cache_folder() / "tar-index" / f"{digest.hexdigest()[:32]}.npz"
    if cached.is_file():
        with contextlib.suppress(Exception), np.load(cached, allow_pickle=False) as stored:  # made again if damaged
            return _checked(TarIndex(**{part.name: stored[part.name] for part in fields(TarIndex)}), len(paths))
    index = _list_shards(paths, label_column, class_names)
    with contextlib.suppress(OSError):  # what cannot be kept is made again
        cached.parent.mkdir(parents=True, exist_ok=True)
        if cached.is_dir():
            remove(cached)
        with written_whole(cached) as partial, partial.open("wb") as file:
            np.savez(file, **vars(index))
    return index


def _checked(index: TarIndex, shards: int) -> TarIndex:
    """A list that was kept.

    Raises:
        ValueError: it is none of so many shards.
    """
    rows = [index.shards, index.offsets, index.lengths, index.labels]
    if not all(part.dtype == np.int64 and part.shape == rows[0].shape and part.ndim == 1 for part in rows):
        raise ValueError("no columns of one length")
    last_label = max(0, len(index.names) - 1)
    if not (len(rows[0]) and min(map(np.min, rows)) >= 0 and index.shards.max() < shards
            and index.labels.max() <= last_label and index.names.dtype.kind == "U"):  # fmt: skip
        raise ValueError("places or classes that are not there")
    return index


@dataclass
class _Shard:
    """What is found in a shard: pictures (offset, length) and labels by the samples' keys, and what was left out."""

    path: Path
    pictures: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)
    suffixes: dict[str, str] = field(default_factory=dict)
    left_out: collections.Counter = field(default_factory=collections.Counter)


def _list_shards(paths: Sequence[Path], label_column: str | None, class_names: Sequence[str] | None) -> TarIndex:
    rows: list[tuple[int, int, int]] = []
    labels: list[Any] = []
    keys: list[str] = []
    left_out: collections.Counter = collections.Counter()
    for number, path in enumerate(paths):
        shard = _list_shard(path, label_column)
        without = [key for key in shard.pictures if label_column and key not in shard.labels]
        if without:
            first = printable(without[0])
            raise ValueError(
                f"{path}: {len(without)} images have no label, first {first}; expected {first}.cls, or "
                f"{label_column!r} in {first}.json (--label-column). Or train without classes: --unconditional."
            )
        rows += [(number, *place) for place in shard.pictures.values()]
        labels += [shard.labels.get(key) for key in shard.pictures]
        keys += [f"{path}: {printable(key)}" for key in shard.pictures]
        left_out += shard.left_out
    if not rows:
        raise ValueError("there are no images in these shards.")
    shards, offsets, lengths = np.array(rows, dtype=np.int64).T
    ids, names = class_ids(labels, class_names, keys.__getitem__) if label_column else no_classes(len(rows))
    note = "; ".join(part for part in (describe_gaps(names), describe_left_out(left_out)) if part)
    return TarIndex(shards, offsets, lengths, ids, np.array(names, dtype=np.str_), np.array(note))


def _list_shard(path: Path, label_column: str | None) -> _Shard:
    shard = _Shard(path)
    try:
        with tarfile.open(path, "r:") as archive:  # uncompressed: only then a member can be reached by its offset
            for member in archive:
                _note_member(archive, member, shard, label_column)
            # The end of a tar file is a block of zeros; without it tarfile just stops.
            if path.stat().st_size < archive.offset + tarfile.BLOCKSIZE:
                raise ValueError("its end is missing")
    except Exception as error:  # damaged headers and labels fail in any way
        raise ValueError(
            f"{path} cannot be read as a tar file of samples ({printable(own_line(error))}); it must be whole and "
            "not compressed."
        ) from error
    return shard


def _note_member(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: _Shard, label_column: str | None) -> None:
    """Take a member as a picture or a label, or leave it out."""
    key, dot, suffix = _split_name(member.name)
    if member.isdir():
        return
    if hidden_path(member.name):
        shard.left_out[HIDDEN] += 1
    elif member.islnk() and dot:  # GNU tar stores a file with two names once
        target = archive.getmember(member.linkname)
        if target.isreg() and not target.issparse():
            target = copy.copy(target)
            target.name = member.name
            _note_member(archive, target, shard, label_column)
    elif not member.isreg() or member.issparse():
        shard.left_out["links or special members"] += 1
    elif dot and f".{suffix}" in picture_suffixes():
        if key in shard.pictures and shard.suffixes[key] != suffix:
            raise ValueError(f"{key} has two pictures, .{shard.suffixes[key]} and .{suffix}")
        shard.pictures[key], shard.suffixes[key] = (member.offset_data, member.size), suffix
    elif dot and f".{suffix}" in LABEL_SUFFIXES:
        if label_column:
            _note_label(archive, member, shard, label_column)
    else:
        shard.left_out[printable(f".{suffix}") if dot else "without a suffix"] += 1


def _note_label(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: _Shard, label_column: str) -> None:
    """Take a label as it stands there; where both kinds of member have one, it is KEY.cls's unless a key is named."""
    key, _, suffix = _split_name(member.name)
    if member.size > MAX_LABEL_BYTES:
        raise ValueError(f"{member.name} has {member.size:,} bytes, too many for a label")
    try:
        text = archive.extractfile(member).read().decode("utf-8-sig").strip()  # type: ignore[union-attr]
    except UnicodeDecodeError as error:
        raise ValueError(f"{member.name} is no text in UTF-8: byte {error.start + 1} is none; write it anew") from error
    if suffix == "cls":
        label, wins = text, label_column in DEFAULT_LABEL_COLUMNS
    else:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{member.name} is no JSON: {first_line(error)}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{member.name} holds a {type(content).__name__}, not a table")
        label, wins = content.get(label_column), label_column not in DEFAULT_LABEL_COLUMNS
    if label is not None and (wins or key not in shard.labels):
        shard.labels[key] = label


def _split_name(name: str) -> tuple[str, str, str]:
    """WebDataset's rule: the key ends at the first dot of the file's own name."""
    folder, _, base = name.rpartition("/")
    key, dot, suffix = base.partition(".")
    return f"{folder}/{key}" if folder else key, dot, suffix.lower()
