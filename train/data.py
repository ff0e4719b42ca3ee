"""Where images come from, and how they become tensors.

Sources: scikit-learn's digits (the default), a tree of class folders, a `datasets` source (Hub id, local folder,
parquet). All of them are read by index, decoded on access.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils.data import Dataset

from d_emo.labels import english_names
from d_emo.train import stream
from d_emo.train.config import DataOptions

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


@dataclass(frozen=True)
class ImageSource:
    """A labelled set of images.

    Attributes:
        name: what to call it in messages and run names.
        size: number of images.
        read: index -> decoded image; raises UnreadableImageError.
        labels: (size,) class ids; zeros where there are no classes.
        id2label: class names by id; empty for unconditional training.
        channels: 1 or 3.
        flip: whether mirroring keeps the class by default.
        resolution: default image side in pixels.
        num_workers: default number of loader processes.
    """

    name: str
    size: int
    read: Callable[[int], PIL.Image.Image]
    labels: np.ndarray
    id2label: dict[int, str]
    channels: int = 3
    flip: bool = True
    resolution: int = 256
    num_workers: int = 4

    @property
    def fingerprint(self) -> str:
        """Changes with the images' number, labels and names; a run is resumed on the same data only."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels, dtype=np.int64).tobytes())
        digest.update(repr((self.size, sorted(self.id2label.items()))).encode())
        return digest.hexdigest()[:16]


def load_source(options: DataOptions) -> ImageSource:
    """Open the source that the options name.

    Raises:
        ValueError: no images, no such folder, dataset or column; the message gives the remedy.
    """
    if options.train_data_dir:
        source = folder_source(Path(options.train_data_dir), options.unconditional)
    elif options.dataset:
        source = datasets_source(options)
    else:
        source = digits_source()
    if options.unconditional:
        return replace(source, labels=np.zeros(source.size, dtype=np.int64), id2label={})
    return source


def digits_source() -> ImageSource:
    """scikit-learn's handwritten digits: 1,797 real scans of 8 x 8 pixels, ten classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "the digits come with scikit-learn; pip install 'd-emo[train]', or name a data set."
        ) from error
    digits = load_digits()
    scans = (digits.images * (255 / 16)).round().astype(np.uint8)
    return ImageSource(
        name="digits",
        size=len(scans),
        read=lambda index: PIL.Image.fromarray(scans[index]),
        labels=digits.target,
        id2label=dict(enumerate(DIGIT_NAMES)),
        channels=1,
        flip=False,
        resolution=16,
        num_workers=0,
    )


def folder_source(root: Path, unconditional: bool) -> ImageSource:
    """A folder with one sub-folder a class, images at any depth below; names in order are the class ids.

    Folders named by ImageNet's WordNet ids get their English class names. For unconditional training the images may
    also lie in `root` itself.
    """
    if not root.is_dir():
        raise ValueError(f"--train-data-dir {root}: there is no such folder.")
    folders = [root] if unconditional else sorted(path for path in root.iterdir() if path.is_dir())
    files = [sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) for folder in folders]
    if not any(files):
        what = "no images in it" if unconditional else "no class folders with images in it"
        raise ValueError(f"--train-data-dir {root}: there are {what}; expected {root}/CLASS/IMAGE.jpg.")
    empty = [folder.name for folder, found in zip(folders, files, strict=True) if not found]
    if empty:
        raise ValueError(
            f"--train-data-dir {root}: class folders without images: {', '.join(empty[:10])}; "
            "remove them or add images."
        )
    paths = [path for found in files for path in found]
    return ImageSource(
        name=root.resolve().name,
        size=len(paths),
        read=lambda index: _decode(paths[index], str(paths[index])),
        labels=np.repeat(np.arange(len(folders)), [len(found) for found in files]),
        id2label=dict(enumerate(english_names(folder.name for folder in folders))),
    )


def datasets_source(options: DataOptions) -> ImageSource:
    """Anything that `datasets.load_dataset` reads with an image column and a label column."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError("--dataset needs the datasets package; pip install 'd-emo[train]'.") from error
    name = str(options.dataset)
    try:
        if name.endswith(".parquet"):
            table = datasets.load_dataset(
                "parquet", data_files={options.dataset_split: name}, split=options.dataset_split
            )
        else:
            table = datasets.load_dataset(name, options.dataset_config, split=options.dataset_split)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"--dataset {name}: cannot be opened ({_first_line(error)}). It is looked for as a local path, then on the "
            "Hub; when offline, pass a .parquet file or a folder, or --train-data-dir."
        ) from error
    for column in [options.image_column] + ([] if options.unconditional else [options.label_column]):
        if column not in table.column_names:
            flag = "--image-column" if column == options.image_column else "--label-column (or --unconditional)"
            raise ValueError(
                f"--dataset {name}: no column {column!r} among {', '.join(table.column_names)}; set {flag}."
            )
    if not len(table):
        raise ValueError(f"--dataset {name}: the split {options.dataset_split!r} is empty.")
    labels, names = _dataset_labels(table, options)
    images = table.select_columns([options.image_column]).cast_column(
        options.image_column, datasets.Image(decode=False)
    )

    def read(index: int) -> PIL.Image.Image:
        stored = images[index][options.image_column]
        file = io.BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]
        return _decode(file, f"{name}, row {index}" + (f" ({stored['path']})" if stored["path"] else ""))

    return ImageSource(
        name=Path(name).stem if name.endswith(".parquet") else name.replace("/", "--"),
        size=len(table),
        read=read,
        labels=labels,
        id2label=dict(enumerate(english_names(names))),
        resolution=_default_resolution(read, len(table)),
    )


