"""The one label rule: from labels as a table, shard or stream stores them to class ids and class names.

- With class names (of the data, or --class-names) a number is an id among them, and a word is one of the names.
- Without names the classes are the values that occur: numbers by size, words by alphabet, False before True. Their
  names are the values, so that numbers with gaps keep their meaning. Words that are all whole numbers are numbers.
- What is no class (nothing, negative or broken numbers, lists, values of several kinds) is refused with its place.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from d_emo.common.messages import shown
from d_emo.images.labels import class_name

Kind = Literal["number", "word", "truth value"]
# So many places are named; the others are counted.
NAMED_PLACES = 3


class ClassNames:
    """Ids among given names.

    Args:
        names: by class id.

    Raises:
        ValueError: a name stands twice.
    """

    def __init__(self, names: Sequence[str]):
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise ValueError(f"class_names={shown(names)} is not a list of words, by class id.")
        if wrong := [name for name in names if not isinstance(name, str)]:
            raise ValueError(f"class_names hold {shown(wrong[0])}, which is no word.")
        self.names = [class_name(name) for name in names]
        self._ids = {name: number for number, name in enumerate(self.names)}
        if len(self._ids) < len(self.names):
            twice = sorted({name for name in self.names if self.names.count(name) > 1})
            raise ValueError(f"class names stand for several ids: {', '.join(twice[:3])}.")

    def id(self, value: Any) -> int:
        """The class id of a stored label.

        Raises:
            ValueError: it is none of them; the message begins with the value.
        """
        kind, label = classify(value)
        if kind == "word":
            if label in self._ids:
                return self._ids[label]
            if (number := whole_number(label)) is not None:
                kind, label = "number", number
        if kind != "number" or not 0 <= label < len(self.names):
            raise ValueError(
                f"label {shown(value)} is none of the {len(self.names)} classes{'' if kind else ' (' + label + ')'}"
            )
        return label


def class_ids(
    values: Iterable[Any], names: Sequence[str] | None, place: Callable[[int], str]
) -> tuple[np.ndarray, list[str]]:
    """Class ids (N,) int64 and class names of stored labels.

    Args:
        values: N labels.
        names: by class id, where they are known.
        place: what to call the place of a label, for messages.

    Raises:
        ValueError: labels that are no classes, with their places.
    """
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise ValueError(f"labels={shown(values)} is not a list of labels.")
    numbers: dict[Any, int] = {}  # of each different value; 1, 1.0 and True are three
    different: list[_Label] = []
    found: list[int] = []
    for position, value in enumerate(values):
        key = (type(value), value if isinstance(value, str | int | float) else repr(value))
        if key not in numbers:
            numbers[key] = len(different)
            different.append(_Label(value, *classify(value), place(position)))
        found.append(numbers[key])
    if not all(label.kind for label in different):
        refused = [position for position, number in enumerate(found) if not different[number].kind]
        named = [f"{place(p)}: {shown(different[found[p]].value)} ({different[found[p]].form})"
                 for p in refused[:NAMED_PLACES]]  # fmt: skip
        more = f" and {len(refused) - NAMED_PLACES:,} more" if len(refused) > NAMED_PLACES else ""
        raise ValueError(
            f"{len(refused):,} samples without a label (-1, empty or no class): {', '.join(named)}{more}. Repair "
            "them, choose a labelled split, or --unconditional."
        )
    ids, titles = _named(different, names) if names is not None else _by_order(different)
    return np.array(ids, dtype=np.int64)[found], titles


def no_classes(count: int) -> tuple[np.ndarray, list[str]]:
    """Class ids and names of samples whose labels are not wanted."""
    return np.zeros(count, dtype=np.int64), []


def describe_gaps(names: Sequence[str]) -> str:
    """What becomes of numbers with gaps, for people; nothing for other names."""
    numbers = [number for name in names if (number := whole_number(name)) is not None]
    if len(numbers) < len(names) or numbers == list(range(len(names))):
        return ""
    return f"the labels are numbers with gaps, {numbers[0]} to {numbers[-1]}: ids go from 0 to {len(numbers) - 1}"


@dataclass(frozen=True)
class _Label:
    """A label as stored, its kind, the value in its one form (or why it is none), and where it first stands."""

    value: Any
    kind: Kind | None
    form: Any
    place: str


def _named(labels: list[_Label], names: Sequence[str]) -> tuple[list[int], list[str]]:
    classes, ids = ClassNames(names), []
    for label in labels:
        try:
            ids.append(classes.id(label.value))
        except ValueError as error:
            raise ValueError(f"{label.place}: {error} (--class-names).") from None
    return ids, classes.names


def _by_order(labels: list[_Label]) -> tuple[list[int], list[str]]:
    """Ids by the order of the values, and the values as names; "07" and 7 are one class."""
    kinds = {label.kind: label for label in labels}
    forms = [label.form for label in labels]
    numbers = [whole_number(label.form) if label.kind == "word" else label.form for label in labels]
    if "truth value" not in kinds and None not in numbers:
        forms = numbers
    elif len(kinds) > 1:
        examples = ", ".join(f"{label.place}: {shown(label.value)} is a {kind}" for kind, label in kinds.items())
        raise ValueError(f"labels are of several kinds ({examples}); write all of them in one way.")
    classes = sorted(set(forms))
    ids = {form: number for number, form in enumerate(classes)}
    return [ids[form] for form in forms], [str(form) for form in classes]


def classify(value: Any) -> tuple[Kind | None, Any]:
    """A label's kind and the value in its one form; for what is no label None and the reason."""
    if value is None:
        return None, "no label"
    if isinstance(value, bool | np.bool_):
        return "truth value", bool(value)
    if isinstance(value, str):
        word = class_name(value)
        return ("word", word) if word else (None, "no label")
    if isinstance(value, float | np.floating):
        if math.isnan(value):
            return None, "no label"
        if not float(value).is_integer():
            return None, "no whole number"
    elif not isinstance(value, int | np.integer):
        return None, f"a {type(value).__name__}, not one class"
    return ("number", int(value)) if value >= 0 else (None, "negative")


def whole_number(word: str) -> int | None:
    """The number that a word is, in digits; None for other words."""
    return int(word) if re.fullmatch(r"[0-9]{1,18}", word) else None
