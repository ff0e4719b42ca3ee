"""What `evaluate_segmenter` does after it has read its options: predict, score, draw."""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

import d_emo  # noqa: F401  makes transformers know EMOv2
from d_emo.common.files import write_json
from d_emo.common.locks import output_folder
from d_emo.common.processes import default_device
from d_emo.common.saved_folders import SEGMENTER
from d_emo.eval.reports.evaluation import load_model, opening_data, report_folder, write_table
from d_emo.eval.reports.overlays import compare_maps
from d_emo.eval.reports.page import Table, Tile, WorstTiles, write_page
from d_emo.eval.segmentation.predict import default_stride, evaluate_pixels
from d_emo.eval.segmentation.scores import SegmentationScores
from d_emo.images.decode import UnreadableImageError
from d_emo.images.mask_files import IGNORED
from d_emo.images.masks import LabelledPicture, PixelSource, open_masks
from d_emo.images.matching import match_classes
from d_emo.images.pixels import pixel_subset
from d_emo.images.source import refuse_unreadable

CONFUSIONS = 10
# With --short-side: how often it the long side may be, as published for 512 and 2048.
LONGEST = 4
TITLES = {"miou": "mIoU", "aacc": "aAcc", "macc": "mAcc", "mdice": "mDice"}


def run(options: argparse.Namespace) -> None:
    """Predict, score, print, save; what is quickly found to be wrong comes first."""
    folder = report_folder(options, SEGMENTER)
    # torchvision's resizing, which transformers takes by itself, gives other pixels than Pillow's, of the trainer.
    model, processor = load_model(
        options.model, SEGMENTER, AutoModelForSemanticSegmentation, AutoImageProcessor, backend="pil"
    )
    names = {label: str(model.config.id2label[label]) for label in range(model.config.num_labels)}
    source, note = chosen_pictures(options, names)
    with output_folder(folder):
        evaluate(options, folder, model, processor, source, note)


def evaluate(
    options: argparse.Namespace, folder: Path, model: Any, processor: Any, source: PixelSource, note: str
) -> None:
    """Predict on pictures whose classes are the model's, and write the report; `note` is a remark on the classes."""
    device = default_device()
    print(f"{options.model} on {source.name}: {source.describe_size()}, {len(source.id2label)} classes{note}")
    worst = WorstTiles(options.pictures)

    def keep(sample: LabelledPicture, predicted: np.ndarray, scores: SegmentationScores) -> None:
        def tile() -> Tile:
            picture = compare_maps(sample.image, sample.labels, predicted, source.id2label)
            return Tile(picture, f"{Path(sample.name).name}, {scores.aacc:.1%} of its pixels right", scores.miou)

        worst.offer(scores.miou, tile)

    scores = evaluate_pixels(
        model.to(device).eval(),
        processor,
        source,
        device=device,
        window=options.window,
        stride=options.stride,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        progress=True,
        keep=keep,
        processor_options=sizes(options),
    )
    report(scores, source, worst, folder, options)


def chosen_pictures(options: argparse.Namespace, names: Mapping[int, str]) -> tuple[PixelSource, str]:
    """The pictures that the options name, with the model's class ids, and a remark on the classes.

    Masks that are plain numbers mean the model's classes in their order; those with names, of a file or of a JSON, are
    matched by them.

    Raises:
        ValueError: they do not open, or their classes are not the model's; the message names the option.
    """
    named = options.class_names or options.palette or options.panoptic_json
    classes = PixelSource(options.model, 0, read=_no_picture, id2label=dict(names))
    with opening_data(options):
        source = open_masks(
            options.data_dir,
            options.dataset,
            mask_dir=options.mask_dir,
            image_suffix=options.image_suffix,
            mask_suffix=options.mask_suffix,
            without_masks=options.images_without_masks,
            panoptic_json=options.panoptic_json,
            panoptic_classes=options.panoptic_classes,
            config=options.dataset_config,
            split=options.dataset_split,
            image_column=options.image_column,
            mask_column=options.mask_column,
            class_names=options.class_names,
            palette=options.palette,
            reduce_zero_label=options.reduce_zero_label,
            ignore_index=options.ignore_index,
            like=None if named else classes,
        )
        refuse_unreadable(source.unreadable, "Repair or remove them.")
        if options.max_images:
            source = pixel_subset(source, range(min(source.size, options.max_images)))
        return align_pixels(source, names)


def _no_picture(index: int) -> LabelledPicture:
    raise UnreadableImageError(f"picture {index} is of a model, which has none")


