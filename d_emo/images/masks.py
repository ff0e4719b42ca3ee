"""Pictures with a class at every pixel: folders of masks, COCO's panoptic files, tables of `datasets`.

`open_masks` opens what a user names; `pixels` has what all of them share.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from d_emo.common.messages import printable
from d_emo.images.labels import read_class_names
from d_emo.images.mask_files import decode_mask, read_palette, stored_palette
from d_emo.images.mask_pairs import IMAGE_FOLDERS, WithoutMasks, find_folders, find_pairs
from d_emo.images.panoptic import PanopticClasses, panoptic_pixels
from d_emo.images.pixels import LabelledPicture, MaskOptions, PixelSource, StoredPair, pixel_source
from d_emo.images.tables import as_files, load_dataset, source_name, stored_file

__all__ = [
    "LabelledPicture", "MaskOptions", "PixelSource", "dataset_masks", "folder_masks", "open_masks", "panoptic_pixels",
]  # fmt: skip

# Columns of masks that are taken where the user named none.
MASK_COLUMNS = ("mask", "masks", "label", "labels", "annotation", "annotations", "segmentation", "segmentation_mask")


def folder_masks(
    images: Path,
    masks: Path | None = None,
    *,
    image_suffix: str | None = None,
    mask_suffix: str | None = None,
    without_masks: WithoutMasks = "stop",
    options: MaskOptions = MaskOptions(),  # noqa: B008, it is frozen
) -> PixelSource:
    """Pictures in a folder and masks in another; `mask_pairs` has the rules.

    Args:
        images: of the pictures, or a folder that holds both.
        masks: of the masks; None to look for them.
        image_suffix, mask_suffix, without_masks: see `mask_pairs.find_pairs`.
        options: of the masks.

    Raises:
        ValueError: files that do not go together, sizes that differ, numbers that are no class.
    """
    images, masks = find_folders(images, masks, mask_suffix)
    pairs = find_pairs(images, masks, image_suffix, mask_suffix, without_masks)

    def stored(index: int) -> StoredPair:
        image, mask = pairs.images[index], pairs.masks[index]
        colors = None if options.palette else lambda: stored_palette(mask)
        return StoredPair(image, str(image), lambda: decode_mask(mask, str(mask), options.palette), str(mask), colors)

    keys = [path.relative_to(images).as_posix() for path in pairs.images]
    return pixel_source(_set_name(images), keys, stored, options, pairs.note)


def _set_name(images: Path) -> str:
    """The folder's own name, or that of the one around it where it is called "images"."""
    path = images.resolve()
    return printable((path.parent if path.name.casefold() in IMAGE_FOLDERS and path.parent.name else path).name)


def dataset_masks(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    image_column: str = "image",
    mask_column: str | None = None,
    options: MaskOptions = MaskOptions(),  # noqa: B008, it is frozen
) -> PixelSource:
    """Anything that `datasets.load_dataset` reads into a table with a column of pictures and one of masks.

    Args:
        name: Hub id, local dataset folder, or .parquet file.
        config, split: of it.
        image_column: of pictures; where "image" is missing, the only one that is left.
        mask_column: of masks; None for one by a usual name, or the only one that is left.
        options: of the masks.

    Raises:
        ValueError: it cannot be opened, is empty, or lacks a column; sizes differ, numbers are no class.
    """
    table = load_dataset(name, config, split, streaming=False)
    image_column, mask_column = _find_columns(table.features, image_column, mask_column)
    if not len(table):
        raise ValueError(f"the split {split!r} is empty.")
    table = table.select_columns([image_column, mask_column])
    for column in (image_column, mask_column):
        table = as_files(table, column)

    def stored(index: int) -> StoredPair:
        row, place = table[index], f"{name}, row {index}"
        mask_name = f"{place}, {mask_column}"
        return StoredPair(
            lambda: stored_file(row[image_column]),
            place,
            lambda: decode_mask(stored_file(row[mask_column]), mask_name, options.palette),
            mask_name,
            None if options.palette else lambda: stored_palette(stored_file(row[mask_column])),
        )

    return pixel_source(source_name(name), [str(row) for row in range(len(table))], stored, options)


