"""Pictures with objects by COCO's lists: instances and panoptic JSON (cocodataset.org/#format-data).

    source = coco_objects("images/train2017", "annotations/instances_train2017.json")
    scene = source.read(0)                                       # picture, boxes, labels, masks

Classes are numbered from 0 in the order of their categories' ids, which may have gaps; of a panoptic list only the
things. What cannot be an object (without an area, outside of its picture) is left out and counted in the source's note.
"""

from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import PIL.Image

from d_emo.common import checks
from d_emo.common.files import read_json
from d_emo.common.messages import printable, readable_size, shown
from d_emo.common.output import Progress, say
from d_emo.images.coco_masks import pack, unpack
from d_emo.images.decode import decode
from d_emo.images.labels import class_name
from d_emo.images.object_datasets import dataset_objects
from d_emo.images.objects import ObjectSource, ObjectTable, Scene, distinct_names, some_of

__all__ = ["ObjectSource", "Scene", "coco_objects", "dataset_objects", "find_annotations", "some_of"]

# A file from so many bytes on is said to be read: it takes a while before there is anything to count.
LARGE = 50_000_000
# What tools call every list.
USUAL = ("annotations", "annotations.coco", "instances", "labels", "panoptic", "result")
# In panoptic pictures a pixel's colours are its segment's id to this base.
BASE = 256


def find_annotations(folder: Path) -> Path:
    """The one JSON file in a folder of pictures, as annotation tools leave it there.

    Raises:
        ValueError: there is none, or several.
    """
    found = sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))
    if len(found) != 1:
        what = f"{len(found)} JSON files ({', '.join(path.name for path in found[:3])})" if found else "no JSON file"
        raise ValueError(f"there is {what} in it; name the list of objects.")
    return found[0]


def coco_objects(
    images: str | Path, annotations: str | Path, masks_folder: str | Path | None = None, masks: bool = True
) -> ObjectSource:
    """Pictures and objects of an instances or a panoptic JSON file.

    Args:
        images: folder that the file's `file_name`s begin in; they may lead into sub-folders.
        annotations: the JSON file.
        masks_folder: of panoptic pictures; None for the folder beside the file that is called like it.
        masks: whether masks are wanted; without, nothing of them is read.

    Raises:
        ValueError: the file is damaged or of another form, or pictures are missing; the message names the first.
    """
    folder, path = checks.path_named(images, "images"), checks.path_named(annotations, "annotations")
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder of images.")
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of annotations.")
    if (size := path.stat().st_size) >= LARGE:
        say(f"reading {path} ({readable_size(size)})")
    content = read_json(path, "copy or export it again")
    try:
        reader = _Reader(content, masks)
        pictures = _existing(folder, reader.files)
        if masks_folder is not None and not (reader.panoptic and Path(masks_folder).is_dir()):
            what = "there is no such folder" if reader.panoptic else "of a panoptic list alone, and this one is none"
            raise ValueError(f"the folder of masks {masks_folder}: {what}.")
        if not reader.panoptic:
            return _instances(reader, folder, path, pictures)
        return _panoptic(reader, folder, path, pictures, Path(masks_folder) if masks_folder else path.with_suffix(""))
    except ValueError as error:
        raise ValueError(f"{printable(str(path))}: {error}") from error


def _instances(reader: "_Reader", folder: Path, path: Path, pictures: list[Path]) -> ObjectSource:
    table = reader.objects(reader.annotations).tidy()
    masks_of = None
    if (shapes := table.shapes) is not None:

        def masks_of(index: int, chosen: slice, sides: tuple[int, int]) -> np.ndarray:
            found = [unpack(shape, *sides) for shape in shapes[chosen]]
            return np.stack(found) if found else np.zeros((0, *sides), dtype=bool)

    return table.source(_named(folder, path), _reading(pictures, reader.ids), masks_of, reader.files, reader.notes())


