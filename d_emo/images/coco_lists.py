"""COCO's lists of pictures, categories and annotations, checked: instances and panoptic JSON alike."""

import collections
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from d_emo.common.files import read_json
from d_emo.common.messages import printable, readable_size, shown
from d_emo.common.output import Progress, say
from d_emo.images.labels import class_name

# A file from so many bytes on is said to be read: it takes a while before there is anything to count.
LARGE = 50_000_000
# What tools call the folder of pictures beside their list.
USUAL_FOLDERS = ("images", "data")
# So many names are looked for at most to find where they begin.
TRIED = 10


class CocoList:
    """A list of COCO's form, checked.

    Args:
        path: the JSON file.

    Attributes:
        panoptic: whether it is a panoptic list.
        names: of the categories by their ids, in the order of the ids; several may have the same.
        stuff: ids of the categories that are no things; none of an instances list.
        files, ids: of the pictures.
        places: of the pictures by their ids.
        sides: (I, 2) width and height of the pictures; 0 where it is not told.
        annotations: as they are in the file.

    Raises:
        ValueError: it is damaged, or of another form; the message does not name a file that is there.
    """

    def __init__(self, path: Path):
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file of annotations.")
        if (size := path.stat().st_size) >= LARGE:
            say(f"reading {path} ({readable_size(size)})")
        content = read_json(path, "copy or export it again")
        lists: dict[str, Any] = {name: content.get(name) for name in ("images", "annotations", "categories")}
        for name, entries in lists.items():
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f"it has no list {name!r}; COCO's lists have images, annotations, categories.")
            if not entries:
                raise ValueError(f"its list {name!r} is empty.")
        images, self.annotations, categories = lists.values()
        self.panoptic = "segments_info" in self.annotations[0]
        names = {whole(entry, "id", "a category"): entry.get("name") for entry in categories}
        if len(names) < len(categories):
            raise ValueError("two categories have the same id; give each its own.")
        for number, name in names.items():
            if not isinstance(name, str) or not class_name(name):
                raise ValueError(f"the category {number} has no name, but {shown(name)}.")
        self.names = {number: class_name(names[number]) for number in sorted(names)}
        self.stuff = {whole(entry, "id", "") for entry in categories if self.panoptic and not entry.get("isthing")}
        self.ids = [whole(entry, "id", "an image") for entry in images]
        self.places = {number: place for place, number in enumerate(self.ids)}
        if len(self.places) < len(self.ids):
            twice = next(number for place, number in enumerate(self.ids) if self.places[number] != place)
            raise ValueError(f"two images have the id {twice}; give each its own.")
        self.files = [entry.get("file_name") for entry in images]
        if wrong := [place for place, name in enumerate(self.files) if not isinstance(name, str)]:
            raise ValueError(f"the image {self.ids[wrong[0]]} has no file_name.")
        sides = [[_side(entry.get(name)) for name in ("width", "height")] for entry in images]
        # Of a picture that is listed several times, once for each object by some tools, the first entry counts for all.
        first = {name: place for place, name in reversed([*enumerate(self.files)])}
        kept = sorted(first.values())
        new = {old: place for place, old in enumerate(kept)}
        self.places = {number: new[first[self.files[place]]] for number, place in self.places.items()}
        self._repeated = len(self.files) - len(kept)
        self.ids, self.files = [self.ids[place] for place in kept], [self.files[place] for place in kept]
        self.sides = np.array([sides[place] for place in kept])
        self._unlisted = 0

    def place(self, entry: Mapping[str, Any], what: str) -> int | None:
        """The place of the picture that an annotation is of; None where there is none, which is counted."""
        place = self.places.get(whole(entry, "image_id", what))
        self._unlisted += place is None
        return place

    def category(self, entry: Mapping[str, Any], what: str) -> int:
        """The category of an annotation or segment, which is listed."""
        number = whole(entry, "category_id", what)
        if number not in self.names:
            raise ValueError(f"{what} has the category {number}, which is not listed.")
        return number

    def panoptic_pictures(self) -> dict[int, tuple[str, list[dict[str, Any]]]]:
        """Of a panoptic list: the name of each picture's panoptic one and its segments, by the picture's place."""
        found: dict[int, tuple[str, list[dict[str, Any]]]] = {}
        for entry in self.annotations:
            if (place := self.place(entry, "an annotation")) is None:
                continue
            number, segments, name = self.ids[place], entry.get("segments_info"), entry.get("file_name")
            if not isinstance(segments, list) or not all(isinstance(part, dict) for part in segments):
                raise ValueError(f"the annotation of image {number} has no list segments_info.")
            if not isinstance(name, str) or place in found:
                what = "two annotations" if isinstance(name, str) else "an annotation without a file_name"
                raise ValueError(f"the image {number} has {what}.")
            found[place] = name, segments
        return found

    def note(self, what: str) -> str:
        """What was left out so far, for people: how many of `what`, of images that are not listed, and images again."""
        left = f"left out: {self._unlisted:,} {what} of images that are not listed" if self._unlisted else ""
        again = (
            f"{self._repeated:,} images are listed again, whose {what} count for the first" if self._repeated else ""
        )
        return "; ".join(filter(None, [left, again]))


