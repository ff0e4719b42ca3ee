"""Folders of many files of equal length, each whole or not there, and a manifest that says what they hold.

Latents encoded beforehand, samples that are drawn and features of images are kept in this way: a killed run goes on
with the files that are missing, and a folder of something else is refused.
"""

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d_emo.common.files import read_json, remove, write_json
from d_emo.common.output import Progress

MANIFEST = "manifest.json"
# From this size on, checking files shows its progress.
SLOW_CHECK_BYTES = 2**29


@dataclass(frozen=True)
class ShardFolder:
    """A folder of files that hold `size` items each, the last one what is left.

    Attributes:
        folder: where they lie.
        name: "NAME-{:09d}.npy" or the like; the number is that of a file's first item.
        count: items in all.
        size: items a file.
    """

    folder: Path
    name: str
    count: int
    size: int

    @property
    def ranges(self) -> list[range]:
        """Items of each file."""
        return [range(start, min(start + self.size, self.count)) for start in range(0, self.count, self.size)]

    def path(self, shard: range) -> Path:
        """File of a range of items, named by the first one."""
        return self.folder / self.name.format(shard.start)

    def missing(self) -> list[range]:
        """Ranges whose files are not there."""
        return [shard for shard in self.ranges if not self.path(shard).is_file()]

    def discard_damaged(self, check: Callable[[range], object], rank: int = 0, world_size: int = 1) -> list[str]:
        """Delete what cannot be used, so that it is made again; for who holds the folder's lock.

        Args:
            check: reads a file and raises ValueError where it is not what it should be.
            rank, world_size: this process takes every `world_size`-th file from `rank` on.

        Returns:
            Why, a line for each.
        """
        shards = [shard for shard in self.ranges[rank::world_size] if os.path.lexists(self.path(shard))]
        slow = sum(self.path(shard).lstat().st_size for shard in shards) > SLOW_CHECK_BYTES
        reasons = []
        with Progress(len(shards), "file", f"checking {self.folder}", shown=slow, leave=False) as progress:
            for shard in shards:
                try:
                    if not self.path(shard).is_file():
                        raise ValueError(f"{self.path(shard)} is no file")
                    check(shard)
                except ValueError as error:
                    if isinstance(error.__cause__, MemoryError):
                        raise
                    remove(self.path(shard))
                    reasons.append(str(error))
                progress.update()
        return reasons


def read_manifest(folder: Path, remedy: str) -> dict[str, Any] | None:
    """What a folder says that it holds; None where nothing is said.

    Raises:
        ValueError: the file is no table in JSON; `remedy` says what to do.
    """
    try:
        return read_json(folder / MANIFEST, remedy)
    except FileNotFoundError:
        return None


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Say what a folder holds; this makes it one of its kind."""
    write_json(folder / MANIFEST, content)


def differences(
    stored: dict[str, Any], wanted: dict[str, Any], free: Collection[str] = (), prefix: str = ""
) -> list[str]:
    """What two manifests say differently, `NAME old -> new` each, names of inner tables after their outer ones.

    Args:
        stored, wanted: tables that JSON can hold; it makes lists of tuples.
        free: names that may differ.
        prefix: of the names.
    """
    stored, wanted = (json.loads(json.dumps(table)) for table in (stored, wanted))
    changes = []
    for name in sorted({*stored, *wanted} - {*free}):
        old, new = stored.get(name), wanted.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            changes += differences(old, new, prefix=f"{prefix}{name}.")
        elif old != new:
            changes.append(f"{prefix}{name} {old!r} -> {new!r}")
    return changes
