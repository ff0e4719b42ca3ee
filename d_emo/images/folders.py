"""Pictures in folders: a sub-folder a class, or, where classes are not wanted, in any way."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from d_emo.common import checks
from d_emo.common.output import Progress
from d_emo.images.decode import decode, refusal
from d_emo.images.labels import class_name, english_names
from d_emo.images.listing import list_all, list_classes
from d_emo.images.source import ImageSource

# Files of many kinds, some of which have no defined white. Their headers are read when a folder is opened.
TIFF_SUFFIXES = (".tif", ".tiff")
# From so many on, that shows its progress.
SLOW_HEADERS = 5000


def folder_source(root: Path, unconditional: bool) -> ImageSource:
    """A folder with one sub-folder a class, images at any depth below; `listing` has the rules.

    Folders named by ImageNet's WordNet ids get their English class names. For unconditional training the images may
    also lie in `root` itself.

    Raises:
        ValueError: there are no pictures, or classes without any; the message says what was left out.
    """
    root = checks.path_named(root, "root")
    if not root.is_dir():
        raise ValueError("there is no such folder.")
    listing = list_all(root) if unconditional else list_classes(root)
    files = listing.pictures
    note = f" ({listing.note})" if listing.note else ""
    if not any(files.values()):
        if unconditional:
            raise ValueError(f"there are no images in this folder{note}.")
        raise ValueError(
            f"there are no class folders with images in it{note}; expected {root}/CLASS/IMAGE.jpg, or images "
            "without classes: --unconditional."
        )
    names = [class_name(folder.name) for folder in files]
    empty = [name for name, found in zip(names, files.values(), strict=True) if not found]
    if empty:
        raise ValueError(f"class folders without images: {', '.join(empty[:10])}{note}; remove them or add images.")
    paths = [path for found in files.values() for path in found]
    return ImageSource(
        name=class_name(root.resolve().name),
        size=len(paths),
        read=lambda index: decode(paths[index], str(paths[index])),
        labels=np.repeat(np.arange(len(files)), [len(found) for found in files.values()]),
        id2label=dict(enumerate(english_names(names))) if not unconditional else {},
        files=paths,
        note=listing.note,
        unreadable=_unreadable(paths),
    )


def _unreadable(paths: Sequence[Path]) -> list[str]:
    """What is known to be unreadable before it is read."""
    tiffs = [path for path in paths if os.path.splitext(path.name)[1].lower() in TIFF_SUFFIXES]  # noqa: PTH122
    reasons = []
    with Progress(len(tiffs), "header", "reading", shown=len(tiffs) > SLOW_HEADERS, leave=False) as progress:
        for path in tiffs:
            reasons.append(refusal(path))
            progress.update()
    return [reason for reason in reasons if reason]
