"""What all sets of pictures with a class at every pixel have in common; `masks` has the ways in which they are stored.

Masks' numbers become ids by one rule (`LabelRule`): 0 to K - 1, and 255 where nothing is known. What is wrong with a
set (sizes, numbers that are no class) is told when it is opened, as far as `SURVEYED` masks show it, and otherwise
where it is read.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import PIL.Image

from d_emo.common.messages import printable
from d_emo.common.output import Progress
from d_emo.images.decode import UnreadableImageError, decode, upright_size
from d_emo.images.mask_files import IGNORED, Color, Palette
from d_emo.images.source import SHARE

# So many masks, evenly spread, are looked at when a set whose classes are named is opened; all of others.
SURVEYED = 2000
# From so many on, that shows its progress.
SLOW_SURVEY = 500
# Of a set of two classes without names.
BINARY_NAMES = ("background", "object")
WHITE = 255
# White of 8 and of 16 bits: 1 of masks that hold nothing but 0 beside it.
WHITES = (WHITE, 65535)


@dataclass(frozen=True)
class LabelledPicture:
    """A picture and what is seen at its pixels.

    Attributes:
        image: RGB.
        labels: (H, W) int32, class ids 0 to K - 1, or 255 where nothing is known.
        name: of the picture, for messages.
    """

    image: PIL.Image.Image
    labels: np.ndarray
    name: str


@dataclass(frozen=True)
class StoredPair:
    """A picture and its mask, not decoded yet.

    Attributes:
        image: a path or a function that opens a binary file.
        name, mask_name: for messages.
        mask: reads the mask's numbers, (H, W) int32.
        colors: the colour of each number by the mask's own palette; None where colours do not count.
    """

    image: Any
    name: str
    mask: Callable[[], np.ndarray]
    mask_name: str
    colors: Callable[[], Mapping[int, Color]] | None = None

    def open_image(self) -> Any:
        """What decoders open."""
        return self.image() if callable(self.image) else self.image


@dataclass(frozen=True)
class LabelRule:
    """How the numbers in masks become ids.

    Attributes:
        num_classes: K.
        reduce_zero_label: 0 is no class, and the others are one less, as of ADE20K.
        ignore_index: a number that is no class.
        binary: 255 is class 1, as programs that draw save it.
    """

    num_classes: int
    reduce_zero_label: bool = False
    ignore_index: int = IGNORED
    binary: bool = False

    def __call__(self, numbers: np.ndarray, name: str) -> np.ndarray:
        """(H, W) int32 to ids of that shape.

        Raises:
            UnreadableImageError: a number is no class.
        """
        labels = numbers.copy()
        if self.binary:
            labels[np.isin(numbers, WHITES)] = 1
        elif self.reduce_zero_label:
            labels -= 1
        known = (labels >= 0) & (labels < self.num_classes)
        if self.binary:
            known &= numbers != 1
        ignored = (numbers == self.ignore_index) & ~np.bool_(self.binary and self.ignore_index == WHITE)
        if self.reduce_zero_label:
            ignored |= numbers == 0
        unknown = ~(known | ignored)
        if unknown.any():
            raise UnreadableImageError(self.refusal(int(numbers[unknown][0]), name))
        labels[ignored] = IGNORED
        return labels

    def refusal(self, number: int, name: str) -> str:
        """What to say of a number that is no class."""
        first, last = (1, self.num_classes) if self.reduce_zero_label else (0, self.num_classes - 1)
        if self.binary:
            return f"{printable(name)} holds {number}, where other masks hold 0 and 255 alone; save all of them alike."
        return (
            f"{printable(name)} holds {number}, which is no class: they are {first} to {last}, and {self.ignore_index} "
            "is ignored. Name all classes (--class-names), or the number that is none (--ignore-index)."
        )


@dataclass(frozen=True)
class PixelSource:
    """A set of pictures with a class at every pixel.

    Attributes:
        name: what to call it in messages and run names.
        size: number of pictures.
        read: index -> picture and labels; raises UnreadableImageError.
        id2label: class names by id.
        keys: names of the pictures, by which a run knows its data again.
        binary: whether 255 is class 1 in the masks (True) or no class (False); None where it does not occur.
        num_workers: default number of loader processes.
        stream: always None: it is read by index.
        note: what was left out, for people.
        damaged: messages of pictures of which it is known already that they cannot be decoded, by their index.
    """

    name: str
    size: int
    read: Callable[[int], LabelledPicture]
    id2label: dict[int, str]
    keys: Sequence[str] = ()
    binary: bool | None = None
    num_workers: int = 4
    stream: None = None
    note: str = ""
    damaged: Mapping[int, str] = field(default_factory=dict)

    @property
    def unreadable(self) -> list[str]:
        """Messages of the pictures that cannot be decoded, as far as it is known."""
        return list(self.damaged.values())

    def describe_size(self) -> str:
        """How many pictures, for people."""
        count = f"{self.size:,} image{'' if self.size == 1 else 's'}"
        return f"{count} ({self.note})" if self.note else count

    @property
    def fingerprint(self) -> str:
        """Changes with the pictures' number and names and with the classes; a run is resumed on the same data only."""
        content = repr((self.size, list(self.keys), sorted(self.id2label.items())))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def identity(self) -> dict[str, Any]:
        """What a run remembers of its data, to be resumed on the same ones."""
        return {"data": self.name, "data_size": self.size, "data_fingerprint": self.fingerprint}


