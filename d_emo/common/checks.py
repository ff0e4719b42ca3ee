"""Checks of what functions are given, by the rules of `ranges`: the value as Python's own type, or a ValueError.

Every message is one line of one form: `size=0 is not a whole number from 1 on (16 is usual).`
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from d_emo.common.ranges import LARGEST, OneOf, Real, Rule, Whole


class PathName(Rule):
    """A path, of a text or another path; it need not exist."""

    def take(self, value: Any) -> Path:
        """See `Rule`."""
        name = os.fspath(value) if isinstance(value, str | os.PathLike) else None
        if not isinstance(name, str) or "\0" in name:
            raise ValueError
        return Path(name)

    def __str__(self) -> str:
        return "the name of a file or folder"


class Name(PathName):
    """A text that is not empty: of a file, a folder or a repository."""

    def take(self, value: Any) -> str:  # type: ignore[override]  # a repository's is no path
        """See `Rule`."""
        super().take(value)
        if not os.fspath(value):
            raise ValueError
        return str(os.fspath(value))

    def __str__(self) -> str:
        return "a name"


def whole(value: Any, name: str, least: int = 1, most: int = LARGEST, hint: str = "") -> int:
    """A whole number from `least` to `most`, NumPy's included, truth values not."""
    return Whole(least, most, hint).check(value, name)


def number(value: Any, name: str, least: float = -math.inf, most: float = math.inf, hint: str = "") -> float:
    """A finite number from `least` to `most`, NumPy's included, truth values not."""
    return float(Real(least, most, hint).check(value, name))


def one_of(value: Any, name: str, allowed: Iterable[str | int]) -> Any:
    """One of some words or whole numbers."""
    return OneOf(tuple(allowed)).check(value, name)


def path_named(value: Any, name: str) -> Path:
    """A path, of a text or another path; it need not exist."""
    return PathName().check(value, name)


def text(value: Any, name: str) -> str:
    """A name that is not empty: of a file, a folder or a repository."""
    return Name().check(value, name)
