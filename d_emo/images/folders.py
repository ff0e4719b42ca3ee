"""Pictures in folders: a sub-folder a class, or, where classes are not wanted, in any way."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from d_emo.common import checks
from d_emo.common.output import Progress
from d_emo.images.decode import decode, refusal
from d_emo.images.labels import class_name, english_names
from d_emo.images.listing import Listing, list_all, list_classes
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
    list_files = list_all if unconditional else list_classes
    rule = "" if unconditional else f"expected {root}/CLASS/IMAGE.jpg, or images without classes: --unconditional."
    paths, labels, names, note = labelled_files(root, list_files, "images", rule)
    return ImageSource(
        name=class_name(root.resolve().name),
        size=len(paths),
        read=lambda index: decode(paths[index], str(paths[index])),
        labels=labels,
        id2label=dict(enumerate(english_names(names))) if not unconditional else {},
        files=paths,
        note=note,
        unreadable=_unreadable(paths),
    )


def labelled_files(
    root: Path, list_files: Callable[[Path], Listing], things: str, rule: str
) -> tuple[list[Path], np.ndarray, list[str], str]:
    """The files of a folder, their class ids (N,), the names of the classes, and what was left out.

    Args:
        root: the folder.
        list_files: its listing.
        things: what the files are, for people.
        rule: how they would have to lie; empty where there are no class folders.

    Raises:
        ValueError: there is no such folder, there are no such files, or classes without any.
    """
    if not root.is_dir():
        raise ValueError("there is no such folder.")
    listing = list_files(root)
    files = listing.pictures
    note = f" ({listing.note})" if listing.note else ""
    if not any(files.values()):
        if not rule:
            raise ValueError(f"there are no {things} in this folder{note}.")
        raise ValueError(f"there are no class folders with {things} in it{note}; {rule}")
    names = [class_name(folder.name) for folder in files]
    empty = [name for name, found in zip(names, files.values(), strict=True) if not found]
    if empty:
        raise ValueError(f"class folders without {things}: {', '.join(empty[:10])}{note}; remove them or add {things}.")
    paths = [path for found in files.values() for path in found]
    return paths, np.repeat(np.arange(len(files)), [len(found) for found in files.values()]), names, listing.note


def _unreadable(paths: Sequence[Path]) -> list[str]:
    """What is known to be unreadable before it is read."""
    tiffs = [path for path in paths if os.path.splitext(path.name)[1].lower() in TIFF_SUFFIXES]  # noqa: PTH122
    reasons = []
    with Progress(len(tiffs), "header", "reading", shown=len(tiffs) > SLOW_HEADERS, leave=False) as progress:
        for path in tiffs:
            reasons.append(refusal(path))
            progress.update()
    return [reason for reason in reasons if reason]
