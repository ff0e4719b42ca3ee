"""How options are declared, read and checked.

The command line and the YAML file are derived from frozen dataclasses. A YAML file holds the same names
(`learning_rate: 1e-4`); the command line overrides it.
"""

import difflib
import json
from dataclasses import asdict, field, fields
from pathlib import Path
from typing import Any, cast

import yaml
from transformers import HfArgumentParser


def option(default: Any, help_text: str) -> Any:
    """A dataclass field with its line in --help."""
    return field(default=default, metadata={"help": help_text})


def require(condition: bool, name: str, value: Any, rule: str) -> None:
    """Raise a ValueError that names option, value and rule, unless the condition holds."""
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} {value}: {rule}.")


class OptionTable:
    """All options of a run, by group; its fields are dataclasses."""

    def flat(self) -> dict[str, Any]:
        """Every option by name, as a YAML file would hold them."""
        groups = (getattr(self, group.name) for group in fields(cast(Any, self)))
        return {name: value for group in groups for name, value in asdict(group).items()}


def parse_options(arguments: list[str], groups: tuple[Any, ...], description: str) -> list[Any]:
    """Read a command line and, under it, the YAML file that --config names, into one object a group.

    Raises:
        ValueError: an option is unknown, a value breaks its rule, or the file is missing or not a mapping.
        SystemExit: argparse's, for wrong types and --help.
    """
    names = [f.name for group in groups for f in fields(group)]
    parser = HfArgumentParser(groups, description=description, allow_abbrev=False)
    parser.add_argument("--config", default=None, help="YAML file of the same options; the command line overrides it.")
    path = parser.parse_known_args(arguments)[0].config
    from_file = _yaml_arguments(Path(path), names) if path else []
    *parsed, _, unknown = parser.parse_args_into_dataclasses(
        [*from_file, *arguments], look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        name = unknown[0].lstrip("-").replace("-", "_")
        raise ValueError(f"{unknown[0]} is not an option; {_suggestion(name, names)}")
    return parsed


def _yaml_arguments(path: Path, names: list[str]) -> list[str]:
    """Turn the file into arguments, so that both are checked and converted in one place."""
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file.")
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"--config {path}: expected `option: value` lines.")
    arguments = []
    for name, value in values.items():
        if name not in names:
            raise ValueError(f"--config {path}: option {name!r} is unknown; {_suggestion(str(name), names)}")
        if value is not None:
            arguments += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return arguments


def _suggestion(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {', '.join(close)}?" if close else "see --help for the options."
