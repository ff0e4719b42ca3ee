"""What `evaluate_detector` does after it has read its options: detect, score, report."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from d_emo.common.locks import output_folder
from d_emo.common.processes import default_device
from d_emo.common.saved_folders import OBJECTS
from d_emo.detection.saved import DetectorBundle, load_detector
from d_emo.eval.detection.predict import evaluate_objects
from d_emo.eval.detection.report import Evaluation, write_report
from d_emo.eval.reports.evaluation import opening_data, report_folder
from d_emo.images.matching import match_classes
from d_emo.images.objects import ObjectSource, refuse_unusable, relabelled, some_of
from d_emo.images.open_objects import open_objects


def run(options: argparse.Namespace) -> None:
    """Detect, score, print, save; what is quickly found to be wrong comes first."""
    folder = report_folder(options, OBJECTS)
    try:
        bundle = load_detector(options.model)
    except ValueError as error:
        raise ValueError(f"--model {error}") from error
    source, note = align_classes(chosen_pictures(options, bundle.system == "mask_rcnn"), bundle.id2label)
    with output_folder(folder):
        evaluate(options, folder, bundle, source, note)


def evaluate(
    options: argparse.Namespace, folder: Path, bundle: DetectorBundle, source: ObjectSource, note: str
) -> None:
    """Detect in pictures whose classes are the model's, and write the report; `note` is a remark on the classes."""
    device = default_device()
    print(f"{options.model} on {source.name}: {source.describe_size()}{note}")
    evaluation = Evaluation(source.id2label, options.score_threshold, options.pictures)
    scores = evaluate_objects(
        bundle.model.to(device).eval(),
        source,
        device=device,
        num_workers=options.num_workers,
        progress=True,
        keep=evaluation.add,
    )
    write_report(scores, evaluation, source, folder, options)


def chosen_pictures(options: argparse.Namespace, masks: bool) -> ObjectSource:
    """The pictures that the options name.

    Args:
        options: of the command.
        masks: whether masks are wanted.

    Raises:
        ValueError: they do not open; the message names the option.
        UnreadableImageError: a picture cannot be used, as its header says.
    """
    with opening_data(options):
        source = open_objects(
            options.data_dir,
            options.dataset,
            annotations=options.annotations,
            mask_dir=options.mask_dir,
            masks=masks,
            config=options.dataset_config,
            split=options.dataset_split,
            image_column=options.image_column,
            objects_column=options.objects_column,
            box_format=options.box_format,
            class_names=options.class_names,
        )
    if options.max_images:
        source = some_of(source, np.arange(min(source.size, options.max_images)))
    refuse_unusable(source, "Repair or remove them.")
    return source


def align_classes(source: ObjectSource, id2label: Mapping[int, str]) -> tuple[ObjectSource, str]:
    """The pictures with the model's class ids, and a remark for people; see `match_classes`.

    Raises:
        ValueError: the classes do not go together.
    """
    ids, note = match_classes(source.id2label, id2label, source.name)
    table = np.array([ids[label] for label in range(len(ids))])
    return relabelled(source, table, id2label), note
