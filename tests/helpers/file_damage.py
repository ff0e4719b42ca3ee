"""What becomes of files on real disks: cut, changed, exchanged for something else."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

JSON_SHAPES = {
    "a list": "[1, 2]",
    "null": "null",
    "a number": "3",
    "a text": '"text"',
    "nothing in it": "{}",
    "100,000 levels": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "100,000 lists": "[" * 100_000 + "]" * 100_000,
    "a number of 10,000 digits": '{"a": ' + "9" * 10_000 + "}",
    "an infinite number": '{"a": 1e999}',
    "a key twice": '{"a": 1, "a": 2}',
    "UTF-16": json.dumps({"a": 1}).encode("utf-16").decode("latin-1"),
    "no UTF-8": '{"a": "\xff\xfe"}',
}


def _cut(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _last_byte_lost(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _noise(path: Path) -> None:
    path.write_bytes(np.random.RandomState(0).bytes(max(1, path.stat().st_size)))


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def flip_bit(place: float) -> Callable[[Path], None]:
    """Change one bit at a share of a file's length."""

    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 0x10
        path.write_bytes(content)

    return flip


def _exchanged(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def exchange(path: Path) -> None:
        path.unlink()
        make(path)

    return exchange


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b"") and None,
    "a quarter": _cut(0.25),
    "half": _cut(0.5),
    "the last byte lost": _last_byte_lost,
    "noise": _noise,
    "zeros": _zeros,
    "a bit in front": flip_bit(0.02),
    "a bit in the middle": flip_bit(0.5),
    "a bit at the end": flip_bit(0.98),
    "a folder": _exchanged(lambda path: path.mkdir()),
    "a link to nowhere": _exchanged(lambda path: path.symlink_to(path.parent / "nowhere")),
    "a pipe": _exchanged(lambda path: os.mkfifo(path)),
    "not readable": lambda path: path.chmod(0),
}
# With these a file's content is another one beyond doubt, so that nothing may go on with it.
RUINED = ("empty", "half", "noise", "zeros", "a folder", "a link to nowhere", "a pipe")


def damages(path: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every damage that a file can take; those of JSON for what is JSON."""
    for name, damage in DAMAGES.items():
        if name != "not readable" or os.geteuid() != 0:  # the superuser reads everything
            yield name, damage
    if path.suffix == ".json":
        for name, text in JSON_SHAPES.items():
            content = text.encode("latin-1")
            yield name, lambda path, content=content: path.write_bytes(content) and None
        yield from _other_values(path)


def _other_values(path: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Each of the top's values exchanged for one of another kind."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        return
    for key in content:
        for other in ([], {}, None, "text", -1, 10**30):
            if type(content[key]) is not type(other):
                changed = json.dumps({**content, key: other}).encode()
                yield (
                    f"{key} = {json.dumps(other)}",
                    lambda path, changed=changed: path.write_bytes(changed) and None,
                )
