"""Sets of videos with a class each: a folder of videos a class, or a column of videos of `datasets`.

Files are listed as pictures are (`d_emo/images/listing.py`), and read by PyAV (`reading.py`) when a clip of them is
asked for, in the processes of a loader.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from d_emo.common import checks
from d_emo.images.decode import LONGEST_STRIP, UnreadableImageError
from d_emo.images.folders import labelled_files
from d_emo.images.labels import class_name, english_names
from d_emo.images.listing import list_classes
from d_emo.images.source import LabelledSource
from d_emo.images.stored_labels import describe_gaps
from d_emo.images.tables import LABEL_COLUMN, VIDEO_COLUMN, as_files, labelled_table, source_name, stored_file
from d_emo.video.reading import Video, pyav

# What FFmpeg reads has no list of suffixes: those of common containers, and animations.
VIDEO_SUFFIXES = frozenset({
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".f4v", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpe",
    ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv",
})  # fmt: skip


@dataclass(frozen=True)
class VideoFile:
    """A video that is not opened yet.

    Attributes:
        file: its path, or the bytes of the file.
        name: what to call it.
    """

    file: Path | bytes
    name: str

    def frames(self, least: int, choose: Callable[[int], Sequence[int]]) -> torch.Tensor:
        """Frames of it, (T, 3, H, W), uint8, RGB, upright.

        Args:
            least: frames that it has to have.
            choose: how many it has -> the numbers of those that are wanted, from 0 on.

        Raises:
            UnreadableImageError: it is damaged, no video, shorter than that, or a strip.
        """
        file = io.BytesIO(self.file) if isinstance(self.file, bytes) else self.file
        try:
            with Video(file, self.name) as video:
                if len(video) < least:
                    raise ValueError(
                        f"{self.name} is too short: it has {len(video)} frame{'s' * (len(video) > 1)}, a clip {least}"
                    )
                frames = video.frames(choose(len(video)))
        except ValueError as error:
            raise UnreadableImageError(str(error).removesuffix(".")) from error
        height, width = frames.shape[-2:]
        if max(height, width) > LONGEST_STRIP * min(height, width):
            raise UnreadableImageError(f"{self.name} is a strip of {width} x {height} pixels, of which no clip is made")
        return frames


@dataclass(frozen=True)
class ClipSource(LabelledSource):
    """A labelled set of videos; `read` gives `VideoFile`s."""

    things: ClassVar[str] = "videos"


def folder_videos(root: Path) -> ClipSource:
    """A folder with one sub-folder a class, videos at any depth below.

    Raises:
        ValueError: there is no such folder, no video in it, or classes without any; the message says what was left out.
        ImportError: PyAV is not installed.
    """
    pyav()
    root = checks.path_named(root, "root")
    paths, labels, names, note = labelled_files(
        root, lambda folder: list_classes(folder, VIDEO_SUFFIXES), "videos", f"expected {root}/CLASS/VIDEO.mp4."
    )
    return ClipSource(
        name=class_name(root.resolve().name),
        size=len(paths),
        read=lambda index: VideoFile(paths[index], str(paths[index])),
        labels=labels,
        id2label=dict(enumerate(names)),
        files=paths,
        note=note,
    )


def dataset_videos(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    video_column: str = VIDEO_COLUMN,
    label_column: str = LABEL_COLUMN,
    class_names: Sequence[str] | None = None,
) -> ClipSource:
    """Anything that `datasets.load_dataset` reads into a table with a column of videos.

    Args:
        name: Hub id, local dataset folder, or .parquet file.
        config: configuration name of a Hub dataset.
        split: split of the dataset.
        video_column: column of videos; where "video" is missing, the only one of that type.
        label_column: column of classes, likewise.
        class_names: names by class id, where the column has none itself.

    Raises:
        ValueError: it cannot be opened, is empty, or lacks a column or labels.
        ImportError: PyAV is not installed.
    """
    pyav()
    table, column, labels, names = labelled_table(
        name,
        config=config,
        split=split,
        column=video_column,
        label_column=label_column,
        class_names=class_names,
        default=VIDEO_COLUMN,
    )
    videos = as_files(table.select_columns([column]), column, VIDEO_COLUMN)

    def read(index: int) -> VideoFile:
        stored: Any = videos[index][column]
        row = f"{name}, row {index}"
        file = stored_file(stored)
        if file is None:
            raise UnreadableImageError(f"{row} holds no video")
        called = f"{row} ({stored['path']})" if stored.get("path") else row
        return VideoFile(file.getvalue() if isinstance(file, io.BytesIO) else Path(file), called)

    return ClipSource(
        name=source_name(name),
        size=len(table),
        read=read,
        labels=labels,
        id2label=dict(enumerate(english_names(names))),
        files=[Path(name)] if Path(name).is_file() else (),
        note=describe_gaps(names),
    )


def open_videos(
    folder: str | None,
    dataset: str | None,
    *,
    config: str | None = None,
    split: str = "train",
    video_column: str = VIDEO_COLUMN,
    label_column: str = LABEL_COLUMN,
    class_names: Sequence[str] | None = None,
) -> ClipSource:
    """The videos that a user names: a folder of class folders, which goes first, or a dataset.

    Raises:
        ValueError: see `folder_videos` and `dataset_videos`.
    """
    if folder is not None:
        return folder_videos(Path(checks.text(folder, "folder")))
    return dataset_videos(
        checks.text(dataset, "dataset"),
        config=config,
        split=split,
        video_column=video_column,
        label_column=label_column,
        class_names=class_names,
    )
