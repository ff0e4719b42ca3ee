"""Files and folders that appear under their final name whole, or not at all."""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PARTIAL_PREFIX = ".partial-"


def cache_folder() -> Path:
    """Where what can be computed again is kept: $D_EMO_CACHE, or d_emo in the user's cache folder."""
    if chosen := os.environ.get("D_EMO_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d_emo"


def partial_path(path: Path) -> Path:
    """The name beside `path` under which its content is made."""
    return path.with_name(PARTIAL_PREFIX + path.name)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a name to write a file under; at the end its content is on the disk and the file has its final name."""
    partial = partial_path(path)
    yield partial
    sync(partial)
    partial.replace(path)


@contextlib.contextmanager
def written_by_one_of_many(path: Path) -> Iterator[Path]:
    """`written_whole` for a file that several processes may write at once: each has a folder of its own for it."""
    with tempfile.TemporaryDirectory(prefix=PARTIAL_PREFIX, dir=path.parent) as folder:
        partial = Path(folder) / path.name
        yield partial
        sync(partial)
        partial.replace(path)


def sync(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with path.open("r+b") as file:  # Windows flushes writable files only
        os.fsync(file.fileno())


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole."""
    with written_whole(path) as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")


def replace_folder(source: Path, target: Path) -> None:
    """Rename a folder, replacing an older one of the same name; the older one is deleted last."""
    replaced = partial_path(target.with_name(f"replaced-{target.name}"))
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    source.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_partial(folder: Path) -> None:
    """Delete what a killed process left half-written in `folder`."""
    for path in folder.glob(f"{PARTIAL_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
