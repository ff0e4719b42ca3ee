"""Open the pictures with objects that a user names: a folder with COCO's list of them, or a data set of `datasets`."""

from pathlib import Path
from typing import Literal

from d_emo.common import checks
from d_emo.images.coco import coco_objects, find_annotations
from d_emo.images.labels import read_class_names
from d_emo.images.object_datasets import OBJECTS_COLUMN, dataset_objects
from d_emo.images.objects import ObjectSource
from d_emo.images.tables import IMAGE_COLUMN


def open_objects(
    folder: str | None,
    dataset: str | None,
    *,
    annotations: str | None = None,
    mask_dir: str | None = None,
    masks: bool = True,
    config: str | None = None,
    split: str = "train",
    image_column: str = IMAGE_COLUMN,
    objects_column: str = OBJECTS_COLUMN,
    box_format: Literal["xywh", "xyxy"] = "xywh",
    class_names: str | None = None,
    flag: str = "--annotations",
) -> ObjectSource:
    """What a user names.

    Args:
        folder: of pictures; goes before `dataset`.
        dataset: Hub id, local dataset folder, or .parquet file.
        annotations: COCO's list of the folder's objects; None for the one JSON file in it.
        mask_dir: of a panoptic list.
        masks: whether masks are wanted, where there are some.
        config, split, image_column, objects_column, box_format: see `dataset_objects`.
        class_names: a file of names of classes that the data set gives by number.
        flag: what the user calls `annotations`, for messages.

    Raises:
        ValueError: there is no such thing, or it is of another form; the message gives the remedy.
    """
    if folder is None:
        return dataset_objects(
            checks.text(dataset, "dataset"),
            config=config,
            split=split,
            image_column=image_column,
            objects_column=objects_column,
            box_format=box_format,
            class_names=read_class_names(class_names) if class_names else None,
        )
    root = Path(folder)
    if not root.is_dir():
        raise ValueError("there is no such folder.")
    return coco_objects(root, Path(annotations) if annotations else find_annotations(root, flag), mask_dir, masks=masks)
