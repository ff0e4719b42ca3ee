"""A data set's latents on disk: the autoencoder's posterior of every image and its mirror image.

A folder holds `manifest.json` (what was encoded, with which autoencoder), `labels.npy`, and `latents-FIRST.npy` files
of `shard_size` images each: (n, flips, M, C, h, w), mean and standard deviation (M = 2), or the latent itself of a
deterministic autoencoder (M = 1), as the autoencoder gives them, neither scaled nor shifted. `statistics.json` is there
where mean and deviation of all latents were measured. Files appear whole or not at all; an image is read by its place,
so that it costs its bytes.

Every file has a SHA-256: the manifest has its own and that of the labels, `checksums-FIRST.json` those of a file of
latents and of what belongs to it. Small files are checked whenever a folder is opened. Files of latents are checked
then, too, up to `FULL_CHECK_BYTES` in all; of larger folders each is when its first image is read. So a flipped bit
is refused before anything is learned from it. Folders of before there were checksums are read, and say so.
"""

import collections
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d_emo.common import checks
from d_emo.common.files import file_digest, remove, write_json, written_whole
from d_emo.common.messages import describe_os_error, first_line
from d_emo.common.output import Progress
from d_emo.common.shards import SLOW_CHECK_BYTES
from d_emo.images.autoencoders import LatentSpace
from d_emo.images.latent_manifest import (
    AGAIN,
    LABELS,
    CacheManifest,
    LatentCacheError,
    read_cache_manifest,
    read_table,
    shard_folder,
)
from d_emo.images.latent_statistics import statistics_of
from d_emo.images.source import ImageSource, no_image

# Folders up to this size are checked whole when they are opened, which takes some seconds.
FULL_CHECK_BYTES = 2**32
# Files of latents that are kept open; systems allow a thousand or so in all.
OPEN_FILES = 64
# Of a file that is read from front to back, so much at once.
BLOCK_BYTES = 2**25
UNCHECKED = "encoded before there were checksums, so that damage goes unseen; encode again to have them"


def _beside(path: Path, kind: str) -> Path:
    """The file `KIND-FIRST.json` of a file of latents."""
    return path.with_name(path.name.replace("latents-", f"{kind}-")).with_suffix(".json")


def write_latents(path: Path, posteriors: np.ndarray, replaced: dict[int, int]) -> None:
    """Write a file of (n, flips, M, C, h, w), whole, and the checksums of it and of what belongs to it.

    Args:
        path: the file.
        posteriors: its array, finite.
        replaced: unreadable images, and those that stand for them.

    Raises:
        OSError: the system refuses; the file is not there then, or counts as damaged.
    """
    beside = _beside(path, "replaced")
    remove(beside)
    if replaced:
        write_json(beside, {str(index): used for index, used in replaced.items()})
    with written_whole(path) as partial, partial.open("wb") as file:
        # NumPy's own `save` does not say why a disk takes no more.
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(posteriors))
        file.write(np.ascontiguousarray(posteriors).data)
        file.flush()
        sums = {part.name: file_digest(part) for part in (partial, beside) if part.is_file()}
        write_json(_beside(path, "checksums"), sums)  # before the file itself, which then never lacks its own


def check_latents(folder: Path, manifest: CacheManifest, shard: range) -> None:
    """Read a file of latents whole.

    Raises:
        LatentCacheError: it is not as it was written.
    """
    path = shard_folder(folder, manifest).path(shard)
    _check_layout(path, manifest, shard)
    _check_content(path, manifest)


def blocks(folder: Path, manifest: CacheManifest, shard: range) -> Iterator[np.ndarray]:
    """A file of latents from front to back, (n, flips, M, C, h, w) at a time, `BLOCK_BYTES` or an image.

    Raises:
        LatentCacheError: its layout is another, or it cannot be read; its checksum is not compared.
    """
    path = shard_folder(folder, manifest).path(shard)
    start, rows = _check_layout(path, manifest, shard), max(1, BLOCK_BYTES // manifest.image_bytes)
    try:
        with path.open("rb") as file:
            file.seek(start)
            for first in range(0, len(shard), rows):
                block = range(first, min(first + rows, len(shard)))
                values = np.frombuffer(file.read(len(block) * manifest.image_bytes), dtype=manifest.dtype)
                yield values.reshape(manifest.file_shape(block))
    except (OSError, ValueError) as error:
        raise LatentCacheError(f"{path} cannot be read ({first_line(error)}); {AGAIN}.") from error


def _check_layout(path: Path, manifest: CacheManifest, shard: range) -> int:
    """Check type, shape and length of a file; where its numbers begin, in bytes."""
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):
                raise ValueError(f"version {version} of NumPy's format")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
            length = file.seek(0, os.SEEK_END)
    except OSError as error:
        raise LatentCacheError(f"{describe_os_error(error)}; {AGAIN}.") from error
    except Exception as error:  # damaged headers fail in any way
        raise LatentCacheError(f"{path} is damaged ({first_line(error)}); {AGAIN}.") from error
    expected = manifest.file_shape(shard)
    if shape != expected or dtype != np.dtype(manifest.dtype) or fortran:
        raise LatentCacheError(f"{path} holds {dtype} {shape}, not {manifest.dtype} {expected}; {AGAIN}.")
    if length != start + len(shard) * manifest.image_bytes:
        raise LatentCacheError(f"{path} is damaged ({length:,} bytes are too few or too many); {AGAIN}.")
    return start


