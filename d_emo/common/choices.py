"""The one way to refuse a word that is not among those allowed."""

from collections.abc import Iterable


def one_of(name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise a ValueError that lists what is allowed, unless `value` is among it."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(allowed)}.")
