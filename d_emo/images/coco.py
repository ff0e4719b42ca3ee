"""Pictures with objects by COCO's lists: instances and panoptic JSON (cocodataset.org/#format-data).

    source = coco_objects("images/train2017", "annotations/instances_train2017.json")
    scene = source.read(0)                                       # picture, boxes, labels, masks

Classes are numbered from 0 in the order of their categories' ids, which may have gaps; of a panoptic list only the
things. What cannot be an object (without an area, outside of its picture) is left out and counted in the source's note.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from d_emo.common import checks
from d_emo.common.messages import printable, shown
from d_emo.common.output import Progress
from d_emo.images.coco_lists import USUAL_FOLDERS, CocoList, existing, number, whole
from d_emo.images.coco_masks import pack, unpack
from d_emo.images.decode import decode, upright_size
from d_emo.images.labels import class_name
from d_emo.images.mask_files import decode_colors
from d_emo.images.object_datasets import dataset_objects
from d_emo.images.objects import ObjectSource, ObjectTable, Scene, distinct_names, refuse_size, some_of

__all__ = ["ObjectSource", "Scene", "coco_objects", "dataset_objects", "find_annotations", "some_of"]

# What tools call every list.
USUAL = ("annotations", "annotations.coco", "instances", "labels", "panoptic", "result")


def find_annotations(folder: Path, flag: str = "") -> Path:
    """The list of a folder of pictures, as annotation tools leave it: in it, or in `annotations` in it or beside it.

    Of several the one that is called like the folder ("instances_train2017" of "train2017") is taken, and instances
    before other kinds. `flag` is the option for it.

    Raises:
        ValueError: there is none, or several.
    """
    folder = folder.absolute()
    beside = [folder.parent] if folder.name in USUAL_FOLDERS else []
    found: list[Path] = []
    for place in (folder, folder / "annotations", folder.parent / "annotations", *beside):
        found = found or sorted(path for path in place.glob("*.json") if not path.name.startswith("."))
    for preferred in (lambda path: path.stem.endswith(f"_{folder.name}"), lambda path: "instances" in path.stem):
        found = [path for path in found if preferred(path)] or found if len(found) > 1 else found
    if len(found) != 1:
        what = f"{len(found)} JSON files ({', '.join(path.name for path in found[:3])})" if found else "no JSON file"
        raise ValueError(f"there is {what} in it; name the list{f' ({flag})' if flag else ''} of objects.")
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
    try:
        listed = CocoList(path)
        pictures = existing(folder, listed.files)
        if masks_folder is not None and not (listed.panoptic and Path(masks_folder).is_dir()):
            what = "there is no such folder" if listed.panoptic else "of a panoptic list alone, and this one is none"
            raise ValueError(f"the folder of masks {masks_folder}: {what}.")
        reading = _reading(pictures, listed.ids)
        if listed.panoptic:
            panoptic = (Path(masks_folder) if masks_folder else path.with_suffix("")) if masks else None
            source = _panoptic(listed, _named(folder, path), reading, panoptic)
        else:
            source = _instances(listed, _named(folder, path), reading, masks)
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{printable(str(path))}: {error}") from error

    def look(index: int) -> None:
        name = str(pictures[index])
        refuse_size(upright_size(pictures[index], name), source.sides[index], name)

    return replace(source, look=look)


def _instances(listed: CocoList, name: str, reading: "Reading", masks: bool) -> ObjectSource:
    table, without_mask = _objects(listed, listed.annotations, masks)
    notes = listed.note("objects"), f"left out: {without_mask:,} objects without a mask" if without_mask else ""
    masks_of = None
    if (shapes := table.shapes) is not None:

        def masks_of(index: int, chosen: slice, sides: tuple[int, int]) -> np.ndarray:
            found = [unpack(shape, *sides) for shape in shapes[chosen]]
            return np.stack(found) if found else np.zeros((0, *sides), dtype=bool)

    return table.source(name, reading, masks_of, listed.files, notes)


def _panoptic(listed: CocoList, name: str, reading: "Reading", masks: Path | None) -> ObjectSource:
    """The things; `masks` is the folder of the panoptic pictures, None without masks."""
    pictures = listed.panoptic_pictures()
    things = [
        {**part, "image_id": listed.ids[place]}
        for place, (_, segments) in pictures.items()
        for part in segments
        if whole(part, "category_id", "a segment") not in listed.stuff
    ]
    table, _ = _objects(listed, things, masks=False)
    notes = (listed.note("annotations"),)
    if masks is None:
        return table.source(name, reading, None, listed.files, notes)
    if not masks.is_dir():
        raise ValueError(f"the folder of its panoptic pictures, {masks}, is not there; name it.")
    files = [file for file, _ in pictures.values()]
    maps = dict(zip(pictures, existing(masks, files), strict=True))

    def masks_of(index: int, chosen: slice, sides: tuple[int, int]) -> np.ndarray:
        if chosen.start == chosen.stop:
            return np.zeros((0, *sides), dtype=bool)
        numbers = decode_colors(maps[index], str(maps[index]))  # (H, W)
        if numbers.shape != sides:
            given, wanted = (f"{width} x {height}" for height, width in (numbers.shape, sides))
            raise ValueError(f"{maps[index]} has {given} pixels, not {wanted}")
        found = numbers == table.numbers[chosen, None, None]  # (N, H, W)
        if not found.any(axis=(1, 2)).all():
            number = table.numbers[chosen][~found.any(axis=(1, 2))][0]
            raise ValueError(f"{maps[index]} has no pixel of the segment {number}")
        return found

    return table.source(name, reading, masks_of, [*listed.files, *files], notes)


# The place of a picture -> it, its name and its id.
Reading = Callable[[int], tuple[PIL.Image.Image, str, int]]


def _reading(pictures: list[Path], ids: list[int]) -> Reading:
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


def _objects(listed: CocoList, annotations: list[dict[str, Any]], masks: bool) -> tuple[ObjectTable, int]:
    """The table of all things, and how many were left out since they have no mask; `masks` of an instances list."""
    things = [number for number in listed.names if number not in listed.stuff]
    if not things:
        raise ValueError("all of its categories are stuff (isthing 0); objects are of things.")
    named = distinct_names({number: listed.names[number] for number in things})
    labels = {number: label for label, number in enumerate(things)}
    rows: list[tuple[int, list[float | None], int, bool, float, int]] = []
    shapes: list[bytes | None] = []
    with Progress(len(annotations), "object", "reading annotations") as progress:
        for row, entry in enumerate(annotations, 1):
            progress.update()
            # Of an instances list nothing but messages needs the id.
            called = (
                row if not listed.panoptic and type(entry.get("id")) is not int else whole(entry, "id", "a segment")
            )
            what = f"the annotation {called}"
            category, place = listed.category(entry, what), listed.place(entry, what)
            if place is None:
                continue
            box, area, crowd = entry.get("bbox"), number(entry.get("area")), entry.get("iscrowd", 0)
            sides = [number(side) for side in box] if isinstance(box, list) else []
            if len(sides) != 4 or None in sides:
                raise ValueError(f"{what} has no bbox of four numbers, but {shown(box)}.")
            if crowd not in (0, 1, None):
                raise ValueError(f"{what} has iscrowd {shown(crowd)}, which is not 0 or 1.")
            size = area if area is not None and 0 <= area < float("inf") else np.nan
            rows.append((place, sides, labels[category], bool(crowd), size, called))
            if masks:
                width, height = (int(side) for side in listed.sides[place])
                try:
                    shapes.append(pack(entry.get("segmentation"), (width, height)))
                except ValueError as error:
                    raise ValueError(f"{what}: {error}.") from error
    if not rows and (note := listed.note("objects")):
        raise ValueError(f"no object is left ({note}).")
    without_mask = 0
    if any(shapes):  # those that have no mask cannot be learned beside those that have
        kept = [place for place, shape in enumerate(shapes) if shape is not None]
        without_mask = len(shapes) - len(kept)
        rows, shapes = [rows[place] for place in kept], [shapes[place] for place in kept]
    columns = list(zip(*rows, strict=True)) or [()] * 6
    table = ObjectTable(
        id2label={label: named[number] for number, label in labels.items()},
        sides=listed.sides,
        picture=np.array(columns[0], dtype=np.int64),
        boxes=np.array(columns[1], dtype=np.float64).reshape(-1, 4),
        labels=np.array(columns[2], dtype=np.int64),
        crowd=np.array(columns[3], dtype=bool),
        areas=np.array(columns[4], dtype=np.float64),
        numbers=np.array(columns[5], dtype=np.int64),
        shapes=[shape for shape in shapes if shape is not None] if any(shapes) else None,
    )
    return table.tidy(), without_mask