def pixel_subset(source: PixelSource, indices: Sequence[int]) -> PixelSource:
    """Some pictures of a source, by their indices."""
    chosen = [int(index) for index in indices]
    return replace(
        source,
        size=len(chosen),
        read=lambda index: source.read(chosen[index]),
        keys=[source.keys[index] for index in chosen],
        damaged={place: source.damaged[index] for place, index in enumerate(chosen) if index in source.damaged},
    )


def held_out_pixels(source: PixelSource, share: float) -> tuple[PixelSource, PixelSource]:
    """Split a source into two, the same way every time: pictures to train on and a share to validate on.

    Raises:
        ValueError: one of them would be empty.
    """
    SHARE.check(share, "share")
    count = round(share * source.size)
    if not 0 < count < source.size:
        raise ValueError(f"{share:g} of {source.size} images leave nothing to train on or nothing to validate on.")
    order = np.random.default_rng(0).permutation(source.size)
    held, kept = (pixel_subset(source, np.sort(part).tolist()) for part in (order[:count], order[count:]))
    return kept, replace(held, name=f"{source.name}, held out")


@dataclass(frozen=True)
class MaskOptions:
    """What a user says of a set's masks.

    Attributes:
        class_names: in the order of the ids; None to be told by the masks, or by the palette.
        reduce_zero_label, ignore_index: see `LabelRule`; None for 255, but where masks hold 0 and 255 alone.
        palette: of masks of colours.
        binary: what the set has that this one goes with; see `PixelSource`.
    """

    class_names: Sequence[str] | None = None
    reduce_zero_label: bool = False
    ignore_index: int | None = None
    palette: Palette | None = None
    binary: bool | None = None


def pixel_source(
    name: str, keys: Sequence[str], stored: Callable[[int], StoredPair], options: MaskOptions, note: str = ""
) -> PixelSource:
    """A source of pairs that are stored somewhere, looked through as far as it must be.

    Args:
        name: of it.
        keys: of the pictures.
        stored: index -> pair.
        options: of the masks.
        note: for people.

    Raises:
        ValueError: sizes differ, or numbers are no class.
    """
    names = options.class_names
    if names is None and options.palette is not None and options.palette.names:
        names = options.palette.names
    count = len(keys) if names is None else min(len(keys), SURVEYED)
    looked_at = np.unique(np.linspace(0, len(keys) - 1, count).astype(int)).tolist()
    numbers, damaged = _survey(stored, looked_at)
    if damaged and not numbers:
        raise ValueError(
            f"none of its {len(keys):,} masks and pictures can be used; the first: {damaged[looked_at[0]]}."
        )
    rule = _rule(numbers, names, options)
    if names is None:
        names = BINARY_NAMES if rule.binary else [str(number) for number in range(rule.num_classes)]
    if len(names) > IGNORED:
        raise ValueError(f"{len(names)} classes; masks here have up to {IGNORED}.")

    def read(index: int) -> LabelledPicture:
        pair = stored(index)
        image, found = decode(pair.open_image(), pair.name), pair.mask()
        _refuse_size(pair, image.size, found)
        return LabelledPicture(image, rule(found, pair.mask_name), pair.name)

    for number, place in numbers.items():
        try:
            rule(np.array([[number]], dtype=np.int32), stored(place).mask_name)
        except UnreadableImageError as error:
            raise ValueError(str(error)) from error
    return PixelSource(
        name=name,
        size=len(keys),
        read=read,
        id2label=dict(enumerate(names)),
        keys=keys,
        binary=rule.binary if {*WHITES} & {*numbers} else None,
        note=note,
        damaged=damaged,
    )


