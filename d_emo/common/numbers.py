"""Numbers as a command line or a file gives them: texts, read within a range."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any

from d_emo.common.ranges import LARGEST, Real, Rule, Whole

# Seeds are unsigned.
LARGEST_UNSIGNED = 2**64 - 1


def whole(text: str) -> int:
    """A whole number of at most 64 bits.

    Raises:
        ValueError: the text is none; the message names it.
    """
    try:
        value = int(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a whole number") from None  # also of more digits than Python reads
    if not -LARGEST <= value <= LARGEST_UNSIGNED:
        raise ValueError(f"{text!r} is too large: a whole number has at most 64 bits")
    return value


def finite(text: str) -> float:
    """A number that is neither infinite nor NaN.

    Raises:
        ValueError: the text is none; the message names it.
    """
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not a finite number")
    return value


def whole_from(low: int, high: int = LARGEST) -> Callable[[str], int]:
    """The type of an argparse option that takes a whole number in [low, high]."""
    return whole_by(Whole(low, high))


def whole_by(rule: Whole) -> Callable[[str], int]:
    """The type of an argparse option that takes what a configuration takes."""
    return _typed(whole, rule)


def finite_from(low: float) -> Callable[[str], float]:
    """The type of an argparse option that takes a number of at least `low`."""
    return finite_by(Real(low))


def finite_by(rule: Real) -> Callable[[str], float]:
    """The type of an argparse option that takes what a configuration takes."""
    return _typed(finite, rule)


def _typed(read: Callable[[str], Any], rule: Rule) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = read(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None
        try:
            return rule.take(value)
        except ValueError:
            raise ArgumentTypeError(f"{text} is not {rule}") from None

    return convert


# A number above 0.
positive = _typed(finite, Real(0, positive=True))
# The seed of a command that draws samples; that of sample i is this one and i.
seed = whole_from(0, 2**32 - 1)