def align_pixels(source: PixelSource, names: Mapping[int, str]) -> tuple[PixelSource, str]:
    """The pictures with the model's class ids, and a remark for people; see `match_classes`.

    Raises:
        ValueError: the classes do not go together.
    """
    if source.id2label == dict(names):
        return source, ""
    found, note = match_classes(source.id2label, names, source.name)
    table = np.full(IGNORED + 1, IGNORED, dtype=np.int32)
    table[list(found)] = list(found.values())

    def read(index: int) -> LabelledPicture:
        sample = source.read(index)
        return replace(sample, labels=table[sample.labels])

    return replace(source, read=read, id2label=dict(names)), note


def sizes(options: argparse.Namespace) -> dict[str, Any]:
    """Options of a processor, by which pictures have the size that the command's options say, if they do."""
    if options.full_size:
        return {"do_resize": False}
    if options.short_side:
        size = {"shortest_edge": options.short_side, "longest_edge": LONGEST * options.short_side}
        return {"do_resize": True, "size": size}
    return {}


def report(
    scores: SegmentationScores, source: PixelSource, worst: WorstTiles, folder: Path, options: argparse.Namespace
) -> None:
    """Print the scores and write them with the tables and the worst pictures.

    Raises:
        ValueError: no pixel has a label.
    """
    if not scores.labelled:
        raise ValueError(f"no pixel of {source.name} has a class, so that there is nothing to score.")
    means = {"miou": scores.miou, "aacc": scores.aacc, "macc": scores.macc, "mdice": scores.mdice}
    print(", ".join(f"{title} {means[name]:.2%}" for name, title in TITLES.items()))
    rows = class_rows(scores, source.id2label)
    for number, row in enumerate([row for row in rows if row[1]][:5]):
        print(f"{'hardest' if number == 0 else '':<8} {row[0]}: IoU {row[2]:.1f}%, {row[3]:.1f}% of its pixels found")
    everything = {**vars(options), "pictures_of": source.name}
    pixels = {"images": source.size, "labelled_pixels": scores.labelled}
    write_json(folder / "report.json", {**means, **pixels, "options": everything})
    shares = [(*row[:2], *(value / 100 for value in row[2:])) for row in rows]
    write_table(folder / "classes.csv", ("name", "pixels", "iou", "accuracy", "dice"), shares)
    write_page(
        folder / "report.html",
        f"{Path(options.model).name} on {source.name}",
        {
            "model": options.model,
            "pictures": source.describe_size(),
            "predicted on": described_size(options),
            "labelled pixels": scores.labelled,
            "of a picture": "mIoU over the classes in it or predicted there",
        },
        [
            Table("Scores, %", list(TITLES.values()), [[100 * means[name] for name in TITLES]]),
            Table("Classes, the hardest first, %", ["class", "labelled pixels", "IoU", "accuracy", "Dice"], rows),
            *confusion_table(scores, source.id2label),
        ],
        worst.tiles,
        score_name="mIoU",
        options=everything,
    )
    print(f"report.html, report.json and classes.csv in {folder}")


def described_size(options: argparse.Namespace) -> str:
    """What the network saw, for people."""
    if options.full_size:
        size = "pictures as they are"
    elif options.short_side:
        size = f"pictures of short side {options.short_side}"
    else:
        size = "pictures as the model's processor makes them"
    if not options.window:
        return f"whole {size}"
    return f"windows of {options.window} every {options.stride or default_stride(options.window)} pixels of {size}"


def class_rows(scores: SegmentationScores, names: Mapping[int, str]) -> list[list[Any]]:
    """Name, pixels, IoU, accuracy and Dice in per cent of every class, the lowest IoU first.

    Classes without a labelled pixel come last: one that is predicted nevertheless has an IoU of 0, and is not hard.
    """
    pixels = scores.matrix.sum(axis=1)
    columns = zip(scores.iou, scores.accuracy, scores.dice, strict=True)
    rows = [
        [names[label], int(pixels[label]), *(100 * float(value) for value in values)]
        for label, values in enumerate(columns)
    ]
    return sorted(rows, key=lambda row: (not row[1], np.isnan(row[2]), row[2]))


def confusion_table(scores: SegmentationScores, names: Mapping[int, str]) -> list[Table]:
    """The classes most of whose pixels are taken for another one; nothing where everything is right."""
    wrong = scores.matrix.copy()
    np.fill_diagonal(wrong, 0)
    most = [np.unravel_index(place, wrong.shape) for place in np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]]
    rows = [
        [names[int(true)], names[int(found)], int(wrong[true, found]),
         100 * float(wrong[true, found] / scores.matrix[true].sum())]
        for true, found in most if wrong[true, found]
    ]  # fmt: skip
    columns = ["class", "taken for", "pixels", "% of the class"]
    return [Table("Confused most", columns, rows)] if rows else []
