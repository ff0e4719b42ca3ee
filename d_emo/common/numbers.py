"""Numbers as a command line or a file gives them: texts, read within a range."""

import math
from argparse import ArgumentTypeError
from collections.abc import Callable

# What PyTorch's and NumPy's whole numbers hold, seeds aside, which are unsigned.
LARGEST = 2**63 - 1
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

    def read(text: str) -> int:
        try:
            value = whole(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None
        if not low <= value <= high:
            rule = f"at least {low}" if high == LARGEST and value < low else f"in [{low}, {high}]"
            raise ArgumentTypeError(f"must be {rule}, not {value}")
        return value

    return read


def finite_from(low: float) -> Callable[[str], float]:
    """The type of an argparse option that takes a number of at least `low`."""

    def read(text: str) -> float:
        try:
            value = finite(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None
        if value < low:
            raise ArgumentTypeError(f"must be at least {low:g}, not {value:g}")
        return value

    return read


# The seed of a command that draws samples; that of sample i is this one and i.
seed = whole_from(0, 2**32 - 1)