def _panoptic(reader: "_Reader", folder: Path, path: Path, pictures: list[Path], masks: Path) -> ObjectSource:
    segments, files = reader.segments()
    table = reader.objects(segments).tidy()
    if not reader.masks:
        return table.source(_named(folder, path), _reading(pictures, reader.ids), None, reader.files, reader.notes())
    if not masks.is_dir():
        raise ValueError(f"the folder of its panoptic pictures, {masks}, is not there; name it.")
    maps = dict(zip(files, _existing(masks, list(files.values())), strict=True))

    def masks_of(index: int, chosen: slice, sides: tuple[int, int]) -> np.ndarray:
        if chosen.start == chosen.stop:
            return np.zeros((0, *sides), dtype=bool)
        colours = np.asarray(decode(maps[index], str(maps[index]))).astype(np.int64)  # (H, W, 3)
        if colours.shape[:2] != sides:
            raise ValueError(f"{maps[index]} has {colours.shape[1]} x {colours.shape[0]} pixels; it needs the same")
        found = colours @ [1, BASE, BASE**2] == table.numbers[chosen, None, None]  # (N, H, W)
        if not found.any(axis=(1, 2)).all():
            number = table.numbers[chosen][~found.any(axis=(1, 2))][0]
            raise ValueError(f"{maps[index]} has no pixel of the segment {number}")
        return found

    files_of_all = [*reader.files, *files.values()]
    return table.source(_named(folder, path), _reading(pictures, reader.ids), masks_of, files_of_all, reader.notes())


def _reading(pictures: list[Path], ids: list[int]) -> Callable[[int], tuple[PIL.Image.Image, str, int]]:
    def read(index: int) -> tuple[PIL.Image.Image, str, int]:
        path = pictures[index]
        return decode(path, str(path)), str(path), ids[index]

    return read


def _named(folder: Path, path: Path) -> str:
    """What to call the data: like the list, or like the folder where the list has a tool's usual name."""
    if path.stem.strip("_.") not in USUAL:
        return class_name(path.stem)
    folder = folder.resolve()
    return class_name((folder.parent if folder.name in ("images", "data") else folder).name)


def _existing(folder: Path, files: list[str]) -> list[Path]:
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


