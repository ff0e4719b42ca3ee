"""Sets of images to be scored or compared with: uint8, of one size, in a fixed order, with a hash of their content.

Most are views of an `ImageSource`, which lists and decodes as it does for training; .npz files and the samples that
this package draws are stored as sets.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import PIL.Image

from d_emo.common import checks
from d_emo.common.files import file_digest
from d_emo.common.messages import shown
from d_emo.common.output import Progress
from d_emo.common.shards import MANIFEST, read_manifest
from d_emo.eval.fid import archives
from d_emo.images.decode import DECODE_VERSION, UnreadableImageError, center_crop, to_pixels
from d_emo.images.digits import digits_source
from d_emo.images.folders import folder_source
from d_emo.images.listing import list_classes
from d_emo.images.shards import tar_source
from d_emo.images.source import ImageSource
from d_emo.images.tables import datasets_source

SHARD_PATTERN = "samples-*.npz"
# From so many files on, hashing shows its progress.
SLOW_HASH = 5000
LOSSY_SUFFIXES = (".jpg", ".jpeg")
DIGITS = "digits"
SHUFFLED = "taken in a fixed shuffled order"
Size = tuple[int, int]


@dataclass(frozen=True)
class ImageSet:
    """Images of one size.

    Attributes:
        name: what to call it.
        shape: (N, H, W, channels); channels are 1 or 3.
        read: (start, stop) -> uint8 (stop - start, H, W, channels).
        fingerprint: hash of the content, and of the crop if there is one.
        labels: (N,) class ids where they are known.
        notes: what a reader of the scores should know.
    """

    name: str
    shape: tuple[int, int, int, int]
    read: Callable[[int, int], np.ndarray]
    fingerprint: str
    labels: np.ndarray | None = None
    notes: Sequence[str] = field(default=())

    def __len__(self) -> int:
        return self.shape[0]

    def first(self, count: int | None) -> "ImageSet":
        """The first `count` images in the set's order; all for None.

        Raises:
            ValueError: there are not so many.
        """
        if count is None or checks.whole(count, "count") == len(self):
            return self
        if count > len(self):
            raise ValueError(f"{self.name} has {len(self):,} images; {count:,} of them cannot be taken.")
        return replace(
            self,
            shape=(count, *self.shape[1:]),
            fingerprint=f"{self.fingerprint}-{count}",
            labels=None if self.labels is None else self.labels[:count],
            notes=(*self.notes, f"the first {count:,} of {len(self):,} images"),
        )

    def with_channels(self, channels: int) -> "ImageSet":
        """Grey images as colour ones for 3, colour ones as grey for 1 (as training makes them); else as they are."""
        if self.shape[3] == checks.whole(channels, "channels") or channels not in (1, 3):
            return self

        def read(start: int, stop: int) -> np.ndarray:
            images = self.read(start, stop)
            if channels == 3:
                return np.repeat(images, 3, axis=3)
            return np.stack([to_pixels(PIL.Image.fromarray(image), 1) for image in images])

        kind = "rgb" if channels == 3 else "grey"
        return replace(self, shape=(*self.shape[:3], channels), read=read, fingerprint=f"{self.fingerprint}-{kind}")


def check_name(source: str) -> None:
    """Whether there is something that `open_set` could open.

    Raises:
        ValueError: there is not; the message begins with the name.
    """
    source = checks.text(source, "source")
    path = Path(source)
    if source.endswith((".npz", ".parquet")):
        if not path.is_file():
            raise ValueError(f"{source}: there is no such file.")
    elif source != DIGITS and not source.endswith(".tar") and not path.is_dir():
        raise ValueError(f"{source}: there is no such folder, .npz or .parquet file.")


def open_set(source: str, size: Size | None = None, image_column: str = "image") -> ImageSet:
    """Open a set of images.

    Args:
        source: "digits", an .npz file, a .parquet file, .tar shards, a folder of images, or a folder of samples of this
            package.
        size: (height, width) to crop and resize to, as ADM prepares ImageNet; without it all images must have one size.
        image_column: column of a parquet file that holds the images.

    Raises:
        ValueError: there are no images, they differ in size, or cannot be read; the message says which.
    """
    check_name(source)
    source, path = str(source), Path(source)
    if size is not None:
        if not isinstance(size, Sequence) or len(size) != 2:
            raise ValueError(f"size={shown(size)} is not (height, width).")
        size = checks.whole(size[0], "height"), checks.whole(size[1], "width")
    if source == DIGITS:
        digits = digits_source()
        return view(digits, size or (digits.resolution, digits.resolution), f"scikit-learn's digits, {digits.size}")
    if source.endswith(".npz"):
        return _from_archive(path)
    if source.endswith(".parquet"):
        try:
            table = datasets_source(source, image_column=image_column, label_column=None)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return view(table, size, content_hash(table.files))
    if source.endswith(".tar"):
        try:
            shards = tar_source(source, None)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return view(shards, size, content_hash(shards.files))
    for folder in (path, path / "samples"):
        if any(folder.glob(SHARD_PATTERN)):
            return from_shards(folder)
    try:
        pictures = folder_source(path, unconditional=True)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return view(pictures, size, content_hash(pictures.files, path))


def with_classes(images: ImageSet, source: str, label_column: str) -> ImageSet:
    """A set that `open_set` opened, with the classes of its images where they can be known.

    Args:
        images: the set, with all its images.
        source: what it was opened from.
        label_column: column of a parquet file that holds the classes.

    Raises:
        ValueError: the source's classes are wrong, or the column is missing.
    """
    path = Path(source)
    try:
        if images.labels is not None or source.endswith((".npz", ".tar")):
            return images
        if source.endswith(".parquet"):
            labels = datasets_source(source, label_column=label_column).labels
        else:
            classes = [folder.name for folder in list_classes(path).pictures]
            files = folder_source(path, unconditional=True).files
            found = [file.relative_to(path).parts[0] for file in files]
            if not classes or not {*found} <= {*classes}:
                return images
            places = {name: place for place, name in enumerate(classes)}
            labels = np.array([places[name] for name in found])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    return replace(images, labels=np.asarray(labels)[_order(len(images))])


def _order(count: int) -> np.ndarray:
    """The order in which images are taken."""
    return np.random.RandomState(0).permutation(count)


def view(source: ImageSource, size: Size | None, content: str) -> ImageSet:
    """A source in a fixed shuffled order (folders and tables are often sorted by class).

    Args:
        source: its images.
        size: (height, width) to crop and resize to, as ADM prepares ImageNet; without it all images must have one size.
        content: stands for what the images hold; their number, classes and size are added.
    """
    source.refuse_unreadable()
    order = _order(source.size)
    height, width = size or _read(source, order[0]).size[::-1]

    def read(start: int, stop: int) -> np.ndarray:
        images = []
        for index in order[start:stop]:
            image = _read(source, index)
            if size:
                image = center_crop(image, width, height)
            if image.size != (width, height):
                raise ValueError(
                    f"{source.name}: image {index} is {image.width} x {image.height}, the first one is {width} x "
                    f"{height}; samples of several sizes cannot be scored together."
                )
            images.append(to_pixels(image, source.channels))
        return np.stack(images)

    return ImageSet(
        name=source.name,
        shape=(source.size, height, width, source.channels),
        read=read,
        fingerprint=hashlib.sha256(f"{content} {source.fingerprint} {size} {DECODE_VERSION}".encode()).hexdigest(),
        labels=source.labels[order] if source.id2label else None,
        notes=(*_lossy_note(source.files, size), *([source.note] if source.note else []), SHUFFLED),
    )


def _read(source: ImageSource, index: int) -> PIL.Image.Image:
    try:
        return source.read(int(index))
    except UnreadableImageError as error:
        raise ValueError(f"{error}; repair or remove it.") from error


def _lossy_note(files: Sequence[Path], size: Size | None) -> list[str]:
    """A warning of samples whose compression is scored with them; references are JPEG files as a rule."""
    lossy = [path for path in files if path.suffix.lower() in LOSSY_SUFFIXES]
    if not lossy or size is not None:
        return []
    return [f"{len(lossy)} of {len(files)} images are JPEG ({lossy[0].name}): compression moves every score; save "
            "samples as PNG or .npz."]  # fmt: skip


def _from_archive(path: Path) -> ImageSet:
    archives.archive_keys(path)
    images = archives.map_images(path)
    if not len(images):
        raise ValueError(f"{path}: {archives.IMAGES_KEY} holds no images.")
    order = _order(len(images))  # files are often sorted by class

    def read(start: int, stop: int) -> np.ndarray:
        return images[order[start:stop]]

    return ImageSet(path.name, images.shape, read, f"{content_hash([path])}-shuffled", notes=[SHUFFLED])


def from_shards(folder: Path) -> ImageSet:
    """Samples that this package drew into `folder`.

    Raises:
        ValueError: the sampling run did not end, or a file is missing or damaged.
    """
    try:
        count = read_manifest(folder.parent, "sample again")["sampling"]["num_images"]  # type: ignore[index]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its {MANIFEST} is missing or damaged ({error}); sample again.") from error
    paths = sorted(folder.glob(SHARD_PATTERN))
    labels = [archives.read_array(path, "labels") for path in paths]
    if wrong := [path for path, found in zip(paths, labels, strict=True) if found.ndim != 1]:
        raise ValueError(f"{wrong[0]} holds no samples of this package; sample again.")
    starts = np.cumsum([0, *map(len, labels)])
    if starts[-1] != count:
        raise ValueError(
            f"{folder} holds {starts[-1]} of {count} images: the sampling run did not end; run it again to go on."
        )

    def images(number: int) -> np.ndarray:
        found = archives.read_array(paths[number], archives.IMAGES_KEY)
        if found.dtype != np.uint8 or found.ndim != 4 or len(found) != len(labels[number]):
            raise ValueError(f"{paths[number]} holds {found.dtype} {found.shape} as images; sample again.")
        return found

    shape = (int(starts[-1]), *images(0).shape[1:])

    def read(start: int, stop: int) -> np.ndarray:
        first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
        parts = [images(number) for number in range(first, last + 1)]
        if wrong := [first + place for place, part in enumerate(parts) if part.shape[1:] != shape[1:]]:
            raise ValueError(f"{paths[wrong[0]]} holds images of another size than {paths[0].name}; sample again.")
        return np.concatenate(parts)[start - starts[first] : stop - starts[first]]

    return ImageSet(folder.parent.name, shape, read, content_hash(paths), labels=np.concatenate(labels))


def content_hash(paths: Iterable[Path], root: Path | None = None) -> str:
    """SHA-256 over the files' content, and over their names below `root` if it is given."""
    digest = hashlib.sha256()
    files = list(paths)
    with Progress(len(files), "file", "hashing", shown=len(files) >= SLOW_HASH, leave=False) as progress:
        for path in files:
            if root is not None:
                digest.update(os.fsencode(path.relative_to(root).as_posix()))
            digest.update(file_digest(path).encode())
            progress.update()
    return digest.hexdigest()