def _dataset_labels(table: Any, options: DataOptions) -> tuple[np.ndarray, list[str]]:
    if options.unconditional:
        return np.zeros(len(table), dtype=np.int64), []
    feature = table.features[options.label_column]
    column = table.with_format("numpy").select_columns([options.label_column])[:][options.label_column]
    if hasattr(feature, "names"):
        labels, names = column, list(feature.names)
    else:
        values, labels = np.unique(column, return_inverse=True)
        names = [str(value) for value in values]
    if labels.min() < 0:
        raise ValueError(
            f"--dataset {options.dataset}: split {options.dataset_split!r} has samples without a label (-1); "
            "choose a labelled split or --unconditional."
        )
    return labels.astype(np.int64), names


def _default_resolution(read: Callable[[int], PIL.Image.Image], size: int) -> int:
    """The largest power of two within the first readable image, from 16 to 256."""
    for index in range(size):
        try:
            image = read(index)
        except UnreadableImageError:
            continue  # reported when training comes to it, as --on-bad-image says
        return max(16, min(256, 2 ** (min(image.size).bit_length() - 1)))
    raise UnreadableImageError("no image of the data set can be read")


def _decode(file: Any, name: str) -> PIL.Image.Image:
    try:
        with PIL.Image.open(file) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{name} cannot be read ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def center_crop(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """ADM's crop: halve with a box filter while twice too large, resize the short side bicubically, cut the centre."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def to_tensor(image: PIL.Image.Image, channels: int, side: int) -> torch.Tensor:
    """An image as (channels, side, side) float32 in [-1, 1]."""
    image = center_crop(image.convert("L" if channels == 1 else "RGB"), side)
    pixels = np.asarray(image, dtype=np.float32).reshape(side, side, channels)
    return torch.from_numpy(pixels / 127.5 - 1.0).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Batch:
    """One micro batch of one process.

    Attributes:
        images: (B, channels, side, side) in [-1, 1].
        labels: (B,) class ids, before label dropout.
        positions: B places in the stream of samples, the key of every random draw.
        bad_images: messages of the images that could not be read and were replaced.
    """

    images: torch.Tensor
    labels: torch.Tensor
    positions: list[int]
    bad_images: list[str]


class TrainingImages(Dataset):
    """Reads `(position, index)` pairs; the position decides the flip.

    An unreadable image is replaced by the next readable one and reported in the batch, so that the trainer stops or
    goes on as the user chose, in one place.
    """

    def __init__(self, source: ImageSource, side: int, flip: bool, seed: int):
        self.source = source
        self.side = side
        self.flip = flip
        self.seed = seed

    def __len__(self) -> int:
        return self.source.size

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int, int, list[str]]:
        position, index = key
        image, index, bad_images = self._read(index)
        pixels = to_tensor(image, self.source.channels, self.side)
        if self.flip and stream.generator(self.seed, "flip", position).random() < 0.5:
            pixels = pixels.flip(-1)
        return pixels, int(self.source.labels[index]), position, bad_images

    def _read(self, index: int) -> tuple[PIL.Image.Image, int, list[str]]:
        bad_images: list[str] = []
        for offset in range(self.source.size):
            candidate = (index + offset) % self.source.size
            try:
                return self.source.read(candidate), candidate, bad_images
            except UnreadableImageError as error:
                bad_images.append(str(error))
        raise UnreadableImageError(f"no image can be read; the first: {bad_images[0]}")


def collate(samples: Sequence[tuple[torch.Tensor, int, int, list[str]]]) -> Batch:
    """Stack samples into a `Batch`."""
    images, labels, positions, bad_images = zip(*samples, strict=True)
    return Batch(
        images=torch.stack(images),
        labels=torch.tensor(labels),
        positions=list(positions),
        bad_images=[message for messages in bad_images for message in messages],
    )
