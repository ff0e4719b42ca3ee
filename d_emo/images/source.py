"""What all sets of labelled images, and of other things with a class, have in common.

Images are read by index and decoded on access, but for streams, which come in an order of their own. Training, FID and
accuracy share them; `open_source` opens what a user names.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import PIL.Image
import torch

from d_emo.common.messages import shown
from d_emo.common.ranges import Real
from d_emo.images.decode import UnreadableImageError

# Of a source that is split into images to train on and images to validate on.
HELD_OUT_SHARE = 0.2
SHARE = Real(0, 1, positive=True, below=True)
SourceT = TypeVar("SourceT", bound="LabelledSource")


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


class EncodedLatents(Protocol):
    """Latents that stand for the images; `latent_cache.LatentCache` reads them from a disk."""

    manifest: Any
    statistics: Any

    def read(self, index: int, flipped: bool) -> torch.Tensor:
        """The posterior of an image or its mirror image, (M, C, h, w) float32."""


@dataclass(frozen=True)
class LabelledSource:
    """A set of things with a class each.

    Attributes:
        name: what to call it in messages and run names.
        size: how many; 0 where a stream does not tell.
        read: index -> one of them; raises UnreadableImageError.
        labels: (size,) class ids; zeros where there are no classes.
        id2label: class names by id; empty where classes are not wanted.
        num_workers: default number of loader processes.
        stream: what is read instead of `read`, which then raises, and `labels`, which are empty.
        files: what they lie in, where that is a list of files.
        note: what was left out of them, for people.
        unreadable: messages of those of which it is known already that they cannot be decoded.
    """

    # What they are, for people.
    things: ClassVar[str] = "images"
    name: str
    size: int
    read: Callable[[int], Any]
    labels: np.ndarray
    id2label: dict[int, str]
    num_workers: int = 4
    stream: ImageStream | None = None
    files: Sequence[Path] = ()
    note: str = ""
    unreadable: Sequence[str] = ()

    def refuse_unreadable(self, remedy: str = "Repair or remove them.") -> None:
        """Stop before any work where it is known that an image cannot be decoded.

        Raises:
            UnreadableImageError: there are such images; the first is named, the others are counted.
        """
        refuse_unreadable(self.unreadable, remedy)

    def describe_size(self) -> str:
        """How many there are, for people."""
        count = f"{self.size:,} {self.things}" if self.size else f"{self.things} of unknown number"
        if self.stream is not None:
            return f"{count} in a stream of {self.stream.num_shards} files"
        return f"{count} ({self.note})" if self.note else count

    @property
    def fingerprint(self) -> str:
        """Changes with their number, labels and classes' names; a run is resumed on the same data only."""
        digest = hashlib.sha256(np.ascontiguousarray(self.labels, dtype=np.int64).tobytes())
        digest.update(repr((self.size, sorted(self.id2label.items()))).encode())
        return digest.hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """What a run remembers of its data, to be resumed on the same."""
        return {"data": self.name, "data_size": self.size, "data_fingerprint": self.fingerprint}


@dataclass(frozen=True)
class ImageSource(LabelledSource):
    """A labelled set of images; `read` gives them decoded.

    Attributes:
        channels: 1 or 3.
        flip: whether mirroring keeps the class by default.
        resolution: default image side in pixels.
        latents: what stands for the images where they were encoded beforehand; `read` then raises.
    """

    channels: int = 3
    flip: bool = True
    resolution: int = 256
    latents: EncodedLatents | None = None


def refuse_unreadable(messages: Sequence[str], remedy: str) -> None:
    """Stop where there are messages of images that cannot be decoded.

    Raises:
        UnreadableImageError: there are; the first is named, the others are counted.
    """
    if messages:
        more = f", and {len(messages) - 1:,} more" if len(messages) > 1 else ""
        raise UnreadableImageError(f"{messages[0]}{more}. {remedy}")


def held_out(source: SourceT, share: float = HELD_OUT_SHARE) -> tuple[SourceT, SourceT]:
    """Split a source into two, each class by the same share; the same split every time.

    Raises:
        ValueError: it is a stream, or too small.
    """
    from sklearn.model_selection import train_test_split

    SHARE.check(share, "share")
    if source.stream is not None:
        raise ValueError("a stream has no index and cannot be split; name other images to validate on.")
    parts = train_test_split(np.arange(source.size), test_size=share, random_state=0, stratify=source.labels)
    train, held = (subset(source, np.sort(part)) for part in parts)
    return train, replace(held, name=f"{source.name}, held out")


def subset(source: SourceT, indices: np.ndarray) -> SourceT:
    """Some of a source, by their indices (N,), whole numbers."""
    indices = np.asarray(indices)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise ValueError(f"indices={shown(indices)} is not a list of whole numbers, one an image.")
    indices = indices.astype(np.int64)
    if indices.size and not 0 <= indices.min() <= indices.max() < source.size:
        raise ValueError(
            f"indices go from {indices.min()} to {indices.max()}; {source.name} has {source.size} {source.things}."
        )
    return replace(
        source,
        size=len(indices),
        read=lambda index: source.read(int(indices[index])),
        labels=source.labels[indices],
        files=(),
        unreadable=(),
    )


def no_image(reason: str) -> Callable[[int], PIL.Image.Image]:
    """A `read` for sources without images to read by index."""

    def read(index: int) -> PIL.Image.Image:
        raise UnreadableImageError(f"image {index} cannot be read: {reason}")

    return read


def default_resolution(read: Callable[[int], PIL.Image.Image], size: int) -> int:
    """The largest power of two within the first readable image, from 16 to 256.

    Raises:
        ValueError: no image can be read.
    """
    first: UnreadableImageError | None = None
    for index in range(size):
        try:
            return power_of_two_side(read(index))
        except UnreadableImageError as error:
            first = first or error  # reported when training comes to it, as --on-bad-image says
    raise ValueError(f"no image of the data set can be read; the first of {size:,}: {first}.")


def power_of_two_side(image: PIL.Image.Image) -> int:
    """The largest power of two within an image, from 16 to 256."""
    return max(16, min(256, 2 ** (min(image.size).bit_length() - 1)))
