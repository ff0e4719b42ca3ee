"""COCO's panoptic files as pictures with a class at every pixel: things against stuff, or all categories."""

from pathlib import Path
from typing import Any, Literal

import numpy as np

from d_emo.common.messages import describe_os_error, printable, shown
from d_emo.common.saved_folders import read_object
from d_emo.images.labels import class_name
from d_emo.images.mask_files import IGNORED, decode_colors
from d_emo.images.mask_pairs import find_folders
from d_emo.images.pixels import MaskOptions, PixelSource, StoredPair, pixel_source

PanopticClasses = Literal["things", "categories"]
THINGS = ("stuff", "things")


def panoptic_pixels(
    annotations: Path, images: Path, masks: Path | None = None, classes: PanopticClasses = "categories"
) -> PixelSource:
    """Pictures and semantic classes of a panoptic JSON file and its PNG files.

    Pixels of segments, crowds among them, have their category's class; others are ignored.

    Args:
        annotations: the JSON file: `images`, `annotations` with `segments_info`, `categories`.
        images: folder of the pictures, or one that also holds the PNG files.
        masks: folder of the PNG files; None to look for it, by a name such as "panoptic".
        classes: "things" for two (stuff, things), "categories" for all of the file's, in the order of their ids.

    Raises:
        ValueError: the file is none of that kind, or names files, categories or segments that are not there.
    """
    try:
        content = read_object(annotations)
    except OSError as error:
        raise ValueError(describe_os_error(error)) from error
    categories = sorted(_entries(content, "categories", annotations), key=lambda entry: entry["id"])
    images, masks = find_folders(images, masks)
    if classes == "things":
        names, ids = list(THINGS), {entry["id"]: int(_field(entry, "isthing", annotations)) for entry in categories}
    else:
        names = [class_name(str(_field(entry, "name", annotations))) for entry in categories]
        ids = {entry["id"]: number for number, entry in enumerate(categories)}
        if len({*names}) < len(names):
            raise ValueError(f"{annotations}: two categories have the same name; give every one its own.")
    pictures = {entry["id"]: entry for entry in _entries(content, "images", annotations)}
    labelled = content.get("annotations")
    if not isinstance(labelled, list) or not labelled:
        raise ValueError(f"{annotations}: it has no list of annotations; pass COCO's panoptic JSON.")
    pairs = [_pair(entry, pictures, ids, images, masks, annotations) for entry in labelled]
    missing = [path for pair in pairs for path in pair[:2] if not path.is_file()]
    if missing:
        more = f", and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise ValueError(f"{annotations} names {printable(str(missing[0]))}{more}, which is not there; copy it.")

    def stored(index: int) -> StoredPair:
        image, mask, segments = pairs[index]
        return StoredPair(image, str(image), lambda: _semantic(mask, segments), str(mask))

    keys = [image.name for image, *_ in pairs]
    name = printable(annotations.resolve().parent.name)
    return pixel_source(name, keys, stored, MaskOptions(class_names=names, ignore_index=IGNORED))


def _entries(content: dict[str, Any], part: str, file: Path) -> list[dict[str, Any]]:
    """A list of tables with whole numbers as ids."""
    entries = content.get(part)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{file}: it has no list of {part}; pass COCO's panoptic JSON.")
    for entry in entries:
        if not isinstance(entry, dict) or type(entry.get("id")) is not int:
            raise ValueError(f"{file}: {part} has {shown(entry)}, which has no whole number as its id.")
    if len({entry["id"] for entry in entries}) < len(entries):
        raise ValueError(f"{file}: two of {part} have the same id; give every one its own.")
    return entries


def _field(entry: Any, name: str, file: Path) -> Any:
    if not isinstance(entry, dict) or name not in entry:
        raise ValueError(f"{file}: {shown(entry)} has no {name!r}; pass COCO's panoptic JSON.")
    return entry[name]


def _pair(
    entry: Any, pictures: dict[int, dict[str, Any]], ids: dict[int, int], images: Path, masks: Path, file: Path
) -> tuple[Path, Path, dict[int, int]]:
    """A picture's file, its mask's, and the class of every segment."""
    number, segments = _field(entry, "image_id", file), _field(entry, "segments_info", file)
    if not isinstance(number, int) or number not in pictures:
        raise ValueError(f"{file}: an annotation is of the image {shown(number)}, which is not among its images.")
    if not isinstance(segments, list):
        raise ValueError(f"{file}: segments_info of image {number} is no list; pass COCO's panoptic JSON.")
    found = {}
    for segment in segments:
        category, segment_id = _field(segment, "category_id", file), _field(segment, "id", file)
        if not isinstance(category, int) or category not in ids or type(segment_id) is not int:
            raise ValueError(f"{file}: image {number} has a segment of category {shown(category)}, which is none.")
        found[segment_id] = ids[category]
    image_file, mask_file = _field(pictures[number], "file_name", file), _field(entry, "file_name", file)
    return images / _inside(image_file, file), masks / _inside(mask_file, file), found


def _inside(name: Any, file: Path) -> str:
    """A file's name that leads nowhere else."""
    if not isinstance(name, str) or not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{file}: {shown(name)} is no name of a file in its folder.")
    return name


def _semantic(file: Path, segments: dict[int, int]) -> np.ndarray:
    """(H, W) int32, the class of every pixel's segment, 255 where there is none."""
    numbers, places = np.unique(decode_colors(file, str(file)), return_inverse=True)
    return np.array([segments.get(int(n), IGNORED) for n in numbers], dtype=np.int32)[places].reshape(places.shape)
