"""Which parameters decay: --no-weight-decay of every trainer, read and followed in one place."""

from collections.abc import Iterable, Sequence
from typing import Any

# Of --no-weight-decay: parameters of one dimension, which are norms, biases and layer scales.
VECTORS = "vectors"
# Networks of others' designs call their norms otherwise: that no parameter is called so is no mistake.
NORMS = "norm"


def undecayed(text: str | None) -> list[str]:
    """The parts of names that a text has, with commas between."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def check_undecayed(parts: Iterable[str], names: Sequence[str]) -> None:
    """Refuse a part that no parameter has in its name.

    Raises:
        ValueError: it names some that there are.
    """
    for part in parts:
        if part not in (VECTORS, NORMS) and not any(part in name for name in names):
            raise ValueError(
                f"--no-weight-decay: no parameter has {part!r} in its name; their names are such as "
                f"{', '.join(names[:3])}."
            )


def decays(name: str, parameter: Any, parts: Iterable[str]) -> bool:
    """Whether a parameter decays: none of the parts is in its name, nor is it one of the vectors that a part means."""
    return not any(part in name if part != VECTORS else parameter.ndim <= 1 for part in parts)
