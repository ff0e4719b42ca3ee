"""A segmenter's pictures with their masks: those to train on and those to validate on, with the same classes."""

from typing import Any

from d_emo.common.options import blamed
from d_emo.images.masks import PixelSource, open_masks
from d_emo.images.pixels import held_out_pixels, pixel_subset
from d_emo.images.source import refuse_unreadable
from d_emo.train.segmentation.config import SegmenterDataOptions

# What is validated on must be whole, whatever --on-bad-image says.
WHOLE = "Repair or remove it: every image to validate on counts."


def load_sources(data: SegmenterDataOptions) -> tuple[PixelSource, PixelSource | None]:
    """The pictures to train on and those to validate on, with the same class ids.

    Raises:
        ValueError: none are named, either does not open, or their classes differ.
    """
    if data.train_data_dir:
        named, folder, dataset = f"--train-data-dir {data.train_data_dir}", data.train_data_dir, None
    elif data.dataset:
        named, folder, dataset = f"--dataset {data.dataset}", None, data.dataset
    else:
        raise ValueError("no data was named: --train-data-dir FOLDER (of images and masks) or --dataset NAME.")
    source = _opened(
        data,
        named,
        folder=folder,
        dataset=dataset,
        mask_dir=data.mask_dir,
        panoptic_json=data.panoptic_json,
        split=data.dataset_split,
        class_names=data.class_names,
    )
    if data.validation_share:
        with blamed(f"--validation-share {data.validation_share:g}"):
            source, validation = held_out_pixels(source, data.validation_share)
            refuse_unreadable(validation.unreadable, WHOLE)
        return source, validation
    for named, value, places in (
        ("--validation-dir", data.validation_dir,
         {"folder": data.validation_dir, "dataset": None, "mask_dir": data.validation_mask_dir,
          "panoptic_json": data.validation_json}),
        ("--validation-dataset", data.validation_dataset,
         {"folder": None, "dataset": data.validation_dataset, "split": data.dataset_split}),
        ("--validation-split", data.validation_split,
         {"folder": None, "dataset": data.dataset, "split": data.validation_split}),
    ):  # fmt: skip
        if value:
            validation = _opened(data, f"{named} {value}", like=source, **places)
            refuse_unreadable(validation.unreadable, WHOLE)
            return source, validation
    return source, None


def _opened(data: SegmenterDataOptions, named: str, *, folder: Any, dataset: Any, **more: Any) -> PixelSource:
    with blamed(named):
        source = open_masks(
            folder,
            dataset,
            image_suffix=data.image_suffix,
            mask_suffix=data.mask_suffix,
            without_masks=data.images_without_masks,
            panoptic_classes=data.panoptic_classes,
            config=data.dataset_config,
            image_column=data.image_column,
            mask_column=data.mask_column,
            palette=data.palette,
            reduce_zero_label=data.reduce_zero_label,
            ignore_index=data.ignore_index,
            **more,
        )
        if data.on_bad_image == "stop":
            refuse_unreadable(source.unreadable, "Repair or remove them, or go on: --on-bad-image skip.")
    return pixel_subset(source, range(min(source.size, data.max_images))) if data.max_images else source
