"""YAML files of options: each value is read as on the command line, each mistake is one line with its place."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from d_emo.common.command_line import alias_of, hint
from d_emo.common.messages import first_line

# Where the package's own files of options lie, as the documents name them: train/configs/digits.yaml.
_PACKAGE = Path(__file__).resolve().parents[1]


class Reader(Protocol):
    """What a file needs to know of an option; see `options.Kind`."""

    @property
    def convert(self) -> Any:
        """Text -> value."""

    @property
    def choices(self) -> tuple[str, ...]:
        """The values where they are few."""


def read_option_file(path: Path, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """The options that a file gives. `null`, here None, is an option's default; hyphens in names are underscores.

    Args:
        path: the file; one of the package's own (train/configs/digits.yaml) from any folder.
        readers: every option by name.

    Raises:
        ValueError: the file is missing, no YAML or no mapping, names an option twice or one that does not exist, or a
            value is of the wrong type.
    """
    values: dict[str, Any] = {}
    unknown = []
    for name, key, node in _entries(path):
        place = f"--config {path}, line {key.start_mark.line + 1}"
        if name not in readers:
            alias = alias_of(name, readers)
            advice = f"it is {alias} here." if alias else hint(name, readers)
            unknown.append(f"--config {path}: option {key.value!r} is unknown; {advice}")
        elif name in values:
            raise ValueError(f"{place}: {name} is given twice; keep one of the two.")
        else:
            values[name] = _value(node, name, readers[name], place)
    if unknown:
        raise ValueError(" ".join(unknown))
    return values


def _entries(path: Path) -> list[tuple[str, Any, Any]]:
    """Name, key and value of every line; keys and values as PyYAML's nodes, which know their lines."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ValueError(f"--config {path} needs PyYAML: pip install 'd-emo[train]'.") from error
    found = path
    if not path.exists() and path.parts[:2] == ("train", "configs"):
        found = _PACKAGE / path  # of the package, whose checkout is elsewhere, or nowhere
    if not found.is_file():
        raise ValueError(f"--config {path}: there is no such file.")
    try:
        top = yaml.compose(found.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        advice = "; indent with spaces" if "\\t" in problem else ""
        raise ValueError(f"--config {path}{place}: no YAML ({problem}{advice}).") from error
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"--config {path} cannot be read ({first_line(error)}).") from error
    if top is None:
        return []
    if not isinstance(top, yaml.MappingNode) or not all(isinstance(key, yaml.ScalarNode) for key, _ in top.value):
        raise ValueError(f"--config {path}: expected `option: value` lines.")
    return [(key.value.replace("-", "_"), key, node) for key, node in top.value]


def _value(node: Any, name: str, reader: Reader, place: str) -> Any:
    """A node as the option takes it, None for null."""
    if node.id == "sequence":
        raise ValueError(f"{place}: {name} takes one value, not a list.")
    if node.id == "scalar":
        text = node.value
        if node.tag.endswith(":null"):
            return None
        # YAML has many words for what a choice may call "no".
        if node.tag.endswith(":bool") and text not in reader.choices and text.lower() in ("no", "off", "false"):
            text = next((choice for choice in reader.choices if choice in ("no", "none")), text)
    else:
        text = json.dumps(_plain(node), default=str)
    try:
        return reader.convert(text)
    except ValueError as error:
        raise ValueError(f"{place}: {name}: {error}.") from error


def _plain(node: Any) -> Any:
    """A mapping as Python objects, numbers such as 1e-6 among them, which YAML 1.1 takes for text."""
    import yaml

    value = yaml.SafeLoader("").construct_document(node)
    number = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

    def repaired(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: repaired(entry) for key, entry in part.items()}
        if isinstance(part, list):
            return [repaired(entry) for entry in part]
        return float(part) if isinstance(part, str) and number.fullmatch(part) else part

    return repaired(value)