class _Reader:
    """A list of COCO's form, checked.

    Attributes:
        panoptic: whether it is a panoptic list.
        masks: whether masks are wanted.
        files, ids, sides: of the pictures.
        annotations: as they are in the file.
    """

    def __init__(self, content: Mapping[str, Any], masks: bool):
        lists: dict[str, Any] = {name: content.get(name) for name in ("images", "annotations", "categories")}
        for name, entries in lists.items():
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise ValueError(f"it has no list {name!r}; COCO's lists have images, annotations, categories.")
            if not entries:
                raise ValueError(f"its list {name!r} is empty.")
        images, self.annotations, categories = lists.values()
        self.panoptic, self.masks = "segments_info" in self.annotations[0], masks
        names = {_id(entry, "id", "a category"): entry.get("name") for entry in categories}
        if len(names) < len(categories):
            raise ValueError("two categories have the same id; give each its own.")
        for number, name in names.items():
            if not isinstance(name, str) or not class_name(name):
                raise ValueError(f"the category {number} has no name, but {shown(name)}.")
        stuff = {_id(entry, "id", "a category") for entry in categories if self.panoptic and not entry.get("isthing")}
        things = sorted(set(names) - stuff)
        if not things:
            raise ValueError("all of its categories are stuff (isthing 0); objects are of things.")
        named = distinct_names({number: class_name(names[number]) for number in things})
        self.labels = {number: label for label, number in enumerate(things)}
        self.id2label = {label: named[number] for number, label in self.labels.items()}
        self.stuff = stuff
        self.ids = [_id(entry, "id", "an image") for entry in images]
        self.places = {number: place for place, number in enumerate(self.ids)}
        if len(self.places) < len(self.ids):
            twice = next(number for place, number in enumerate(self.ids) if self.places[number] != place)
            raise ValueError(f"two images have the id {twice}; give each its own.")
        self.files = [entry.get("file_name") for entry in images]
        if wrong := [place for place, name in enumerate(self.files) if not isinstance(name, str)]:
            raise ValueError(f"the image {self.ids[wrong[0]]} has no file_name.")
        self.sides = np.array([[_side(entry.get(name)) for name in ("width", "height")] for entry in images])
        self.unlisted = 0
        self.without_mask = 0

    def notes(self) -> tuple[str, ...]:
        """What was left out, for people."""
        found = {"of images that are not listed": self.unlisted, "without a mask": self.without_mask}
        return tuple(f"left out: {count:,} objects {reason}" for reason, count in found.items() if count)

    def segments(self) -> tuple[list[dict[str, Any]], dict[int, str]]:
        """A panoptic list's things as annotations, and the names of the panoptic pictures by place."""
        found, files = [], {}
        for entry in self.annotations:
            number = _id(entry, "image_id", "an annotation")
            if number not in self.places:
                self.unlisted += 1
                continue
            segments, name = entry.get("segments_info"), entry.get("file_name")
            if not isinstance(segments, list) or not all(isinstance(part, dict) for part in segments):
                raise ValueError(f"the annotation of image {number} has no list segments_info.")
            if not isinstance(name, str) or self.places[number] in files:
                what = "two annotations" if isinstance(name, str) else "an annotation without a file_name"
                raise ValueError(f"the image {number} has {what}.")
            files[self.places[number]] = name
            things = (part for part in segments if _id(part, "category_id", "a segment") not in self.stuff)
            found += [{**part, "image_id": number} for part in things]
        return found, files

    def objects(self, annotations: list[dict[str, Any]]) -> ObjectTable:
        """The table of all objects, not tidy yet."""
        rows: list[tuple[int, list[float], int, bool, float, int]] = []
        shapes: list[bytes | None] = []
        with Progress(len(annotations), "object", "reading annotations") as progress:
            for entry in annotations:
                progress.update()
                number = _id(entry, "id", "an annotation")
                image = _id(entry, "image_id", f"the annotation {number}")
                category = _id(entry, "category_id", f"the annotation {number}")
                if category not in self.labels:
                    raise ValueError(f"the annotation {number} has the category {category}, which is not listed.")
                if (place := self.places.get(image)) is None:
                    self.unlisted += 1
                    continue
                box, area, crowd = entry.get("bbox"), entry.get("area"), entry.get("iscrowd", 0)
                if not isinstance(box, list) or len(box) != 4 or not all(type(side) in (int, float) for side in box):
                    raise ValueError(f"the annotation {number} has no bbox of four numbers, but {shown(box)}.")
                if crowd not in (0, 1, None):
                    raise ValueError(f"the annotation {number} has iscrowd {shown(crowd)}, which is not 0 or 1.")
                told = isinstance(area, int | float) and 0 <= area < float("inf")
                size = float(area) if told and area is not None else np.nan
                rows.append((place, box, self.labels[category], bool(crowd), size, number))
                if self.masks and not self.panoptic:
                    width, height = (int(side) for side in self.sides[place])
                    try:
                        shapes.append(pack(entry.get("segmentation"), (width, height)))
                    except ValueError as error:
                        raise ValueError(f"the annotation {number}: {error}.") from error
        if any(shapes):  # those that have no mask cannot be learned beside those that have
            kept = [place for place, shape in enumerate(shapes) if shape is not None]
            self.without_mask = len(shapes) - len(kept)
            rows, shapes = [rows[place] for place in kept], [shapes[place] for place in kept]
        columns = list(zip(*rows, strict=True)) or [()] * 6
        return ObjectTable(
            id2label=self.id2label,
            sides=self.sides,
            picture=np.array(columns[0], dtype=np.int64),
            boxes=np.array(columns[1], dtype=np.float64).reshape(-1, 4),
            labels=np.array(columns[2], dtype=np.int64),
            crowd=np.array(columns[3], dtype=bool),
            areas=np.array(columns[4], dtype=np.float64),
            numbers=np.array(columns[5], dtype=np.int64),
            shapes=[shape for shape in shapes if shape is not None] if any(shapes) else None,
        )


def _id(entry: Mapping[str, Any], key: str, what: str) -> int:
    """A whole number, also as a text or as a float."""
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
