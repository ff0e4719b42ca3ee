"""Sets of labelled images: what all of them have in common, and the simple ones.

scikit-learn's digits, a tree of class folders, latents; `dataset_images` has what the package `datasets` reads,
`tar_images` WebDataset shards. Images are read by index and decoded on access, but for streams, which come in an order
of their own. Training and evaluation share them.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch

from d_emo.images.labels import english_names
from d_emo.images.latent_cache import LatentCache

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})

# Of a source that is split into images to train on and images to validate on.
HELD_OUT_SHARE = 0.2


class UnreadableImageError(ValueError):
    """An image that cannot be decoded; the message names it."""


@dataclass(frozen=True)
class EncodedImage:
    """An image of a stream, not decoded yet: a binary file or a path, its class id, and what to call it."""

    file: Any
    label: int
    name: str


class ImageStream(Protocol):
    """Images that can only be read from front to back, epoch by epoch."""

    @property
    def num_shards(self) -> int:
        """Files that it is dealt out by."""

    def epoch(self, seed: int, epoch: int, rank: int, world_size: int) -> Iterator[EncodedImage]:
        """One process's share of an epoch, in an order that (seed, epoch) decides."""


@dataclass(frozen=True)
class ImageSource:
    """A labelled set of images.

    Attributes:
        name: what to call it in messages and run names.
        size: number of images; 0 where a stream does not tell.
        read: index -> decoded image; raises UnreadableImageError.
        labels: (size,) class ids; zeros where there are no classes.
        id2label: class names by id; empty for unconditional training.
        channels: 1 or 3.
        flip: whether mirroring keeps the class by default.
        resolution: default image side in pixels.
        num_workers: default number of loader processes.
        latents: what stands for the images where they were encoded beforehand; `read` then raises.
        stream: what is read instead of `read`, which then raises, and `labels`, which are empty.
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
    latents: LatentCache | None = None
    stream: ImageStream | None = None

    def describe_size(self) -> str:
        """How many images, for people."""
        count = f"{self.size:,} images" if self.size else "images of unknown number"
        return count if self.stream is None else f"{count} in a stream of {self.stream.num_shards} files"

    @property
    def fingerprint(self) -> str:
        """Changes with the images' number, labels and names; a run is resumed on the same data only."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels, dtype=np.int64).tobytes())
        digest.update(repr((self.size, sorted(self.id2label.items()))).encode())
        return digest.hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """What a run remembers of its images, to be resumed on the same ones."""
        return {"data": self.name, "data_size": self.size, "data_fingerprint": self.fingerprint}


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
        raise ValueError("there is no such folder.")
    folders = [root] if unconditional else sorted(path for path in root.iterdir() if path.is_dir())
    files = [sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES) for folder in folders]
    if not any(files):
        what = "no images in it" if unconditional else "no class folders with images in it"
        raise ValueError(f"there are {what}; expected {root}/CLASS/IMAGE.jpg.")
    empty = [folder.name for folder, found in zip(folders, files, strict=True) if not found]
    if empty:
        raise ValueError(f"class folders without images: {', '.join(empty[:10])}; remove them or add images.")
    paths = [path for found in files for path in found]
    return ImageSource(
        name=root.resolve().name,
        size=len(paths),
        read=lambda index: decode(paths[index], str(paths[index])),
        labels=np.repeat(np.arange(len(folders)), [len(found) for found in files]),
        id2label=dict(enumerate(english_names(folder.name for folder in folders))),
    )


def held_out(source: ImageSource, share: float = HELD_OUT_SHARE) -> tuple[ImageSource, ImageSource]:
    """Split a source into two, each class by the same share; the same split every time.

    Raises:
        ValueError: it is a stream, or too small.
    """
    from sklearn.model_selection import train_test_split

    if source.stream is not None:
        raise ValueError("a stream has no index and cannot be split; name other images to validate on.")
    parts = train_test_split(np.arange(source.size), test_size=share, random_state=0, stratify=source.labels)
    train, held = (subset(source, np.sort(part)) for part in parts)
    return train, replace(held, name=f"{source.name}, held out")


def subset(source: ImageSource, indices: np.ndarray) -> ImageSource:
    """Some images of a source."""
    return replace(
        source, size=len(indices), read=lambda index: source.read(int(indices[index])), labels=source.labels[indices]
    )


def no_image(reason: str) -> Callable[[int], PIL.Image.Image]:
    """A `read` for sources without images to read by index."""

    def read(index: int) -> PIL.Image.Image:
        raise UnreadableImageError(f"image {index} cannot be read: {reason}")

    return read


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
    )


def default_resolution(read: Callable[[int], PIL.Image.Image], size: int) -> int:
    """The largest power of two within the first readable image, from 16 to 256."""
    for index in range(size):
        try:
            return power_of_two_side(read(index))
        except UnreadableImageError:
            continue  # reported when training comes to it, as --on-bad-image says
    raise UnreadableImageError("no image of the data set can be read")


def power_of_two_side(image: PIL.Image.Image) -> int:
    """The largest power of two within an image, from 16 to 256."""
    return max(16, min(256, 2 ** (min(image.size).bit_length() - 1)))


def decode(file: Any, name: str) -> PIL.Image.Image:
    """Decode a path or binary file whole.

    Raises:
        UnreadableImageError: with `name`.
    """
    try:
        with PIL.Image.open(file) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"{name} cannot be read ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
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