def _checksums(path: Path, manifest: CacheManifest) -> dict[str, str]:
    """The checksums of a file of latents and what belongs to it, by name; nothing in older folders."""
    record = _beside(path, "checksums")
    if not manifest.labels_digest and not record.is_file():
        return {}
    found = read_table(record)
    if path.name not in found:
        raise LatentCacheError(f"{record} is damaged (it says nothing of {path.name}); {AGAIN}.")
    return found


def _check_content(path: Path, manifest: CacheManifest) -> None:
    """Read a file of latents whole and compare it, and what belongs to it, with the checksums."""
    sums = _checksums(path, manifest)
    if sums:
        _check_digest(path, sums[path.name])
    _replaced_images(path, manifest)


def _check_digest(path: Path, expected: str | None) -> None:
    try:
        matches = file_digest(path) == expected
    except OSError as error:
        raise LatentCacheError(f"{describe_os_error(error)}; {AGAIN}.") from error
    if not matches:
        raise LatentCacheError(f"{path} is damaged (it is not as it was written, by its SHA-256); {AGAIN}.")


def _replaced_images(path: Path, manifest: CacheManifest) -> dict[int, int]:
    """Images of a file whose place another one took."""
    beside, sums = _beside(path, "replaced"), _checksums(path, manifest)
    if sums and beside.name not in sums:
        if beside.exists():
            raise LatentCacheError(f"{beside} does not belong to {path.name}; {AGAIN}.")
        return {}
    if not sums and not beside.is_file():
        return {}
    if sums:
        _check_digest(beside, sums[beside.name])
    found = read_table(beside)
    places = [place for pair in found.items() for place in pair]
    if not all(re.fullmatch(r"[0-9]{1,18}", str(place)) and int(place) < manifest.count for place in places):
        raise LatentCacheError(f"{beside} is damaged (it is no table of images); {AGAIN}.")
    return {int(index): int(used) for index, used in found.items()}


