"""A detector's pictures with their objects: those to train on and those to validate on, with the same classes."""

from dataclasses import replace
from typing import Any

import numpy as np

from d_emo.common.options import blamed
from d_emo.images.objects import ObjectSource, refuse_unusable, relabelled, some_of
from d_emo.images.open_objects import open_objects
from d_emo.train.detection.config import DetectorDataOptions

# Held-out pictures are drawn by this seed, the same every time.
DRAWN_BY = 0


def load_sources(data: DetectorDataOptions, masks: bool) -> tuple[ObjectSource, ObjectSource | None]:
    """The pictures to train on and those to validate on, with the same class ids.

    Args:
        data: options.
        masks: whether masks are learned.

    Raises:
        ValueError: none are named, either does not open, their classes differ, or nothing is left to train on.
        UnreadableImageError: a picture cannot be used, as its header says.
    """
    if data.train_data_dir:
        named = f"--train-data-dir {data.train_data_dir}"
        source = _opened(named, data, masks, data.train_data_dir, annotations=data.annotations, mask_dir=data.mask_dir)
    elif data.dataset:
        named = f"--dataset {data.dataset}"
        source = _opened(named, data, masks, None, data.dataset, data.dataset_split)
    else:
        raise ValueError(
            "no data was named: --train-data-dir FOLDER --annotations FILE.json (COCO's lists), or --dataset NAME."
        )
    if masks and not source.has_masks:
        raise ValueError(f"{named}: mask_rcnn learns masks, and there are none; use --system retinanet.")
    validation = None
    if data.validation_share:
        source, validation = _held_out(source, data.validation_share)
    elif data.validation_dir:
        other = f"--validation-dir {data.validation_dir}"
        found = _opened(
            other, data, masks, data.validation_dir, annotations=data.validation_annotations,
            mask_dir=data.validation_mask_dir, flag="--validation-annotations",
        )  # fmt: skip
        validation = same_classes(found, source, other)
    elif data.validation_dataset or data.validation_split:
        name, split = data.validation_dataset or data.dataset or "", data.validation_split or data.dataset_split
        other = f"--validation-dataset {name}" if data.validation_dataset else f"--validation-split {split}"
        validation = same_classes(_opened(other, data, masks, None, name, split), source, other)
    if validation is not None and not validation.counts.any():
        raise ValueError(f"{validation.name}: there is no object to validate on; name other pictures.")
    if validation is not None:
        refuse_unusable(validation, "Every picture that is validated on counts: repair or remove them.")
    source = to_train_on(source, data)
    if data.on_bad_image == "stop":
        refuse_unusable(source, "Repair or remove them, or go on: --on-bad-image skip.")
    return source, validation


def to_train_on(source: ObjectSource, data: DetectorDataOptions) -> ObjectSource:
    """The pictures that are learned from: the first so many, without those that have no objects or are too small.

    Raises:
        ValueError: none is left.
    """
    kept = np.ones(source.size, dtype=bool)
    if data.images_without_objects == "drop":
        kept &= source.counts > 0
    kept &= ~((source.sides.min(axis=1) < data.min_image_side) & (source.sides.min(axis=1) > 0))
    indices = np.flatnonzero(kept)[: data.max_images]
    if not len(indices):
        raise ValueError(
            f"{source.name}: no image is left to train on; those without objects other than crowds "
            f"(--images-without-objects) and with a side under --min-image-side {data.min_image_side} are left out."
        )
    if len(indices) == source.size:
        return source
    note = "; ".join(filter(None, [f"of {source.size:,} images", source.note]))
    return replace(some_of(source, indices), note=note)


def same_classes(validation: ObjectSource, source: ObjectSource, named: str) -> ObjectSource:
    """The validation pictures with the training pictures' class ids.

    Raises:
        ValueError: it has objects of a class that was not trained.
    """
    if validation.id2label == source.id2label:
        return validation
    ids = {name: number for number, name in source.id2label.items()}
    table = np.array([ids.get(validation.id2label[number], -1) for number in range(len(validation.id2label))])
    unknown = [name for number, name in validation.id2label.items() if table[number] < 0]
    if unknown:
        raise ValueError(
            f"{named}: it has classes that {source.name}, which is trained on, does not have: "
            f"{', '.join(unknown[:5])}; they have {len(validation.id2label)} and {len(ids)}. Remove those classes, or "
            "train on them, too."
        )
    return relabelled(validation, table, source.id2label)


def _opened(named: str, data: DetectorDataOptions, masks: bool, folder: str | None, dataset: str | None = None,
            split: str = "train", **lists: Any) -> ObjectSource:  # fmt: skip
    """What the user called `named`; `lists` are the arguments of `open_objects` that a folder has of its own."""
    with blamed(named):
        return open_objects(
            folder,
            dataset,
            masks=masks,
            config=data.dataset_config,
            split=split,
            image_column=data.image_column,
            objects_column=data.objects_column,
            box_format=data.box_format,
            class_names=data.class_names,
            **lists,
        )


def _held_out(source: ObjectSource, share: float) -> tuple[ObjectSource, ObjectSource]:
    """Split a source into two by pictures; the same split every time.

    Raises:
        ValueError: a part would have no object.
    """
    order = np.random.RandomState(DRAWN_BY).permutation(source.size)
    count = max(1, round(share * source.size))
    held, rest = np.sort(order[:count]), np.sort(order[count:])
    if not (len(rest) and source.counts[held].any() and source.counts[rest].any()):
        raise ValueError(
            f"--validation-share {share:g}: of {source.size:,} images {count:,} would be held out, and one of the "
            "parts has no object; choose another share, or name pictures to validate on (--validation-dir)."
        )
    return some_of(source, rest), some_of(source, held, f"{source.name}, held out")
