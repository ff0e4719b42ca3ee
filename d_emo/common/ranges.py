"""What the numbers and words of a configuration may be: a table of rules a class, checked before anything is made.

    WINDOW = {"window_size": Whole(1, 1024), "clip_window": Flag()}

    @checked(WINDOW)
    def __init__(self, window_size: int = 8, clip_window: bool = True): ...

Constructor, `from_config` and `from_pretrained` all come by the constructor, so that each gives the same line: class,
field, value, rule. NumPy's numbers become Python's, which configurations can be saved with.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from d_emo.common.messages import shown

# A rule between fields: what is wrong with values of the right kinds, as the end of a message; empty if nothing.
Relation = Callable[[Mapping[str, Any]], str]
P = ParamSpec("P")
T = TypeVar("T")

# What PyTorch's and NumPy's whole numbers hold; a bound that is this one is none, for people.
LARGEST = 2**63 - 1


class Rule:
    """What one field may be. `take` gives the value as Python's own type, or raises ValueError; `str` is the rule."""

    def take(self, value: Any) -> Any:
        """The value, as Python's own type."""
        raise NotImplementedError

    def check(self, value: Any, name: str) -> Any:
        """`take`, with a message: one line with name, value and rule.

        Raises:
            ValueError: the value breaks the rule.
        """
        try:
            return self.take(value)
        except ValueError:
            raise ValueError(f"{name}={shown(value)} is not {self}.") from None


@dataclass(frozen=True)
class Whole(Rule):
    """A whole number in [low, high]; `odd` if it has to be, `hint` is a remedy."""

    low: int
    high: int = LARGEST
    hint: str = ""
    odd: bool = False

    def take(self, value: Any) -> int:
        """See `Rule`; True and 2.0 are no whole numbers."""
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError
        number = int(value)
        if not self.low <= number <= self.high or (self.odd and number % 2 == 0):
            raise ValueError
        return number

    def __str__(self) -> str:
        end = "on" if self.high == LARGEST else f"to {self.high}"
        return f"{'an odd' if self.odd else 'a'} whole number from {self.low} {end}{_after(self.hint)}"


@dataclass(frozen=True)
class Real(Rule):
    """A finite number in [low, high]; with `positive` above low, with `below` below high."""

    low: float = -math.inf
    high: float = math.inf
    hint: str = ""
    positive: bool = False
    below: bool = False

    def take(self, value: Any) -> float:
        """See `Rule`; a whole number stays one."""
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError
        try:
            number = int(value) if isinstance(value, numbers.Integral) else float(value)
            finite = math.isfinite(number)
        except OverflowError:  # a whole number beyond every float
            raise ValueError from None
        if not finite or not self.low <= number <= self.high:
            raise ValueError
        if (self.positive and number <= self.low) or (self.below and number >= self.high):
            raise ValueError
        return number

    def __str__(self) -> str:
        bounds = []
        if self.low > -math.inf:
            bounds.append(f"above {self.low:g}" if self.positive else f"from {self.low:g}")
        if self.high < math.inf:
            bounds.append(
                ("and " if bounds and self.below else "") + f"{'below' if self.below else 'to'} {self.high:g}"
            )
        elif bounds and not self.positive:
            bounds.append("on")
        return f"{'a number ' + ' '.join(bounds) if bounds else 'a finite number'}{_after(self.hint)}"


@dataclass(frozen=True)
class OneOf(Rule):
    """One of a few words or whole numbers."""

    allowed: tuple[str | int, ...]
    hint: str = ""

    def take(self, value: Any) -> str | int:
        """See `Rule`; True is not 1."""
        if isinstance(value, bool) or not isinstance(value, str | numbers.Integral) or value not in self.allowed:
            raise ValueError
        return self.allowed[self.allowed.index(value)]  # type: ignore[arg-type]  # one of them

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.allowed))}{_after(self.hint)}"


