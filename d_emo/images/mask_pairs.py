"""Which mask belongs to which picture: folders beside each other, by the files' names.

A picture FOLDER/a/b.jpg has the mask MASKS/a/b.png: the same sub-folder and the same name, whatever the suffix. Names
that go on behind what both share end with `image_suffix` and `mask_suffix`, as Cityscapes' and CHASE_DB1's do; both are
told by the names where one ending fits all.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from d_emo.common.messages import printable
from d_emo.images.labels import class_name
from d_emo.images.listing import is_hidden, list_all, parts_among

# Names of folders, without regard to case; what people and published sets have.
IMAGE_FOLDERS = ("images", "image", "imgs", "img", "photos", "pictures", "jpegimages", "leftimg8bit")
MASK_FOLDERS = (
    "masks", "mask", "labels", "label", "annotations", "annotation", "segmentationclass", "gtfine", "panoptic",
)  # fmt: skip
# An ending of names begins with one.
MARKS = "_-. "
# What is done about pictures without a mask.
WithoutMasks = Literal["stop", "drop"]
# How many files a message names.
SHOWN = 3


@dataclass(frozen=True)
class Pairs:
    """Pictures and their masks, in the order of the pictures' paths.

    Attributes:
        images, masks: their files.
        note: what was left out, for people.
    """

    images: Sequence[Path]
    masks: Sequence[Path]
    note: str


def find_folders(root: Path, masks: Path | None, mask_suffix: str | None = None) -> tuple[Path, Path]:
    """The folders of pictures and of masks that a user means.

    Folders without any picture, such as VOC's `Annotations`, are none of masks.

    Args:
        root: the pictures' folder, or one that holds it and that of the masks, by names that are known.
        masks: the masks' folder; None for the one in `root`, or beside it, or beside a folder around it.
        mask_suffix: what masks' names end with; where there is no folder of masks, they may then lie in `root`.

    Raises:
        ValueError: no such folder, or several.
    """
    for folder in (root, masks):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{printable(str(folder))}: there is no such folder.")
    images = _named(root, IMAGE_FOLDERS)
    if masks is not None:
        inside = len(images) == 1 and masks.parent.resolve() == root.resolve() and masks.resolve() != root.resolve()
        return (images[0] if inside else root), masks
    found = _with_pictures(_named(root, MASK_FOLDERS))
    if len(images) == 1 and len(found) == 1:
        return images[0], found[0]
    if not found and not images:
        found = _with_pictures(_beside(root))
        if len(found) == 1:
            return root, found[0]
    if len(found) > 1:
        names = " and ".join(printable(str(folder)) for folder in found[:SHOWN])
        raise ValueError(f"its masks may be those of {names}; choose: --mask-dir.")
    if not found and mask_suffix:
        return (images[0] if len(images) == 1 else root,) * 2
    _refuse_parts(root, (path.name for path in root.iterdir() if path.is_dir()))
    raise ValueError(
        f"no folder of masks is found in it or beside it (by a name such as {', '.join(MASK_FOLDERS[:5])}); name the "
        "pictures' folder, and that of the masks: --mask-dir."
    )


def _named(root: Path, names: Sequence[str]) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.name.casefold() in names and path.is_dir())


def _with_pictures(folders: list[Path]) -> list[Path]:
    """Of several folders those that hold pictures, if any does."""
    return [folder for folder in folders if len(folders) == 1 or list_all(folder).pictures[folder]] or folders


def _beside(root: Path) -> list[Path]:
    """Where `root` would lie if a folder of images around it, or itself, were one of masks."""
    for place in (root.absolute(), *root.absolute().parents):
        if place.name.casefold() in IMAGE_FOLDERS:
            below = root.absolute().relative_to(place)
            return [folder / below for folder in _named(place.parent, MASK_FOLDERS) if (folder / below).is_dir()]
    return []


def find_pairs(
    images: Path,
    masks: Path,
    image_suffix: str | None = None,
    mask_suffix: str | None = None,
    without_masks: WithoutMasks = "stop",
) -> Pairs:
    """Every picture with its mask.

    Args:
        images, masks: the folders; one and the same where the masks' names end with `mask_suffix`.
        image_suffix: what the pictures' names end with behind what they share with the masks'; None to be told by the
            names, which works where one ending fits all.
        mask_suffix: likewise of the masks' names.
        without_masks: what is done about pictures that have none.

    Raises:
        ValueError: there are no pictures, pictures without a mask, masks without a picture, or two of one name.
    """
    same = images.resolve() == masks.resolve()
    if same and not mask_suffix:
        raise ValueError(
            "pictures and masks lie in the same folder; say what the masks' names end with: --mask-suffix."
        )
    listing, masks_listing = list_all(images), list_all(masks)
    pictures = [path for path in listing.pictures[images] if same or not _within(path, masks)]
    if same:
        pictures = [path for path in pictures if not path.stem.endswith(str(mask_suffix))]
    _refuse_parts(images, (path.relative_to(images).parts[0] for path in pictures if path.parent != images))
    found = [path for path in masks_listing.pictures[masks] if same or not _within(path, images)]
    image_suffix = _told_image_suffix(pictures, images, found, masks, mask_suffix, image_suffix)
    by_key = _by_key(pictures, images, image_suffix)
    if not by_key:
        ending = f" whose names end with {image_suffix}" if image_suffix else ""
        note = f" ({listing.note})" if listing.note else ""
        raise ValueError(f"there are no pictures{ending} in {printable(str(images))}{note}.")
    suffix = mask_suffix if mask_suffix is not None else _told_suffix(list(by_key), _by_key(found, masks, ""), masks)
    mask_of = _by_key(found, masks, suffix)
    lonely = [path for key, path in by_key.items() if key not in mask_of]
    dropped = 0 if without_masks == "stop" or len(lonely) == len(by_key) else len(lonely)
    if dropped:
        by_key = {key: path for key, path in by_key.items() if key in mask_of}
    elif lonely:
        expected = Path(_key(lonely[0], images, image_suffix) + suffix).name
        note = f" ({masks_listing.note})" if masks_listing.note else ""
        raise ValueError(
            f"{_listed(lonely)} without a mask; {printable(expected)}.png or of another format is not in "
            f"{printable(str(masks))}{note}. Remove them, add their masks, leave them out "
            "(--images-without-masks drop), or say what names end with: --mask-suffix, --image-suffix."
        )
    if lonely := [path for key, path in mask_of.items() if key not in by_key]:
        raise ValueError(f"{_listed(lonely)} without a picture in {printable(str(images))}. Remove them, or add those.")
    left = len(pictures) - len(by_key) - dropped, len(found) - len(mask_of)
    notes = [
        f"{count:,} {what} by their names" for count, what in zip(left, ("pictures", "masks"), strict=True) if count
    ]
    notes += [f"{dropped:,} pictures without a mask"] if dropped else []
    note = "; ".join(part for part in (listing.note, f"left out: {', '.join(notes)}" if notes else "") if part)
    return Pairs(list(by_key.values()), [mask_of[key] for key in by_key], note)


def _key(path: Path, root: Path, suffix: str) -> str:
    relative = path.relative_to(root)
    stem = relative.name[: len(relative.name) - len(relative.suffix)]
    return class_name((relative.parent / stem[: len(stem) - len(suffix)]).as_posix())


def _by_key(paths: Sequence[Path], root: Path, suffix: str) -> dict[str, Path]:
    """Files whose names end with a suffix, by what stands before."""
    found: dict[str, Path] = {}
    for path in paths:
        if not path.stem.endswith(suffix) or is_hidden(path.name):
            continue
        other = found.setdefault(_key(path, root, suffix), path)
        if other is not path:
            raise ValueError(
                f"{printable(str(other))} and {printable(path.name)} have the same name but for the suffix; keep one."
            )
    return found


def _told_image_suffix(
    pictures: Sequence[Path],
    images: Path,
    found: Sequence[Path],
    masks: Path,
    mask_suffix: str | None,
    told: str | None,
) -> str:
    """The shortest ending of all pictures' names without which every one has a mask; what is told goes first.

    An ending begins with a mark and has a letter, as "_leftImg8bit": numbers say which picture it is.
    """
    if told is not None or not pictures:
        return told or ""
    stems = {path.stem for path in pictures}
    first = min(stems)
    endings = [first[place:] for place in range(len(first) - 1, 0, -1) if first[place] in MARKS]
    for ending in ("", *(ending for ending in endings if re.search(r"[^\W\d_]", ending))):
        if not all(stem.endswith(ending) for stem in stems):
            break
        keys = [_key(path, images, ending) for path in pictures]
        suffix = mask_suffix if mask_suffix is not None else _told_suffix(keys, _by_key(found, masks, ""), masks)
        if {*keys} <= _by_key(found, masks, suffix).keys():
            return ending
    return ""


def _told_suffix(pictures: Sequence[str], masks: dict[str, Path], folder: Path) -> str:
    """What all masks' names have behind their pictures'; empty where nothing fits.

    Raises:
        ValueError: several endings would fit.
    """
    if pictures[0] in masks:
        return ""
    first = pictures[0]
    endings = [key[len(first) :] for key in masks if key.startswith(first) and "/" not in key[len(first) :]]
    fitting = [ending for ending in endings if all(key + ending in masks for key in pictures)]
    if len(fitting) > 1:
        raise ValueError(
            f"the masks' names in {printable(str(folder))} end with {' or '.join(map(printable, fitting))}; choose: "
            "--mask-suffix."
        )
    return fitting[0] if fitting else ""


def _within(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())


def _refuse_parts(root: Path, folders: Iterable[str]) -> None:
    """Refuse a folder of whose folders several are parts of a data set."""
    parts = parts_among(folders)
    if len(parts) > 1:
        raise ValueError(
            f"{printable(str(root))} holds {' and '.join(parts)}, which are parts of a data set; name one of them: "
            f"{printable(str(root / parts[0]))}."
        )


def _listed(paths: Sequence[Path]) -> str:
    names = ", ".join(printable(str(path)) for path in paths[:SHOWN])
    count = "1 file is" if len(paths) == 1 else f"{len(paths):,} files are"
    return f"{names}{', ...' if len(paths) > SHOWN else ''}: {count}"