class LatentCache:
    """Reads a complete folder of latents by index.

    Args:
        folder: of latents.
        kind: of latents.

    Attributes:
        manifest: what it holds.
        statistics: of its latents, where they were measured.
        labels: (count,) int64 class ids.
        replaced: unreadable images, and those that stand for them.

    Raises:
        LatentCacheError: a file is missing, cut short or not as it was written; the message counts and names. Also
            from `read`, in folders of more than `FULL_CHECK_BYTES`.
    """

    def __init__(self, folder: Path, kind: type[LatentSpace] = LatentSpace):
        self.folder = folder = checks.path_named(folder, "folder")
        self.manifest = read_cache_manifest(folder, kind)
        self.statistics = statistics_of(folder, self.manifest)
        self.labels = _read_labels(folder, self.manifest)
        self.files = shard_folder(folder, self.manifest)
        missing = self.files.missing()
        if missing:
            raise LatentCacheError(
                f"{folder}: {sum(map(len, missing)):,} of {self.manifest.count:,} images are not encoded yet "
                f"(first missing file {self.files.path(missing[0]).name}); run train/encode_latents.py again."
            )
        self._paths = [self.files.path(shard) for shard in self.files.ranges]
        self._starts = [_check_layout(self.files.path(shard), self.manifest, shard) for shard in self.files.ranges]
        self._open: collections.OrderedDict[int, io.FileIO] = collections.OrderedDict()
        self.replaced: dict[int, int] = {}
        for path in self._paths:
            self.replaced |= _replaced_images(path, self.manifest)
        for index, used in self.replaced.items():
            self.labels[index] = self.labels[used]
        self._unchecked = set(range(len(self._paths))) if self.checksums else set()
        size = self.manifest.count * self.manifest.image_bytes
        if size <= FULL_CHECK_BYTES:
            slow = size > SLOW_CHECK_BYTES
            with Progress(len(self._unchecked), "file", "checking latents", shown=slow, leave=False) as progress:
                for number in sorted(self._unchecked):
                    self._check(number)
                    progress.update()

    @property
    def checksums(self) -> bool:
        """Whether there are checksums; older folders have none."""
        return bool(self.manifest.labels_digest)

    def _check(self, number: int) -> None:
        if number in self._unchecked:
            _check_content(self._paths[number], self.manifest)
            self._unchecked.discard(number)

    def read(self, index: int, flipped: bool) -> torch.Tensor:
        """The posterior of an image or its mirror image, (M, C, h, w) float32; see the module.

        Raises:
            LatentCacheError: there is no such image or view, or its file is damaged.
        """
        return self.stored(index, flipped).float()

    def stored(self, index: int, flipped: bool) -> torch.Tensor:
        """See `read`; in the type on the disk."""
        manifest = self.manifest
        if not 0 <= index < manifest.count:
            raise LatentCacheError(f"{self.folder} holds images 0 to {manifest.count - 1}; there is no image {index}.")
        if flipped and manifest.flips < 2:
            raise LatentCacheError(f"{self.folder} holds no mirror images; encode again with --random-flip true.")
        shard, row = divmod(index, manifest.shard_size)
        self._check(shard)
        length = manifest.image_bytes // manifest.flips
        content = self._bytes(shard, self._starts[shard] + row * manifest.image_bytes + int(flipped) * length, length)
        values = np.frombuffer(content, dtype=manifest.dtype).reshape(manifest.latent_space.parts, *manifest.shape)
        if not self.checksums and not np.isfinite(values).all():
            raise LatentCacheError(f"{self._paths[shard]}: the latents of image {index} are NaN or infinite; {AGAIN}.")
        return torch.from_numpy(values)

    def _bytes(self, shard: int, start: int, length: int) -> bytearray:
        """Bytes of a file. Files are read, not mapped: a disk's error is then an error here, not the system's end."""
        content = bytearray(length)
        try:
            file = self._open.pop(shard, None) or self._paths[shard].open("rb", buffering=0)
            self._open[shard] = file  # the last one used is the last one
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            if hasattr(os, "preadv"):  # processes that were forked share a file's place
                found = os.preadv(file.fileno(), [content], start)
            else:
                file.seek(start)
                found = file.readinto(content)
        except OSError as error:
            raise LatentCacheError(f"{self._paths[shard]} cannot be read ({error.strerror}); {AGAIN}.") from error
        if found != length:
            raise LatentCacheError(f"{self._paths[shard]} was cut short; {AGAIN}.")
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": collections.OrderedDict()}  # for loader processes that are not forked


def _read_labels(folder: Path, manifest: CacheManifest) -> np.ndarray:
    path = folder / LABELS
    if manifest.labels_digest:
        _check_digest(path, manifest.labels_digest)
    try:
        labels = np.load(path, allow_pickle=False)
    except Exception as error:  # damaged headers fail in any way
        raise LatentCacheError(f"{path} is damaged ({first_line(error)}); {AGAIN}.") from error
    if labels.shape != (manifest.count,) or not np.issubdtype(labels.dtype, np.integer):
        raise LatentCacheError(
            f"{path} holds {labels.dtype} {labels.shape}, not whole numbers of shape {(manifest.count,)}; {AGAIN}."
        )
    last = max(0, len(manifest.id2label) - 1)
    wrong = np.flatnonzero((labels < 0) | (labels > last))
    if len(wrong):
        raise LatentCacheError(
            f"{path}: image {wrong[0]} has label {labels[wrong[0]]}, the classes are 0 to {last}; {AGAIN}."
        )
    return labels.astype(np.int64)


def latents_source(folder: Path) -> ImageSource:
    """A data set that `train/encode_latents.py` encoded.

    Raises:
        LatentCacheError: the folder is incomplete, damaged or something else.
    """
    cache = LatentCache(folder)
    manifest = cache.manifest
    return ImageSource(
        name=manifest.source,
        size=manifest.count,
        read=no_image(f"{folder} holds latents"),
        labels=cache.labels,
        id2label={int(key): name for key, name in manifest.id2label.items()},
        flip=manifest.flips == 2,
        resolution=manifest.resolution,
        num_workers=0,
        latents=cache,
        note="" if cache.checksums else UNCHECKED,
    )
