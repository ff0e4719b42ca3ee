"""Which of a model's classes is which of a data set's: by their names, or by their numbers, and never by half."""

from collections.abc import Iterable, Mapping

from d_emo.images.labels import LabelResolver
from d_emo.images.stored_labels import whole_number

BY_NUMBER = "; no class name is the model's, so that classes are compared by number"


def match_classes(names: Mapping[int, str], model_names: Mapping[int, str], source: str) -> tuple[dict[int, int], str]:
    """The model's id of every class of the data, and a remark for people.

    Names decide. Where no name of the data is one of the model's, numbers do: whole numbers as names are ids, other
    names stand for their places, if both have as many classes.

    Args:
        names: the data's, by id.
        model_names: the model's, by id.
        source: the data's name, for messages.

    Raises:
        ValueError: some names are the model's and others not, or numbers cannot stand for the model's classes.
    """
    resolver = LabelResolver(model_names, len(model_names))
    found, unknown = {}, []
    for label, name in names.items():
        try:
            found[label] = resolver.resolve(name)
        except ValueError:
            unknown.append(name)
    note = ""
    if unknown:
        numbers, model_numbers = (_numbers(table.values()) for table in (names, model_names))
        if numbers and model_numbers:  # "07" is 7
            found = _looked_up(numbers, dict(zip(model_numbers, model_names, strict=True)))
        elif found or len(names) != len(model_names):
            found = {}
        else:
            places = range(len(model_names))
            found = _looked_up(numbers or [*places], {place: place for place in places})
            note = BY_NUMBER
    if not found:
        raise ValueError(
            f"{source} has {len(names)} classes, the model {len(model_names)}, and these are not among the model's "
            f"names: {', '.join(unknown[:5])}. Name them as the model does, or evaluate another model."
        )
    return found, note


def _numbers(names: Iterable[str]) -> list[int]:
    """Names as numbers, also as transformers makes them up ("LABEL_7"); nothing where one is none."""
    numbers = [whole_number(name.removeprefix("LABEL_")) for name in names]
    return [number for number in numbers if number is not None] if None not in numbers else []


def _looked_up(numbers: list[int], ids: dict[int, int]) -> dict[int, int]:
    """The model's id of each class of the data; nothing where a number is none of the model's."""
    return {label: ids[number] for label, number in enumerate(numbers)} if {*numbers} <= {*ids} else {}
