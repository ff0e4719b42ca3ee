"""The one listing: which files of a folder are pictures or videos, in which order, which of its folders are classes.

- Hidden files and folders (a dot in front) and those of operating systems and shared disks are not seen.
- Links are followed, but no folder is entered twice below the same class, and a folder around the classes is none of
  them. Pipes, sockets and devices are never opened.
- Pictures are told by their suffix: every one of a format that Pillow decodes by itself. So are other files that a
  caller names the suffixes of, such as videos; where this page says pictures, it means them, too.
- Classes are in the order of their numbers where all of them are whole numbers, else in that of their names.
- What is left out is counted, for one line that people see.
"""

import collections
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import PIL.Image

from d_emo.common import checks
from d_emo.common.messages import first_line, printable
from d_emo.images.decode import readable_formats
from d_emo.images.labels import class_name

# Without regard to case. Names with a dot in front need not be here.
SYSTEM_NAMES = {
    "__macosx", "icon\r", "network trash folder", "temporary items",  # macOS
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "recycler", "system volume information",  # Windows
    "lost+found", "__pycache__",  # Linux, Python
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp", "@sharebin",  # disks on a network
}  # fmt: skip
# A root of such folders holds parts of a data set, not classes.
PARTS = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "dev"}
HIDDEN = "hidden or of a system"
# Reasons that are shown of what was left out; the rest is counted.
SHOWN_REASONS = 6


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not meant for people: of an operating system, an editor, a shared disk."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def hidden_path(path: str) -> bool:
    """Whether a part of a path with slashes, as tar files have it, is hidden."""
    return any(is_hidden(part) for part in path.split("/") if part not in ("", ".", ".."))


def picture_suffixes() -> set[str]:
    """Suffixes, dot included, of the formats that Pillow decodes by itself."""
    formats = {*readable_formats(), "MPO"}  # the latter by the JPEG reader
    return {suffix for suffix, name in PIL.Image.registered_extensions().items() if name in formats}


def parts_among(names: Iterable[str]) -> list[str]:
    """Names of folders that are parts of a data set, those to train on first."""
    parts = {name for name in names if name.casefold() in PARTS}
    return sorted(parts, key=lambda name: (not name.casefold().startswith("train"), name))


def class_order(names: list[str]) -> list[int]:
    """The order of names of classes, as places in the list: by number if all are whole numbers, else by alphabet."""
    numbers = all(re.fullmatch("[0-9]+", name) for name in names)
    return sorted(range(len(names)), key=lambda place: (int(names[place]) if numbers else 0, names[place]))


def describe_left_out(left_out: collections.Counter) -> str:
    """Reasons and counts in one line; nothing if nothing was left out."""
    reasons = left_out.most_common()
    parts = [f"{count:,} {reason}" for reason, count in reasons[:SHOWN_REASONS]]
    if rest := sum(count for _, count in reasons[SHOWN_REASONS:]):
        parts.append(f"{rest:,} others")
    return f"left out: {', '.join(parts)}" if parts else ""


@dataclass
class Listing:
    """What a folder holds.

    Attributes:
        root: the folder.
        pictures: by class folder, or all by `root` itself.
        left_out: why and how often.
        broken_links: those that lead nowhere.
        hint: what else people should know.
    """

    root: Path
    pictures: dict[Path, list[Path]] = field(default_factory=dict)
    left_out: collections.Counter = field(default_factory=collections.Counter)
    broken_links: list[Path] = field(default_factory=list)
    hint: str = ""

    @property
    def note(self) -> str:
        """What was left out and else is worth a word, in one line; nothing if nothing is."""
        left_out = collections.Counter(self.left_out)
        if self.broken_links:
            first = printable(str(self.broken_links[0].relative_to(self.root)))
            left_out[f"broken links (first {first})"] = len(self.broken_links)
        return "; ".join(part for part in (self.hint, describe_left_out(left_out)) if part)


