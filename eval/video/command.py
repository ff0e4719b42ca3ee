"""What `evaluate_video_classifier` does after it has read its options: predict, score, draw."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForVideoClassification, AutoVideoProcessor

import d_emo  # noqa: F401  makes transformers know V-EMOv2
from d_emo.common.locks import output_folder
from d_emo.common.processes import default_device
from d_emo.common.saved_folders import VIDEO_CLASSIFIER
from d_emo.eval.classification.command import ClassScore, align_labels, report
from d_emo.eval.reports.evaluation import load_model, opening_data, report_folder
from d_emo.eval.reports.page import Table, Tile, write_page
from d_emo.eval.reports.panels import strip
from d_emo.eval.video.accuracy import PreparedClips, predict_clips
from d_emo.images.labels import LabelResolver, read_class_names
from d_emo.video.folders import ClipSource, open_videos

# Answers that the page shows of each video.
SHOWN_ANSWERS = 3


def run(options: argparse.Namespace) -> None:
    """Predict, score, print, save; what is quickly found to be wrong comes first."""
    folder = report_folder(options, VIDEO_CLASSIFIER)
    videos = chosen_videos(options)
    model, processor = open_video_classifier(options.model)
    names = model.config.id2label
    source, note = align_labels(videos, names)
    if options.opposites:
        source = replace(source, labels=reversed_labels(options.opposites, names)[source.labels])
    with output_folder(folder):
        evaluate(options, folder, model, processor, source, note)


def evaluate(
    options: argparse.Namespace, folder: Path, model: Any, processor: Any, source: ClipSource, note: str
) -> None:
    """Predict on videos whose classes are the model's, and write the report; `note` is a remark on the classes."""
    device, names = default_device(), model.config.id2label
    print(f"{options.model} on {source.name}: {source.describe_size()}, {len(np.unique(source.labels))} classes{note}")
    indices: list[int] = []
    answers: list[torch.Tensor] = []

    def keep(some: list[int], logs: torch.Tensor) -> None:
        indices.extend(some)
        answers.append(logs)

    predictions = predict_clips(
        model.to(device).eval(),
        processor,
        source,
        clips=options.clips,
        crops=options.crops,
        order=options.order,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        device=device,
        progress=True,
        skip_bad=options.on_bad_image == "skip",
        keep=keep,
    )
    if not indices:
        raise ValueError(f"none of the {source.size} videos of {source.name} can be read.")
    about = {**vars(options), "videos": source.name, "frames": processor.num_frames}
    classes = report(predictions, names, folder, about, things="videos")
    tiles = worst(options, processor, source, names, indices, torch.cat(answers))
    write_page(
        folder / "report.html",
        f"{Path(options.model).name} on {source.name}",
        {
            "model": options.model,
            "videos": len(indices),
            "frames": f"{processor.num_frames}, {options.order}",
            "views": f"{options.clips} x {options.crops} (clips x crops)",
            "top-1": f"{predictions.accuracy(1):.2%}",
            "top-5": f"{predictions.accuracy(5):.2%}",
            "cross-entropy": f"{predictions.loss:.4f}",
        },
        [class_table(classes)],
        tiles,
        score_name="probability of the true class",
        options=about,
    )
    print(f"report.html in {folder}: {len(tiles)} videos, the worst first")


def open_video_classifier(name: str) -> tuple[Any, Any]:
    """A model and its video processor.

    Raises:
        ValueError: it does not load, or they are not for the same number of frames.
    """
    model, processor = load_model(name, VIDEO_CLASSIFIER, AutoModelForVideoClassification, AutoVideoProcessor)
    of_model, of_processor = (getattr(part, "num_frames", None) for part in (model.config, processor))
    if of_model and of_processor is None:  # transformers' own processors leave it to the model
        processor.num_frames = of_processor = of_model
    if of_processor is None:
        raise ValueError(
            f"--model {name} does not say how many frames a clip has (num_frames of its config.json, or of its "
            "video_preprocessor_config.json); write it there."
        )
    if of_model not in (None, of_processor):
        raise ValueError(
            f"--model {name} is for clips of {of_model} frames, its video processor for {of_processor}; restore the "
            "folder's video_preprocessor_config.json."
        )
    return model, processor


def chosen_videos(options: argparse.Namespace) -> ClipSource:
    """The videos that the options name.

    Raises:
        ValueError: they do not open; the message names the option.
        ImportError: PyAV is not installed.
    """
    with opening_data(options):
        return open_videos(
            options.data_dir,
            options.dataset,
            config=options.dataset_config,
            split=options.dataset_split,
            video_column=options.video_column,
            label_column=options.label_column,
            class_names=read_class_names(options.class_names) if options.class_names else None,
        )


def reversed_labels(text: str, names: Mapping[int, str]) -> np.ndarray:
    """--opposites, read: the class id (K,) that each class has backwards.

    Args:
        text: pairs of classes, `left=right,up=down`; others stay what they are.
        names: of all classes.

    Raises:
        ValueError: a part is no pair, or names no class.
    """
    resolver, table = LabelResolver(names, len(names)), np.arange(len(names))
    for part in text.split(","):
        pair = part.split("=")
        if len(pair) != 2:
            raise ValueError(f"--opposites {text}: {part!r} is no pair of classes; expected left=right,up=down.")
        try:
            first, second = (resolver.resolve(name.strip()) for name in pair)
        except ValueError as error:
            raise ValueError(f"--opposites {text}: {error}") from error
        table[[first, second]] = second, first
    return table


def class_table(classes: Sequence[ClassScore]) -> Table:
    """What became of each class's videos, the worst class first."""
    columns = ("class", "videos", "% found", "% of such answers right", "mostly taken for")
    rows = [
        (entry.name, entry.images, 100 * entry.recall, 100 * entry.precision, entry.confused_with)
        for entry in sorted(classes, key=lambda entry: entry.recall)
    ]
    return Table("Classes, the hardest first", columns, rows)


def worst(
    options: argparse.Namespace,
    processor: Any,
    source: ClipSource,
    names: Mapping[int, str],
    indices: list[int],
    answers: torch.Tensor,
) -> list[Tile]:
    """Frames of the videos whose true class is the least probable, as the model saw them but for the crop.

    Args:
        options: of the command.
        processor: of the model.
        source: the videos.
        names: of the classes.
        indices: of the videos that were shown, N.
        answers: their log-probabilities, (N, K).
    """
    prepared = PreparedClips(source, processor, 1, 1, options.order)
    truth = torch.from_numpy(source.labels[indices])
    shares = answers.exp().gather(1, truth[:, None])[:, 0]
    tiles = []
    for place in shares.argsort(stable=True)[: options.pictures].tolist():
        index, label = indices[place], int(truth[place])
        frames = prepared.frames(index).permute(0, 2, 3, 1).numpy()
        best = answers[place].exp().topk(min(SHOWN_ANSWERS, answers.shape[1]))
        said = ", ".join(
            f"{names[answer]} {share:.1%}"
            for share, answer in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        )
        caption = f"{Path(source.read(index).name).name}: {names[label]}; answered {said}"
        tiles.append(Tile(strip(list(frames)), caption, float(shares[place])))
    return tiles
