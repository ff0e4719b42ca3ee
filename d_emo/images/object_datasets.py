"""Pictures with objects that the package `datasets` opens, in the Hub's layout: a column of tables of objects."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import PIL.Image

from d_emo.common import checks
from d_emo.common.messages import shown
from d_emo.images.decode import decode
from d_emo.images.labels import english_names
from d_emo.images.objects import ObjectSource, ObjectTable
from d_emo.images.stored_labels import class_ids
from d_emo.images.tables import IMAGE_COLUMN, as_files, find_columns, load_dataset, source_name, stored_file

OBJECTS_COLUMN = "objects"
# What the Hub's data sets call an object's class.
CLASS_KEYS = ("category", "label", "category_id", "class", "categories", "labels")


def dataset_objects(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    image_column: str = IMAGE_COLUMN,
    objects_column: str = OBJECTS_COLUMN,
    box_format: Literal["xywh", "xyxy"] = "xywh",
    class_names: Sequence[str] | None = None,
) -> ObjectSource:
    """Anything that `datasets.load_dataset` reads into a table with a column of objects; without masks.

    Args:
        name: Hub id, local dataset folder (also of pictures with a `metadata.jsonl`), or .parquet file.
        config, split, image_column: see `datasets_source`.
        objects_column: of objects, each with `bbox` and `category` (or `label`), perhaps `area`, `iscrowd`.
        box_format: how boxes are written: x, y, width, height as COCO's, or corners x1, y1, x2, y2.
        class_names: names by class id, where the column has none itself.

    Raises:
        ValueError: it cannot be opened, is empty, or a column is missing or holds something else.
    """
    checks.one_of(box_format, "box_format", ("xywh", "xyxy"))
    table = load_dataset(name, config, split, streaming=False)
    image_column, _ = find_columns(table.features, image_column, None)
    if objects_column not in table.features:
        raise ValueError(f"no column {objects_column!r} among {', '.join(table.features)}; set --objects-column.")
    if not len(table):
        raise ValueError(f"the split {split!r} is empty.")
    fields = _fields(table.features[objects_column])
    key = next((key for key in CLASS_KEYS if key in fields), None)
    if "bbox" not in fields or key is None:
        raise ValueError(
            f"the column {objects_column!r} has {', '.join(fields) or 'no table'}; an object has bbox and category."
        )
    stored = table.select_columns([objects_column]).with_format("arrow")[:][objects_column].to_pylist()
    rows = [_columns(objects, fields) for objects in stored]
    picture = np.repeat(np.arange(len(rows)), [len(row["bbox"]) for row in rows])
    boxes = [box for row in rows for box in row["bbox"]]
    for place, box in zip(picture, boxes, strict=True):
        if not isinstance(box, list | tuple) or len(box) != 4 or not all(isinstance(side, int | float) for side in box):
            raise ValueError(f"row {place} has the bbox {shown(box)}, which is not four numbers.")
    names = getattr(fields[key], "names", None) or class_names
    classes = [value for row in rows for value in row[key]]
    labels, titles = class_ids(classes, names, lambda number: f"row {picture[number]}")

    def told(key: str) -> list[Any]:
        return [value for row in rows for value in row.get(key, [None] * len(row["bbox"]))]

    objects = ObjectTable(
        id2label=dict(enumerate(english_names(titles))),
        sides=_sides(table),
        picture=picture,
        boxes=np.array(boxes, dtype=np.float64).reshape(-1, 4),
        labels=labels,
        crowd=np.array([bool(crowd) for crowd in told("iscrowd")], dtype=bool),
        areas=np.array([np.nan if area is None else area for area in told("area")], dtype=np.float64),
        numbers=np.arange(len(picture)),
    ).tidy(corners=box_format == "xyxy")
    images = as_files(table.select_columns([image_column]), image_column)

    def read(index: int) -> tuple[PIL.Image.Image, str, int]:
        found = images[index][image_column]
        path = f" ({found['path']})" if found and found["path"] else ""
        called = f"{name}, row {index}{path}"
        return decode(stored_file(found), called), called, index

    return objects.source(source_name(name), read, None, [split, len(table)])


def _fields(feature: Any) -> dict[str, Any]:
    """What each object has, whichever way it is stored: a list of tables, or a table of lists."""
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) and feature else feature)
    if not isinstance(inner, dict):
        return {}
    return {key: getattr(value, "feature", value) if key != "bbox" else value for key, value in inner.items()}


def _columns(objects: Any, fields: dict[str, Any]) -> dict[str, list[Any]]:
    """A row's objects as columns of the same length."""
    if isinstance(objects, list):
        return {key: [one[key] if one else None for one in objects] for key in fields}
    objects = objects or {}
    found = {key: objects.get(key) or [] for key in fields}
    if len({len(found[key]) for key in found if found[key]}) > 1:
        raise ValueError("the objects of a row have columns of different lengths.")
    count = max(map(len, found.values()), default=0)
    return {key: values or [None] * count for key, values in found.items()}


def _sides(table: Any) -> np.ndarray:
    """(I, 2) width and height where the table has such columns, else zeros."""
    if "width" in table.features and "height" in table.features:
        columns = table.select_columns(["width", "height"]).with_format("arrow")[:]
        sides = [[int(value or 0) for value in columns[name].to_pylist()] for name in ("width", "height")]
        return np.array(sides, dtype=np.int64).T
    return np.zeros((len(table), 2), dtype=np.int64)
