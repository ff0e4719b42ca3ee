"""Files and folders that appear under their final name whole, or not at all.

What is written is made under a temporary name beside the final one and renamed. A file's temporary name nobody can
guess, and nothing is written through a link that lies at either name: a link at the final one is replaced.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from d_emo.common.messages import first_line, printable

PARTIAL_PREFIX = ".partial-"
# Of a folder that is in use; see `locks`.
LOCK_FILE = ".lock"


def cache_folder() -> Path:
    """Where what can be computed again is kept: $D_EMO_CACHE, or d_emo in the user's cache folder.

    Raises:
        OSError: there is neither.
    """
    if chosen := os.environ.get("D_EMO_CACHE"):
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d_emo"
    except RuntimeError as error:  # a user without a home, as in some containers
        raise OSError("this user has no home folder to keep a cache in; set $D_EMO_CACHE to a folder") from error


def partial_path(path: Path) -> Path:
    """The name beside `path` under which a folder is made; several processes that make it together know it."""
    return path.with_name(PARTIAL_PREFIX + path.name)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a name to write a file under; at the end its content is on the disk and the file has its final name.

    The name lies in a new folder of its own, so several processes may write the same file: the last one's stays. An
    OSError names `path`, whatever it came from.
    """
    with _naming(path), tempfile.TemporaryDirectory(prefix=PARTIAL_PREFIX, dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        sync(partial)
        partial.replace(path)


@contextlib.contextmanager
def written_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill; at the end it has its final name, in place of an older one."""
    partial = new_partial_folder(path)
    try:
        with _naming(path):
            yield partial
            replace_folder(partial, path)
    finally:
        remove(partial)


def new_partial_folder(path: Path) -> Path:
    """The empty folder beside `path` in which its content is made; what a killed process left there is deleted."""
    partial = partial_path(path)
    remove(partial)
    with _naming(path):
        partial.mkdir(parents=True)  # fails where somebody has put a link meanwhile
    return partial


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """OSErrors of temporary names, and those that name no file, name the file that was to be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # as NumPy says that a disk takes no more
            raise OSError(f"{path} cannot be written ({error})") from error
        if error.filename and PARTIAL_PREFIX not in str(error.filename):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextlib.contextmanager
def appended(path: Path) -> Iterator[IO[str]]:
    """Open a text file to write at its end, not through a link. Lines end as they are written."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with _naming(path), os.fdopen(os.open(path, flags, 0o666), "a", newline="", encoding="utf-8") as file:
        yield file


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("r+b") as file:  # Windows flushes writable files only
        os.fsync(file.fileno())


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    refuse_pipe(path)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def content_digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a table that JSON can hold, whatever its order; for a file that carries its own digest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")


def refuse_pipe(path: Path) -> None:
    """Refuse what lies at a file's name and is none: reading a pipe would wait for somebody to write into it."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "this is no plain file", str(path))


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The table that a JSON file holds.

    Raises:
        ValueError: it holds something else; `remedy` says what to do.
        OSError: it cannot be read.
    """
    refuse_pipe(path)
    try:
        content = json.loads(path.read_bytes())  # UTF-8, 16 or 32, with a mark of it or without
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__} instead of a table")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}); {remedy}.") from error
    return content


def make_folder(path: Path) -> None:
    """Make a folder within one of ours, if it is not there.

    Raises:
        OSError: a file, or a link, lies in its place: nothing is written through links.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    path.mkdir(parents=True, exist_ok=True)


def check_writable(path: Path, option: str, *, folder: bool = False) -> None:
    """Find out before the work, not after it, that its result could not be written.

    Args:
        path: what will be written.
        option: how the user named it: "--output-dir".
        folder: whether it is a folder.

    Raises:
        ValueError: something else lies there, or the place may not be written in.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{option} {printable(str(path))}: a name on the way there is no text in UTF-8, and safetensors and "
            "TensorBoard open no such files; choose another place."
        ) from None
    if folder and os.path.lexists(path) and not path.is_dir():
        raise ValueError(f"{option} {path} is no folder; name another.")
    if not folder and path.is_dir():
        raise ValueError(f"{option} {path} is a folder; name a file in it.")
    place = path if folder else path.parent
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{option} {path}: {place} is no folder; name another place.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: nothing may be written in {place}; name another place.")


def check_apart(path: Path, option: str, sources: Mapping[str, Any]) -> None:
    """Refuse output that would lie among the pictures it is made of, and be taken for some of them the next time.

    Args:
        path: of the output.
        option: how the user named it: "--output-dir".
        sources: folders of pictures, or None, by the option that named them.

    Raises:
        ValueError: it lies in one of them.
    """
    for name, source in sources.items():
        if source and Path(source).is_dir() and path.resolve().is_relative_to(Path(source).resolve()):
            raise ValueError(f"{option} {path} lies in {name} {source}, among the pictures; choose a folder outside.")


def check_replaceable(folder: Path, option: str, mark: str, kind: str) -> None:
    """Find out before the work that a folder could be written, and that it holds nothing but an older one of its kind.

    Args:
        folder: what will be written.
        option: how the user named it: "--output-dir".
        mark: the file in it that every folder of the kind has.
        kind: of its content, for people: "pipeline".

    Raises:
        ValueError: something else lies there, or nothing may be written there.
    """
    check_writable(folder, option, folder=True)
    if holds_something(folder) and not (folder / mark).is_file():
        raise ValueError(f"{option} {folder} is not empty and holds no {kind}; choose another.")


def replace_folder(source: Path, target: Path) -> None:
    """Rename a folder, replacing an older one of the same name; the older one is deleted last."""
    replaced = partial_path(target.with_name(f"replaced-{target.name}"))
    remove(replaced)
    if os.path.lexists(target):
        target.rename(replaced)
    source.rename(target)
    remove(replaced)


def remove(path: Path) -> None:
    """Delete a file, a folder or a link (never what it leads to), if it is there and can be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove_partial(folder: Path) -> None:
    """Delete what a killed process left half-written in `folder`; for who holds its lock."""
    for path in folder.glob(f"{PARTIAL_PREFIX}*"):
        remove(path)


def holds_something(folder: Path) -> bool:
    """Whether a folder exists and has any content besides traces of this package's processes."""
    return folder.is_dir() and any(
        path.name != LOCK_FILE and not path.name.startswith(PARTIAL_PREFIX) for path in folder.iterdir()
    )
