"""Sets of images to be scored or compared with: .npz files, folders, parquet files, samples of this package, digits.

Every set answers ranges of uint8 images of one size, in an order that is fixed, and knows a hash of its content.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import PIL.Image
from tqdm.auto import tqdm

from d_emo.common.files import file_digest
from d_emo.eval.fid import archives
from d_emo.images.source import IMAGE_SUFFIXES, ImageSource, UnreadableImageError, center_crop, decode, digits_source
from d_emo.images.table_source import datasets_source

MANIFEST = "manifest.json"
SHARD_PATTERN = "samples-*.npz"
# From so many files on, hashing shows its progress.
SLOW_HASH = 5000
LOSSY_SUFFIXES = (".jpg", ".jpeg")
DIGITS = "digits"


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
        if count is None or count == len(self):
            return self
        if not 1 <= count < len(self):
            raise ValueError(f"{self.name} has {len(self):,} images; {count:,} of them cannot be taken.")
        return replace(
            self,
            shape=(count, *self.shape[1:]),
            fingerprint=f"{self.fingerprint}-{count}",
            labels=None if self.labels is None else self.labels[:count],
            notes=(*self.notes, f"the first {count:,} of {len(self):,} images"),
        )

    def with_channels(self, channels: int) -> "ImageSet":
        """Grey images as colour ones if `channels` is 3; everything else as it is."""
        if self.shape[3] == channels or channels != 3:
            return self

        def read(start: int, stop: int) -> np.ndarray:
            return np.repeat(self.read(start, stop), 3, axis=3)

        return replace(self, shape=(*self.shape[:3], 3), read=read, fingerprint=f"{self.fingerprint}-rgb")


def open_images(source: str, side: int | None = None, image_column: str = "image") -> ImageSet:
    """Open a set of images.

    Args:
        source: "digits", an .npz file, a .parquet file, a folder of images, or a folder of samples of this package.
        side: crop and resize to this side as ADM prepares ImageNet; without it all images must have one size.
        image_column: column of a parquet file that holds the images.

    Raises:
        ValueError: there are no images, they differ in size, or cannot be read; the message says which.
    """
    path = Path(source)
    if source == DIGITS:
        digits = digits_source()
        return from_source(digits, side or digits.resolution, f"scikit-learn's digits, {digits.size}")
    if source.endswith(".npz"):
        return _from_archive(path)
    if source.endswith(".parquet"):
        if not path.is_file():
            raise ValueError(f"{source}: there is no such file.")
        try:
            table = datasets_source(source, image_column=image_column, label_column=None)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return _from_readers(path.name, table.size, table.read, side, content_hash([path]))
    if not path.is_dir():
        raise ValueError(f"{source}: there is no such folder, .npz or .parquet file.")
    for folder in (path, path / "samples"):
        if any(folder.glob(SHARD_PATTERN)):
            return from_shards(folder)
    return _from_folder(path, side)


def from_source(source: ImageSource, side: int, identity: str) -> ImageSet:
    """A training source at a size, in a fixed shuffled order; `identity` stands for its content."""
    channels = source.channels
    order = np.random.RandomState(0).permutation(source.size)

    def read(start: int, stop: int) -> np.ndarray:
        cropped = [center_crop(_open_one(source.read, index), side) for index in order[start:stop]]
        return np.stack([_pixels(image, channels) for image in cropped])

    fingerprint = hashlib.sha256(f"{identity} {source.fingerprint} {side}".encode()).hexdigest()
    return ImageSet(source.name, (source.size, side, side, channels), read, fingerprint, labels=source.labels[order])


def _from_archive(path: Path) -> ImageSet:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    archives.archive_keys(path)
    images = archives.map_images(path)
    if not len(images):
        raise ValueError(f"{path}: {archives.IMAGES_KEY} holds no images.")
    return ImageSet(path.name, images.shape, lambda start, stop: np.array(images[start:stop]), content_hash([path]))


def from_shards(folder: Path) -> ImageSet:
    """Samples that this package drew into `folder`.

    Raises:
        ValueError: the sampling run did not end, or a file is missing or damaged.
    """
    try:
        manifest = json.loads((folder.parent / MANIFEST).read_text(encoding="utf-8"))
        count = manifest["sampling"]["num_images"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: its {MANIFEST} is missing or damaged ({error}); sample again.") from error
    paths = sorted(folder.glob(SHARD_PATTERN))
    labels = [archives.read_array(path, "labels") for path in paths]
    starts = np.cumsum([0, *map(len, labels)])
    if starts[-1] != count:
        raise ValueError(
            f"{folder} holds {starts[-1]} of {count} images: the sampling run did not end; run it again to go on."
        )
    height, width, channels = archives.read_array(paths[0], archives.IMAGES_KEY).shape[1:]

    def read(start: int, stop: int) -> np.ndarray:
        first, last = np.searchsorted(starts, [start, stop - 1], side="right") - 1
        parts = [archives.read_array(paths[shard], archives.IMAGES_KEY) for shard in range(first, last + 1)]
        return np.concatenate(parts)[start - starts[first] : stop - starts[first]]

    shape = (int(starts[-1]), height, width, channels)
    return ImageSet(folder.parent.name, shape, read, content_hash(paths), labels=np.concatenate(labels))


def _from_folder(root: Path, side: int | None) -> ImageSet:
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ValueError(f"{root}: there are no images in this folder.")
    lossy = [path for path in paths if path.suffix.lower() in LOSSY_SUFFIXES]
    notes = []
    if lossy and side is None:
        notes.append(
            f"{len(lossy)} of {len(paths)} images are JPEG ({lossy[0].name}): compression moves every score; save "
            "samples as PNG or .npz."
        )

    def read(index: int) -> PIL.Image.Image:
        return decode(paths[index], str(paths[index]))

    return _from_readers(root.name, len(paths), read, side, content_hash(paths, root), notes)


def _from_readers(
    name: str,
    count: int,
    read_one: Callable[[int], PIL.Image.Image],
    side: int | None,
    fingerprint: str,
    notes: Sequence[str] = (),
) -> ImageSet:
    """A set of separately stored images, in a fixed shuffled order: folders and tables are often sorted by class."""
    order = np.random.RandomState(0).permutation(count)
    first = _open_one(read_one, order[0])
    width, height = (side, side) if side else first.size

    def read(start: int, stop: int) -> np.ndarray:
        images = []
        for index in order[start:stop]:
            image = _open_one(read_one, index)
            if side:
                image = center_crop(image, side)
            if image.size != (width, height):
                raise ValueError(
                    f"{name}: image {index} is {image.width} x {image.height}, the first one is {width} x {height}; "
                    "samples of several sizes cannot be scored together."
                )
            images.append(_pixels(image, 3))
        return np.stack(images)

    notes = [*notes, "taken in a fixed shuffled order"]
    return ImageSet(name, (count, height, width, 3), read, f"{fingerprint}-{side}", notes=notes)


def _open_one(read_one: Callable[[int], PIL.Image.Image], index: int) -> PIL.Image.Image:
    try:
        return read_one(int(index))
    except UnreadableImageError as error:
        raise ValueError(f"{error}; repair or remove it.") from error


def _pixels(image: PIL.Image.Image, channels: int) -> np.ndarray:
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return pixels.reshape(*pixels.shape[:2], channels)


def content_hash(paths: Iterable[Path], root: Path | None = None) -> str:
    """SHA-256 over the files' content, and over their names below `root` if it is given."""
    digest = hashlib.sha256()
    files = list(paths)
    for path in tqdm(files, desc="hashing", unit="file", leave=False, disable=len(files) < SLOW_HASH):
        if root is not None:
            digest.update(path.relative_to(root).as_posix().encode())
        digest.update(file_digest(path).encode())
    return digest.hexdigest()
