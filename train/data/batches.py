"""How images become batches: training on any `ImageSource`.

Sources: scikit-learn's digits (the default), a tree of class folders, a `datasets` source (Hub id, local folder,
parquet), WebDataset shards, latents. All of them are read by index, decoded on access; `stream_loader` has those that
are read from front to back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import PIL.Image
import torch
from torch.utils.data import Dataset

from d_emo.images.decode import UnreadableImageError, to_tensor
from d_emo.images.source import ImageSource, LabelledSource
from d_emo.train.data import stream

if TYPE_CHECKING:
    from d_emo.images.features import StoredTeacher

Found = TypeVar("Found")


@dataclass(frozen=True)
class StreamPlace:
    """Where a process is in its share of a stream: the epoch, and how many images of it were read."""

    epoch: int = 0
    offset: int = 0


@dataclass(frozen=True)
class Batch:
    """One micro batch of one process.

    Attributes:
        images: (B, channels, side, side) as the trainer prepares them; (B, M, C, h, w), the autoencoder's posteriors,
            where the source was encoded beforehand; whatever else a trainer's own `collate` makes, such as clips.
        labels: (B,) class ids, before label dropout; or a trainer's own targets, such as maps of classes.
        positions: B places in the stream of samples, the key of every random draw.
        bad_images: messages of the images that could not be read and were replaced.
        place: where a stream was after this batch.
        draws: random numbers of its samples by purpose, where they were drawn beforehand.
        features: (B, T, h, w), what a vision model said of the images, where that is kept with their latents.
    """

    images: Any
    labels: Any
    positions: list[int]
    bad_images: list[str]
    place: StreamPlace | None = None
    draws: dict[str, torch.Tensor] = field(default_factory=dict)
    features: torch.Tensor | None = None

    def pin_memory(self) -> "Batch":
        """The batch in memory that a GPU copies from by itself; PyTorch's loaders ask for it by this name."""
        found = {name: _pinned(getattr(self, name)) for name in ("images", "labels", "draws", "features")}
        return replace(self, **found)


def _pinned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if isinstance(value, Mapping):
        return {name: _pinned(each) for name, each in value.items()}
    return [_pinned(each) for each in value] if isinstance(value, (list, tuple)) else value


# What a trainer makes of an image at a position of the stream; a pure function of both.
Preparation = Callable[[Any, int], torch.Tensor]
# Data, class id or target, position, messages of images that could not be read.
Sample = tuple[Any, Any, int, list[str]]


class SampleSource(Protocol):
    """What is read by index, whatever a sample is."""

    @property
    def name(self) -> str:
        """What to call it in messages and run names."""

    @property
    def size(self) -> int:
        """How many samples; 0 where a stream does not tell."""

    @property
    def read(self) -> Callable[[int], Any]:
        """Index -> sample; raises UnreadableImageError."""


@dataclass(frozen=True)
class Pixels:
    """The diffusion trainers' preparation: (channels, side, side) in [-1, 1], mirrored where the position says so."""

    channels: int
    side: int
    flip: bool
    seed: int

    def __call__(self, image: PIL.Image.Image, position: int) -> torch.Tensor:
        data = to_tensor(image, self.channels, self.side)
        return data.flip(-1) if self.flip and stream.flips(self.seed, position) else data


class TrainingSamples(Dataset):
    """Reads `(position, index)` pairs and prepares the samples.

    An unreadable one is replaced by the next readable one and reported in the batch, so that the trainer stops or goes
    on as the user chose, in one place.

    Args:
        source: of what is read.
        prepare: a sample and its position -> data and target; a pure function of both. Raises UnreadableImageError
            where only then something turns out to be unreadable.
    """

    source: SampleSource
    prepare: Callable[[Any, int], Any]

    def __init__(self, source: SampleSource, prepare: Callable[[Any, int], tuple[Any, Any]]):
        self.source = source
        self.prepare = prepare

    def __len__(self) -> int:
        return self.source.size

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        position, index = key
        (data, target), bad_images = self.first_readable(index, lambda candidate: self.prepared(candidate, position))
        return data, target, position, bad_images

    def prepared(self, index: int, position: int) -> tuple[Any, Any]:
        """Data and target of a sample."""
        return self.prepare(self.source.read(index), position)

    def first_readable(self, index: int, read: Callable[[int], Found]) -> tuple[Found, list[str]]:
        """What `read` makes of an index, or of the next one that it can read, and messages of those before."""
        bad_images: list[str] = []
        for offset in range(self.source.size):
            try:
                return read((index + offset) % self.source.size), bad_images
            except UnreadableImageError as error:
                bad_images.append(str(error))
        things = getattr(self.source, "things", "images")
        raise UnreadableImageError(
            f"none of the {self.source.size} {things} of {self.source.name} can be read; the first: {bad_images[0]}"
        )


class TrainingImages(TrainingSamples):
    """Images, or other things, with their class ids."""

    source: LabelledSource
    prepare: Preparation

    def __init__(self, source: LabelledSource, prepare: Preparation):
        self.source = source
        self.prepare = prepare

    def prepared(self, index: int, position: int) -> tuple[torch.Tensor, int]:
        """The image as it is prepared, and its class id."""
        return self.prepare(self.source.read(index), position), int(self.source.labels[index])

    def read(self, index: int) -> tuple[PIL.Image.Image, int, list[str]]:
        """The image, the index that it is of, and messages if that is another one."""
        found, bad_images = self.first_readable(index, lambda candidate: (self.source.read(candidate), candidate))
        return *found, bad_images


class TrainingLatents(Dataset):
    """Reads `(position, index)` pairs: posteriors of encoded images, mirrored where the position says so.

    With a teacher its features of the image are the second half of a sample's data.
    """

    def __init__(self, source: ImageSource, flip: bool, seed: int, teacher: "StoredTeacher | None" = None):
        assert source.latents is not None
        self.latents = source.latents
        self.labels = source.labels
        self.flip = flip
        self.seed = seed
        self.teacher = teacher

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        position, index = key
        flipped = self.flip and stream.flips(self.seed, position)
        data: Any = self.latents.read(index, flipped)
        if self.teacher is not None:
            data = data, self.teacher.read(index, flipped)
        return data, int(self.labels[index]), position, []


def collate(samples: Sequence[Sample], place: StreamPlace | None = None) -> Batch:
    """Stack samples into a `Batch`."""
    images, labels, positions, bad_images = zip(*samples, strict=True)
    features = None
    if isinstance(images[0], tuple):
        images, features = zip(*images, strict=True)
    return Batch(
        images=torch.stack(images),
        labels=torch.stack(labels) if isinstance(labels[0], torch.Tensor) else torch.tensor(labels),
        positions=list(positions),
        bad_images=[message for messages in bad_images for message in messages],
        place=place,
        features=None if features is None else torch.stack(features),
    )
