"""Pictures with objects: boxes, classes, masks. What the sources of them have in common, whoever wrote their lists.

Boxes are (x1, y1, x2, y2) in pixels, corners of areas: a box over the whole of a picture is (0, 0, width, height).
"""

import collections
import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import PIL.Image

from d_emo.common.messages import shown
from d_emo.common.output import Progress
from d_emo.images.decode import UnreadableImageError
from d_emo.images.listing import describe_left_out
from d_emo.images.source import refuse_unreadable

# So many boxes that reach out of their pictures, more than half of all, are taken for corners.
MANY = 3
REACH = 1.5
# From so many pictures on, reading their headers shows its progress.
SLOW_SURVEY = 2000


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: RGB, H x W pixels.
        boxes: (N, 4) float32, inside of the picture and not empty.
        labels: (N,) int64 class ids, 0 to K - 1.
        masks: (N, H, W) bool; None where they were not asked for or are not known.
        crowd: (N,) bool, whether it is a group of objects that nobody told apart: left out of training, and what is
            found there is no mistake.
        areas: (N,) float32 in pixels, as the annotations say them, which decides what is small and large.
        name: of the picture.
        image_id: of the picture in its annotations, else its place.
    """

    image: PIL.Image.Image
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    crowd: np.ndarray
    areas: np.ndarray
    name: str
    image_id: int


@dataclass(frozen=True)
class ObjectSource:
    """Pictures with objects, read by index.

    Attributes:
        name: what to call it in messages and run names.
        size: number of pictures, those without objects included.
        read: index -> scene; raises UnreadableImageError.
        id2label: class names by id.
        has_masks: whether scenes have masks.
        counts: (size,) objects of each picture, crowds aside.
        sides: (size, 2) width and height of each picture in pixels; 0 where the annotations do not tell.
        fingerprint: of everything but the pixels.
        num_workers: default number of loader processes.
        stream: it is no stream.
        note: what was left out, for people.
        look: index -> nothing; raises UnreadableImageError where a picture's header says that it cannot be used. None
            where headers are not looked at.
    """

    name: str
    size: int
    read: Callable[[int], Scene]
    id2label: dict[int, str]
    has_masks: bool
    counts: np.ndarray
    sides: np.ndarray
    fingerprint: str
    num_workers: int = 4
    stream: None = None
    note: str = ""
    look: Callable[[int], None] | None = None

    def describe_size(self) -> str:
        """How many pictures and objects, for people."""
        about = f"{self.size:,} images with {int(self.counts.sum()):,} objects"
        return f"{about} ({self.note})" if self.note else about

    def identity(self) -> dict[str, Any]:
        """What a run remembers of its data, to be resumed on the same."""
        return {"data": self.name, "data_size": self.size, "data_fingerprint": self.fingerprint}


@dataclass
class ObjectTable:
    """Lists of pictures and objects as annotations have them, from which a source is made.

    Attributes:
        id2label: class names by id.
        sides: (I, 2) width and height; 0 where unknown.
        picture: (O,) place of each object's picture.
        boxes: (O, 4) float64 x, y, width, height as they were written.
        labels: (O,) class ids.
        crowd: (O,) bool.
        areas: (O,) float64, nan where they are not told.
        numbers: (O,) what the annotations call the objects.
        shapes: outlines, packed; None without masks.
        left_out: why and how many objects.
    """

    id2label: dict[int, str]
    sides: np.ndarray
    picture: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    numbers: np.ndarray
    shapes: "list[bytes] | None" = None
    left_out: collections.Counter = field(default_factory=collections.Counter)

    def tidy(self, corners: bool = False) -> "ObjectTable":
        """Objects by picture, boxes as corners inside of the pictures, without those that have no area there.

        Args:
            corners: boxes were written as x1, y1, x2, y2.

        Raises:
            ValueError: the boxes are of another form, or no object is left.
        """
        boxes = self.boxes.copy()  # (O, 4)
        wrong = ~np.isfinite(boxes).all(axis=1)
        if wrong.any():
            number = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"object {self.numbers[number]} has the box {boxes[number].tolist()}, which is not finite."
            )
        if corners:
            boxes[:, 2:] -= boxes[:, :2]
        sides = self.sides[self.picture].astype(np.float64)  # (O, 2), width and height
        known = sides.min(axis=1, initial=np.inf) > 0
        if not corners:
            self._refuse_other_forms(boxes, sides, known)
        flat = (boxes[:, 2:] <= 0).any(axis=1)
        boxes[:, 2:] += boxes[:, :2]
        limits = np.where(known[:, None], sides, np.inf)
        boxes = np.clip(boxes, 0, np.concatenate([limits, limits], axis=1)).astype(np.float32)
        outside = (boxes[:, 2:] <= boxes[:, :2]).any(axis=1) & ~flat
        for reason, chosen in (("without an area", flat), ("outside of their pictures", outside)):
            if chosen.any():
                self.left_out[f"objects {reason}"] += int(chosen.sum())
        kept = np.flatnonzero(~flat & ~outside)
        kept = kept[np.argsort(self.picture[kept], kind="stable")]
        if not len(kept):
            raise ValueError(f"no object is left ({describe_left_out(self.left_out) or 'there are none'}).")
        return ObjectTable(
            id2label=self.id2label,
            sides=self.sides,
            picture=self.picture[kept],
            boxes=boxes[kept],
            labels=self.labels[kept],
            crowd=self.crowd[kept],
            areas=self.areas[kept],
            numbers=self.numbers[kept],
            shapes=None if self.shapes is None else [self.shapes[number] for number in kept],
            left_out=self.left_out,
        )

    def _refuse_other_forms(self, boxes: np.ndarray, sides: np.ndarray, known: np.ndarray) -> None:
        """Refuse shares of the picture, and corners in place of width and height."""
        if len(boxes) and boxes.max() <= 1:
            raise ValueError("all boxes are within one pixel: they are shares; write x, y, width, height in pixels.")
        position, size = boxes[known, :2], boxes[known, 2:]
        out = (position + size > sides[known] + REACH).any(axis=1)
        fits = (size > position).all(axis=1) & (size <= sides[known] + REACH).all(axis=1)
        if out.sum() >= MANY and out.mean() > 0.5 and fits.mean() > 0.95:
            raise ValueError(
                f"{int(out.sum()):,} of {len(out):,} boxes reach out of their pictures as x, y, width, height, and fit "
                "as corners x1, y1, x2, y2; COCO's boxes are the former: write width and height."
            )

    def source(self, name: str, read_picture: Callable[[int], tuple[PIL.Image.Image, str, int]],
               masks_of: Callable[[int, slice, tuple[int, int]], np.ndarray] | None, files: Any,
               notes: "tuple[str, ...]" = ()) -> ObjectSource:  # fmt: skip
        """A source of a tidy table.

        Args:
            name: what to call it.
            read_picture: place -> picture, its name and its id.
            masks_of: place, objects, (height, width) -> (N, H, W) bool; None without masks. Raises ValueError.
            files: what the pictures are called, for the fingerprint.
            notes: what else is to be said.
        """
        places = len(self.sides)
        starts = np.searchsorted(self.picture, np.arange(places + 1))

        def read(index: int) -> Scene:
            image, picture, number = read_picture(index)
            width, height = image.size
            refuse_size((width, height), self.sides[index], picture)
            chosen = slice(int(starts[index]), int(starts[index + 1]))
            boxes = np.clip(self.boxes[chosen], 0, np.array([width, height] * 2, dtype=np.float32))
            inside = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # where the annotations do not tell the sides
            masks = None
            if masks_of is not None:
                try:
                    masks = masks_of(index, chosen, (height, width))[inside]
                except ValueError as error:
                    raise UnreadableImageError(f"{picture}: {error}") from error
            boxes, areas = boxes[inside], self.areas[chosen][inside]
            own = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) if masks is None else masks.sum(axis=(1, 2))
            return Scene(
                image=image,
                boxes=boxes,
                labels=self.labels[chosen][inside],
                masks=masks,
                crowd=self.crowd[chosen][inside],
                areas=np.where(np.isnan(areas), own, areas).astype(np.float32),
                name=picture,
                image_id=number,
            )

        return ObjectSource(
            name=name,
            size=places,
            read=read,
            id2label=self.id2label,
            has_masks=masks_of is not None,
            counts=np.bincount(self.picture[~self.crowd], minlength=places),
            sides=self.sides,
            fingerprint=self._fingerprint(files),
            note="; ".join(filter(None, [*notes, self._without_objects(), describe_left_out(self.left_out)])),
        )

    def _without_objects(self) -> str:
        unused = [name for number, name in self.id2label.items() if not (self.labels == number).any()]
        empty = len(self.sides) - len(np.unique(self.picture))
        classes = f"{len(unused):,} classes without objects" if unused else ""
        return ", ".join(filter(None, [f"{empty:,} images without objects" if empty else "", classes]))

    def _fingerprint(self, files: Any) -> str:
        digest = hashlib.sha256(repr((list(files), sorted(self.id2label.items()))).encode())
        for values in (self.sides, self.picture, self.boxes, self.labels, self.crowd):
            digest.update(np.ascontiguousarray(values).tobytes())
        for shape in self.shapes or ():
            digest.update(shape)
        return digest.hexdigest()[:16]


def refuse_size(size: tuple[int, int], sides: np.ndarray, name: str) -> None:
    """Refuse a picture of another size than its annotations say.

    Args:
        size: its width and height.
        sides: (2,), what the annotations say; 0 where they do not.
        name: of the picture.

    Raises:
        UnreadableImageError: they differ.
    """
    told = tuple(int(side) for side in sides)
    if min(told) > 0 and told != size:
        turned = ", it is turned by what its EXIF says" if told == size[::-1] else ""
        raise UnreadableImageError(
            f"{name} has {size[0]} x {size[1]} pixels, and its annotations say {told[0]} x {told[1]}{turned}; "
            "annotate it as it is"
        )


def refuse_unusable(source: ObjectSource, remedy: str) -> None:
    """Stop before any work where pictures' headers say that they cannot be used, such as those of another size.

    Raises:
        UnreadableImageError: there are such pictures; the first is named, the others are counted.
    """
    if (look := source.look) is None:
        return

    def said(index: int) -> str:
        try:
            look(index)
        except UnreadableImageError as error:
            return str(error)
        return ""

    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        Progress(source.size, "header", "reading", shown=source.size > SLOW_SURVEY, leave=False) as progress,
    ):
        messages = []
        for message in pool.map(said, range(source.size)):
            progress.update()
            messages += [message] if message else []
    refuse_unreadable(messages, remedy)


def some_of(source: ObjectSource, indices: np.ndarray, name: str = "") -> ObjectSource:
    """Some pictures of a source by their indices (M,), whole numbers, under the same name or another."""
    indices = np.asarray(indices)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise ValueError(f"indices={shown(indices)} is not a list of whole numbers, one an image.")
    if indices.size and not 0 <= indices.min() <= indices.max() < source.size:
        raise ValueError(f"indices go from {indices.min()} to {indices.max()}; {source.name} has {source.size} images.")
    look = source.look
    digest = hashlib.sha256(source.fingerprint.encode() + indices.astype(np.int64).tobytes())
    return replace(
        source,
        name=name or source.name,
        size=len(indices),
        read=lambda index: source.read(int(indices[index])),
        counts=source.counts[indices],
        sides=source.sides[indices],
        look=None if look is None else lambda index: look(int(indices[index])),
        fingerprint=digest.hexdigest()[:16],
    )


def relabelled(source: ObjectSource, table: np.ndarray, id2label: Mapping[int, str]) -> ObjectSource:
    """A source with the class ids of another one: `table` (K,) has the new id of each class, `id2label` their names."""

    def read(index: int) -> Scene:
        scene = source.read(index)
        return replace(scene, labels=table[scene.labels])

    return replace(source, read=read, id2label=dict(id2label))


def distinct_names(names: "dict[int, str]") -> "dict[int, str]":
    """Names by a category's id, those that several have with the id behind them."""
    several = {name for name, count in collections.Counter(names.values()).items() if count > 1}
    return {number: f"{name} ({number})" if name in several else name for number, name in names.items()}