@dataclass(frozen=True)
class Flag(Rule):
    """True or False; 0 and "false" are neither."""

    def take(self, value: Any) -> bool:
        """See `Rule`."""
        if type(value).__name__ not in ("bool", "bool_"):  # Python's, NumPy's
            raise ValueError
        return bool(value)

    def __str__(self) -> str:
        return "True or False"


@dataclass(frozen=True)
class Maybe(Rule):
    """None, or what another rule allows."""

    rule: Rule

    def take(self, value: Any) -> Any:
        """See `Rule`."""
        return None if value is None else self.rule.take(value)

    def __str__(self) -> str:
        return f"None or {self.rule}"


@dataclass(frozen=True)
class OneOrPair(Rule):
    """A value for both sides, or (height, width)."""

    rule: Rule

    def take(self, value: Any) -> Any:
        """See `Rule`; a list, as JSON has it, becomes a tuple."""
        if not isinstance(value, list | tuple):
            return self.rule.take(value)
        if len(value) != 2:
            raise ValueError
        return tuple(self.rule.take(side) for side in value)

    def __str__(self) -> str:
        return f"{self.rule}, or two of them (height, width)"


@dataclass(frozen=True)
class Each(Rule):
    """A list or tuple of `low` to `high` values under one rule."""

    rule: Rule
    low: int
    high: int

    def take(self, value: Any) -> list[Any]:
        """See `Rule`."""
        if not isinstance(value, list | tuple) or not self.low <= len(value) <= self.high:
            raise ValueError
        return [self.rule.take(item) for item in value]

    def __str__(self) -> str:
        return f"a list of {self.low} to {self.high} values, each {self.rule}"


Table = Mapping[str, Rule]


def take(owner: str, values: Mapping[str, Any], table: Table, relations: Iterable[Relation] = ()) -> dict[str, Any]:
    """The values as Python's own types.

    Args:
        owner: the class or function that they are for, which the message begins with; empty for none.
        values: by field; fields that the table does not have are left as they are.
        table: a rule a field.
        relations: rules between fields, asked once each field keeps its own.

    Raises:
        ValueError: a value breaks its rule; one line with owner, field, value and rule.
    """
    taken, start = dict(values), f"{owner}: " if owner else ""
    for name, rule in table.items():
        if name in taken:
            taken[name] = rule.check(taken[name], f"{start}{name}")
    for relation in relations:
        if wrong := relation(taken):
            raise ValueError(f"{start}{wrong}.")
    return taken


def checked(table: Table, *relations: Relation) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a constructor (or a function) whose arguments keep the rules of a table; see `take`."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)
        first, *_ = names = list(signature.parameters)
        open_ended = [
            name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD
        ]

        @functools.wraps(function)
        def checking(*args: P.args, **kwargs: P.kwargs) -> T:
            # Fields that begin with an underscore are Diffusers' notes in a configuration, and pass.
            private = {name: kwargs[name] for name in kwargs if name.startswith("_") and name not in names}
            try:
                bound = signature.bind(*args, **{name: kwargs[name] for name in kwargs if name not in private})
            except TypeError:
                return function(*args, **kwargs)  # says itself which argument it lacks or does not have
            bound.apply_defaults()
            given = {name: value for name, value in bound.arguments.items() if name not in open_ended}
            owner = type(given.pop("self")).__name__ if first == "self" else function.__name__
            taken = take(owner, given, table, relations)
            # Those left out keep being left out, which Diffusers takes note of.
            placed = {*names[: len(args)], *kwargs}
            named = {name: value for name, value in taken.items() if name in placed}
            rest = {key: value for name in open_ended for key, value in bound.arguments[name].items()}
            call: Any = function
            return call(*args[: first == "self"], **named, **rest, **private)

        return checking

    return decorate


def _after(hint: str) -> str:
    return f" ({hint})" if hint else ""


# The length of a power-function average (`power_averages`); at 1 / sqrt(12) it is the plain mean of all steps.
RELATIVE_LENGTH = Real(0.01, 0.28, "of a run; 0.05 and 0.1 are EDM2's")
