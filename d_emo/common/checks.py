"""Checks of what functions are given. Each raises a ValueError of one line: the argument, its value, the rule."""

import contextlib
import math
import operator
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

SHOWN = 60


def whole(value: Any, name: str, least: int = 1, most: int | None = None) -> int:
    """A whole number from `least` to `most`, NumPy's included, truth values not."""
    with contextlib.suppress(TypeError):  # NumPy's arrays of floats only look as if they could be one
        number = least - 1 if isinstance(value, bool) else operator.index(value)
        if number >= least and (most is None or number <= most):
            return number
    upper = "on" if most is None else f"to {most}"
    raise ValueError(f"{name} is {shown(value)}; a whole number from {least} {upper} is wanted.")


def number(value: Any, name: str, least: float, most: float = math.inf) -> float:
    """A finite number from `least` to `most`."""
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most and value < math.inf:
        return float(value)
    upper = "on" if most == math.inf else f"to {most:g}"
    raise ValueError(f"{name} is {shown(value)}; a number from {least:g} {upper} is wanted.")


def one_of(value: Any, name: str, choices: Collection[Any]) -> Any:
    """One of some values."""
    if isinstance(value, str | int) and not isinstance(value, bool) and value in choices:
        return value
    raise ValueError(f"{name} is {shown(value)}; use one of {', '.join(map(str, choices))}.")


def path_named(value: Any, name: str) -> Path:
    """A path, of a text or another path; it need not exist."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        if isinstance(text, str) and "\0" not in text:
            return Path(text)
    raise ValueError(f"{name} is {shown(value)}; the name of a file or folder is wanted.")


def text(value: Any, name: str) -> str:
    """A name that is not empty: of a file, a folder or a repository."""
    if isinstance(value, str | os.PathLike) and os.fspath(value):
        path_named(value, name)
        return str(os.fspath(value))
    raise ValueError(f"{name} is {shown(value)}; a name is wanted.")


def shown(value: Any) -> str:
    """A value for a message, cut short."""
    words = " ".join(repr(value).split())
    return words if len(words) <= SHOWN else f"{words[:SHOWN]}... ({type(value).__name__})"