def list_classes(root: Path, suffixes: Collection[str] | None = None) -> Listing:
    """The pictures of every folder in `root`, at any depth, in the order of the class ids.

    Args:
        root: the folder of class folders.
        suffixes: of what is listed, dot included, in small letters; None for pictures.

    Raises:
        ValueError: a folder cannot be listed; two are the same class but for the writing; they are parts of a data set
            (train and val), not classes.
    """
    root = checks.path_named(root, "root")
    listing = Listing(root)
    folders = []
    entries = _entries(root)
    around = {_identity(folder) for folder in (root, *root.resolve().parents)}
    for entry in entries:
        if is_hidden(entry.name):
            listing.left_out[HIDDEN] += 1
        elif _is(entry.is_dir):
            if _identity(root / entry.name) in around:
                listing.left_out["links to a folder around them"] += 1
            else:
                folders.append(root / entry.name)
        elif _is(entry.is_file):
            listing.left_out["beside the class folders"] += 1
        else:
            _leave_out(root / entry.name, listing)
    _refuse_same_names(folders)
    suffixes = picture_suffixes() if suffixes is None else suffixes
    for place in class_order([path.name for path in folders]):
        listing.pictures[folders[place]] = _sorted(_walk(folders[place], {_identity(root)}, listing, suffixes))
    _refuse_parts(listing)
    return listing


def list_all(root: Path) -> Listing:
    """All pictures of `root` at any depth, in the order of their paths."""
    root = checks.path_named(root, "root")
    listing = Listing(root)
    listing.pictures[root] = _sorted(_walk(root, set(), listing, picture_suffixes(), below_root=True))
    parts = sorted({path.relative_to(root).parts[0] for path in listing.pictures[root]} & _part_names(root))
    if len(parts) > 1:
        listing.hint = f"{' and '.join(parts)} are read together"
    return listing


def _part_names(root: Path) -> set[str]:
    return {entry.name for entry in _entries(root) if entry.name.casefold() in PARTS and _is(entry.is_dir)}


def _walk(
    folder: Path,
    entered: set[tuple[int, int]],
    listing: Listing,
    suffixes: Collection[str],
    below_root: bool = False,
) -> Iterator[Path]:
    """Files of a folder with such suffixes; `entered` has the folders that are not entered again.

    Each folder in the root has a set of its own, so that all pictures are as many as those of all classes.
    """
    identity = _identity(folder)
    if identity in entered:
        listing.left_out["links to folders that are listed already"] += 1
        return
    entered.add(identity)
    for entry in _entries(folder):
        suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
        if is_hidden(entry.name):
            listing.left_out[HIDDEN] += 1
        elif _is(entry.is_dir):
            yield from _walk(folder / entry.name, {*entered} if below_root else entered, listing, suffixes)
        elif not _is(entry.is_file):
            _leave_out(folder / entry.name, listing)
        elif suffix in suffixes:
            yield folder / entry.name
        else:
            listing.left_out[printable(suffix) or "without a suffix"] += 1


def _entries(folder: Path) -> list[os.DirEntry]:
    """What lies in a folder; what is no link first, so that a folder is listed under its own name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        raise ValueError(f"{printable(str(folder))} cannot be listed ({first_line(error)}).") from error


def _is(question: Callable[[], bool]) -> bool:
    try:
        return question()
    except OSError:  # a link to itself, or behind a folder that is closed to us
        return False


def _leave_out(path: Path, listing: Listing) -> None:
    """Note what is neither a file nor a folder."""
    if path.is_symlink() and not _is(path.exists):
        listing.broken_links.append(path)
    else:
        listing.left_out["pipes, sockets or devices"] += 1


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _sorted(paths: Iterator[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.parts)


def _refuse_same_names(folders: list[Path]) -> None:
    by_name: dict[str, Path] = {}
    for path in folders:
        name = class_name(path.name)
        number = str(int(name)) if re.fullmatch("[0-9]+", name) else name
        for form in {name, number}:
            other = by_name.setdefault(form, path)
            if other is not path:
                raise ValueError(
                    f"the folders {other.name!a} and {path.name!a} are the same class, written in two ways; "
                    "make them one."
                )


def _refuse_parts(listing: Listing) -> None:
    parts = parts_among(
        folder.name
        for folder, pictures in listing.pictures.items()
        if pictures and all(path.parent != folder for path in pictures)
    )
    if len(parts) > 1:
        raise ValueError(
            f"it holds {' and '.join(parts)}, which are parts of a data set with class folders in them, not classes; "
            f"name one: {listing.root / parts[0]}."
        )