def _find_columns(features: Any, image_column: str, mask_column: str | None) -> tuple[str, str]:
    import datasets

    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if mask_column is None:
        usual = [name for name in MASK_COLUMNS if name in pictures and name != image_column]
        left = [name for name in pictures if name != image_column] if image_column in pictures else []
        mask_column = usual[0] if usual else left[0] if len(left) == 1 else "mask"
    others = [name for name in pictures if name != mask_column]
    if image_column == "image" and image_column not in features and len(others) == 1:
        image_column = others[0]
    for flag, column in (("--mask-column", mask_column), ("--image-column", image_column)):
        if column not in features:
            raise ValueError(f"no column {column!r} among {', '.join(features)}; set {flag}.")
    return image_column, mask_column


def open_masks(
    folder: str | None,
    dataset: str | None,
    *,
    mask_dir: str | None = None,
    image_suffix: str | None = None,
    mask_suffix: str | None = None,
    without_masks: WithoutMasks = "stop",
    panoptic_json: str | None = None,
    panoptic_classes: PanopticClasses = "categories",
    config: str | None = None,
    split: str = "train",
    image_column: str = "image",
    mask_column: str | None = None,
    class_names: str | None = None,
    palette: str | None = None,
    reduce_zero_label: bool = False,
    ignore_index: int | None = None,
    like: PixelSource | None = None,
) -> PixelSource:
    """What a user names: a folder, COCO's panoptic file with one, or a data set.

    Args:
        folder: of pictures, or of pictures and masks; goes before `dataset`.
        dataset: Hub id, local dataset folder, or .parquet file.
        mask_dir, image_suffix, mask_suffix, without_masks: see `folder_masks`.
        panoptic_json, panoptic_classes: see `panoptic_pixels`.
        config, split, image_column, mask_column: see `dataset_masks`.
        class_names: a file of names, in the order of the ids.
        palette: a file that says which colour is which class.
        reduce_zero_label, ignore_index: see `MaskOptions`; not with a panoptic file or a palette.
        like: a set whose classes this one has as well: the one that was trained on.

    Raises:
        ValueError: there is no such thing, or its files do not go together; the message gives the remedy.
    """
    told = {"--reduce-zero-label": reduce_zero_label, "--ignore-index": ignore_index is not None}
    for flag in (flag for flag, given in told.items() if given and (panoptic_json or palette)):
        other = "--panoptic-json" if panoptic_json else "--palette"
        raise ValueError(f"{flag} is of masks of plain numbers, and {other} says itself what is no class; choose one.")
    names: Sequence[str] | None = read_class_names(class_names) if class_names else None
    if like is not None:
        names = list(like.id2label.values())
    options = MaskOptions(
        class_names=names,
        reduce_zero_label=reduce_zero_label,
        ignore_index=ignore_index,
        palette=read_palette(Path(palette)) if palette else None,
        binary=like.binary if like is not None else None,
    )

    def opened() -> PixelSource:
        if folder is not None:
            masks = Path(mask_dir) if mask_dir else None
            if panoptic_json is not None:
                return panoptic_pixels(Path(panoptic_json), Path(folder), masks, panoptic_classes)
            return folder_masks(
                Path(folder),
                masks,
                image_suffix=image_suffix,
                mask_suffix=mask_suffix,
                without_masks=without_masks,
                options=options,
            )
        if dataset is None:
            raise ValueError("no pictures were named.")
        return dataset_masks(
            dataset, config=config, split=split, image_column=image_column, mask_column=mask_column, options=options
        )

    source = opened()
    if like is not None and source.id2label != like.id2label:
        raise ValueError(
            f"its classes are not those of {like.name}, which is trained on ({len(source.id2label)} and "
            f"{len(like.id2label)}); name data with the same classes."
        )
    return source