def existing(folder: Path, files: list[str]) -> list[Path]:
    """The files of a folder, or of one in it that is called as tools call it.

    Names may begin with the folders of another machine, or be addresses: what all have in front of what is here is
    passed over, and said.

    Raises:
        ValueError: a name leads elsewhere, or files are missing.
    """
    names = [PurePosixPath(name.replace("\\", "/")).parts for name in files]
    begin, passed = _beginning(folder, names)
    if passed:
        say(f"{printable(str(folder))}: file_names are read without what they begin with, {shown(files[0])} from "
            f"{shown('/'.join(names[0][passed:]))} on")  # fmt: skip
    found, missing = [], []
    with Progress(len(files), "file", f"looking into {begin}") as progress:
        for name, parts in zip(files, names, strict=True):
            if not _inside(parts[passed:]):
                raise ValueError(f"the file_name {shown(name)} leads out of {folder}; write names inside of it.")
            path = begin.joinpath(*parts[passed:])
            found.append(path)
            if not path.is_file():
                missing.append(name)
            progress.update()
    if missing:
        more = f", nor {len(missing) - 1:,} others of {len(files):,}" if len(missing) > 1 else ""
        raise ValueError(
            f"it names {printable(missing[0])}, which is not in {printable(str(folder))}{more}; name the folder that "
            "its file_names begin in, or fetch the files."
        )
    if len({*found}) < len(found):
        twice = collections.Counter(found).most_common(1)[0][0]
        raise ValueError(f"several of its file_names mean {printable(str(twice))}; name the folder that they begin in.")
    return found


def _beginning(folder: Path, names: Sequence[Sequence[str]]) -> tuple[Path, int]:
    """The folder that names begin in, and how many of their parts are passed over; told by the first that is found."""
    places = [place for place in (folder, *(folder / name for name in USUAL_FOLDERS)) if place.is_dir()]
    for parts in names[:TRIED]:
        for passed in range(len(parts)):
            for place in places:
                if _inside(parts[passed:]) and place.joinpath(*parts[passed:]).is_file():
                    return place, passed
    return folder, 0


def _inside(parts: Sequence[str]) -> bool:
    """Whether a name's parts lead to a file below where they begin."""
    return bool(parts) and parts[0] != "/" and ":" not in parts[0] and not {"..", "\0"} & {*parts, *"".join(parts)}


def number(value: Any) -> float | None:
    """A number, also one that is too large; None where it is none."""
    if type(value) not in (int, float):
        return None
    try:
        return float(value)
    except OverflowError:
        return float("inf")


def whole(entry: Mapping[str, Any], key: str, what: str) -> int:
    """A whole number of an entry, also as a text or as a float; `what` is the entry, for messages."""
    value = entry.get(key)
    if isinstance(value, str) and value.isdecimal() and len(value) < 19:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not -(2**63) <= value < 2**63:
        raise ValueError(f"{what} has the {key} {shown(value)}, which is no whole number.")
    return value


def _side(value: Any) -> int:
    """A side in pixels; 0 where it is not told."""
    if value is None or (value == 0 and value is not False):
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31 or value != int(value):
        raise ValueError(f"an image has the width or height {shown(value)}, which is no number of pixels.")
    return int(value)
