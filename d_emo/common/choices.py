"""The one way to refuse a word that is not among those allowed, or a number that is none."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

from d_emo.common.checks import shown


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise a ValueError that lists what is allowed, unless `value` is among it."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}={shown(value)} is unknown; use one of {', '.join(allowed)}.")


def whole(name: str, value: Any, lowest: int, remedy: str) -> int:
    """A whole number, Python's or NumPy's, of at least `lowest`; or a ValueError that ends with a remedy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name}={shown(value)} is a {type(value).__name__}, no whole number; {remedy}.")
    if value < lowest:
        raise ValueError(f"{name}={value} is below {lowest}; {remedy}.")
    return int(value)


def real(name: str, value: Any, remedy: str) -> float:
    """A finite number, Python's or NumPy's; or a ValueError that ends with a remedy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name}={shown(value)} is a {type(value).__name__}, no plain number; {remedy}.")
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond every float
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name}={number} is not finite; {remedy}.")
    return number
