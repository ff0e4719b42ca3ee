"""What the user typed to start a command: its usage, its complaints and its hints say what can be typed again.

Commands know themselves as scripts (`train_dit`, `python train/train_dit.py`). Started as `d-emo train`, they speak of
themselves, and of each other, by the names of `d-emo`.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Typed(NamedTuple):
    """How a command was started.

    Attributes:
        name: what was typed, "d-emo train".
        words: the same for every command, by its module: "d_emo.train.train_dit".
        note: what --help says at its end.
    """

    name: str
    words: Mapping[str, str]
    note: str = ""


_typed: Typed | None = None


@contextlib.contextmanager
def called_as(typed: Typed) -> Iterator[None]:
    """Within it, the command that runs was started so."""
    global _typed
    former, _typed = _typed, typed
    try:
        yield
    finally:
        _typed = former


def name_of(script: str) -> str:
    """The name of the command that runs: what was typed, or its own."""
    return _typed.name if _typed else script


def note() -> str:
    """What --help says at its end besides; empty for scripts."""
    return _typed.note if _typed else ""


def as_typed(text: str) -> str:
    """A text in which commands have the names that the user types: of scripts as they are, or of `d-emo`."""
    if _typed is None or (".py" not in text and "-m d_emo." not in text):
        return text
    for module, words in _typed.words.items():
        _, folder, script = module.rsplit(".", 2)
        place = rf"\b(?:{folder}/)?" if folder in ("train", "eval") else rf"\b{folder}/"
        named = rf"-m {re.escape(module)}\b|{place}{script}\.py\b"
        text = re.sub(rf"(?:\b(?:accelerate launch|python) )?(?:{named})", words, text)
    return text
