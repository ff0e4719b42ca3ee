"""COCO's lists of pictures, categories and annotations, checked: instances and panoptic JSON alike."""

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from d_emo.common.files import read_json
from d_emo.common.messages import printable, readable_size, shown
from d_emo.common.output import Progress, say
from d_emo.images.labels import class_name

# A file from so many bytes on is said to be read: it takes a while before there is anything to count.
LARGE = 50_000_000


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
        self.sides = np.array([[_side(entry.get(name)) for name in ("width", "height")] for entry in images])
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
        """What was left out so far, for people: how many of `what`, of images that are not listed."""
        return f"left out: {self._unlisted:,} {what} of images that are not listed" if self._unlisted else ""


def existing(folder: Path, files: list[str]) -> list[Path]:
    """The files of a folder.

    Raises:
        ValueError: a name leads elsewhere, or files are missing.
    """
    found, missing = [], []
    with Progress(len(files), "file", f"looking into {folder}") as progress:
        for name in files:
            parts = PurePosixPath(name.replace("\\", "/"))
            if parts.is_absolute() or ".." in parts.parts or "\0" in name or not parts.parts or ":" in parts.parts[0]:
                raise ValueError(f"the file_name {shown(name)} leads out of {folder}; write names inside of it.")
            path = folder / parts
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
    return found


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
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 2**31 or value != int(value):
        raise ValueError(f"an image has the width or height {shown(value)}, which is no number of pixels.")
    return int(value)
