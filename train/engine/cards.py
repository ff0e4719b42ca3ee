"""What the model cards of all trainers have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

MAX_CLASSES = 20


def card_head(metadata: Mapping[str, Any], title: str) -> list[str]:
    """First lines of a card: what the Hub reads, and the title."""
    return ["---", yaml.safe_dump(dict(metadata), sort_keys=False).strip(), "---", "", f"# {title}", ""]


def class_list(names: Sequence[str]) -> str:
    """The first names, for people."""
    return ", ".join(names[:MAX_CLASSES]) + (" ..." if len(names) > MAX_CLASSES else "")


def settings_table(settings: Mapping[str, Any], shown: Sequence[str]) -> list[str]:
    """Lines of a table of the settings that have a value."""
    rows = [f"| {name} | {settings[name]} |" for name in shown if settings[name] is not None]
    return ["| setting | value |", "|---|---|", *rows]