def _survey(stored: Callable[[int], StoredPair], places: Sequence[int]) -> tuple[dict[int, int], dict[int, str]]:
    """The numbers that masks hold, each with the first place where it is, and messages of damaged files by place.

    Raises:
        ValueError: a mask has another size than its picture, or two masks' palettes give the same numbers to others.
    """

    def look(place: int) -> dict[int, Color | None] | str:
        try:
            pair = stored(place)
            numbers = pair.mask()
            _refuse_size(pair, upright_size(pair.open_image(), pair.name), numbers)
            colors = pair.colors() if pair.colors else {}
            return {number: colors.get(number) for number in np.unique(numbers).tolist()}
        except SizeError:
            raise
        except UnreadableImageError as error:
            return str(error)

    found: dict[int, int] = {}
    damaged: dict[int, str] = {}
    palettes = _PaletteCheck()
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        Progress(len(places), "mask", "reading", shown=len(places) > SLOW_SURVEY, leave=False) as progress,
    ):
        try:
            for place, answer in zip(places, pool.map(look, places), strict=True):
                progress.update()
                if isinstance(answer, str):
                    damaged[place] = answer
                    continue
                palettes.add(answer, stored(place).mask_name)
                for number in answer:
                    found.setdefault(number, place)
        except (SizeError, PaletteError) as error:
            pool.shutdown(cancel_futures=True)
            raise ValueError(str(error)) from error
    return found, damaged


class SizeError(UnreadableImageError):
    """A mask of another size than its picture."""


class PaletteError(UnreadableImageError):
    """Masks whose palettes are in different orders."""


class _PaletteCheck:
    """Whether the numbers of palette pictures mean the same in all of them.

    Programs that make files smaller give every file a palette of its own, in any order. That is so where a number has
    another colour than it had before, and that colour had another number.
    """

    def __init__(self) -> None:
        self.colors: dict[int, Color] = {}
        self.numbers: dict[Color, tuple[int, str]] = {}

    def add(self, colors: Mapping[int, Color | None], name: str) -> None:
        """Compare a mask's numbers and their colours with those before.

        Raises:
            PaletteError: they are in another order.
        """
        for number, color in colors.items():
            if color is None:
                continue
            other, place = self.numbers.setdefault(color, (number, name))
            if self.colors.setdefault(number, color) != color and colors.get(other) != color:
                raise PaletteError(
                    f"the colour {' '.join(map(str, color))} is number {number} in {printable(name)} and {other} in "
                    f"{printable(place)}: every file has a palette of its own, so that numbers do not tell the "
                    "classes. Say which colour is which class: --palette FILE."
                )


def _refuse_size(pair: StoredPair, size: tuple[int, int], numbers: np.ndarray) -> None:
    height, width = numbers.shape
    if (width, height) != size:
        turned = " (one of them may be turned by what its EXIF says)" if (height, width) == size else ""
        raise SizeError(
            f"{printable(pair.mask_name)} has {width} x {height} pixels, and its picture {printable(pair.name)} "
            f"{size[0]} x {size[1]}{turned}: every pixel needs a class. Make them the same size."
        )


def _rule(numbers: dict[int, int], names: Sequence[str] | None, options: MaskOptions) -> LabelRule:
    """How these numbers become ids.

    Raises:
        ValueError: there are none, or they do not tell how many classes there are.
    """
    reduced, told = options.reduce_zero_label, options.ignore_index
    ignored = IGNORED if told is None else told
    if names is not None:
        binary = (
            len(names) == 2
            and told is None
            and options.palette is None
            and not reduced
            and (bool({*WHITES} & {*numbers}) if options.binary is None else options.binary)
            and {*numbers} <= {0, *WHITES}
        )
        return LabelRule(len(names), reduced, ignored, binary)
    if options.palette is not None:
        return LabelRule(int(options.palette.ids[options.palette.ids != IGNORED].max()) + 1, reduced, ignored)
    if told is None and not reduced and {0} < {0, *numbers} <= {0, *WHITES}:
        return LabelRule(2, binary=True)
    ids = {number - reduced for number in numbers if number != ignored and not (reduced and number == 0)}
    if not ids:
        raise ValueError("no pixel of its masks has a class; name them: --class-names FILE.")
    count = max(ids) + 1
    if missing := sorted({*range(min(count, 1 + IGNORED))} - ids - {ignored - reduced}):
        raise ValueError(
            f"its masks hold {_shown(sorted(numbers))}, but not {missing[0] + reduced}, so that they do not tell the "
            "classes; name them, in the order of the ids: --class-names FILE (or say which number is none: "
            "--ignore-index)."
        )
    return LabelRule(count, reduced, ignored)


def _shown(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
