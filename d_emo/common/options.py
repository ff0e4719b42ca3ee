"""How options are declared, read and checked.

The command line and the YAML file are derived from frozen dataclasses. A YAML file holds the same names
(`learning_rate: 1e-4`), each value written as on the command line, which overrides it. Nothing heavy is imported: a
command reads its options before it loads PyTorch.
"""

import contextlib
import json
from argparse import SUPPRESS, ArgumentTypeError
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import Field, asdict, field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from d_emo.common import messages
from d_emo.common.command_line import CommandParser, flag, with_default
from d_emo.common.numbers import finite, whole
from d_emo.common.option_files import read_option_file

# What stands for a value in --help, by the ends of options' names; others show N, X or TEXT.
UNITS = (
    (("_every", "_steps"), "STEPS"),
    (("epochs",), "EPOCHS"),
    (("_dir",), "FOLDER"),
    (("resolution",), "PIXELS"),
    (("_batch_size", "_images", "_buffer"), "IMAGES"),
    (("_workers",), "PROCESSES"),
)
TRUE, FALSE = ("true", "yes", "on", "t", "y", "1"), ("false", "no", "off", "f", "n", "0")
Table = TypeVar("Table", bound="OptionTable")


def option(default: Any, help_text: str, *instead_of: str) -> Any:
    """A dataclass field with its line in --help.

    `instead_of` names options that say the same in another way: given on the command line, this one takes their place
    in a file.
    """
    return field(default=default, metadata={"help": help_text, "instead_of": instead_of})


def require(condition: bool, name: str, value: Any, rule: str) -> None:
    """Raise a ValueError that names option, value and rule, unless the condition holds."""
    if not condition:
        raise ValueError(f"{flag(name)} {value}: {rule}.")


def require_each(options: Any, names: Iterable[str], holds: Callable[[Any], bool], rule: str) -> None:
    """See `require`, of several options; None, which leaves a choice to the command, always holds."""
    for name in names:
        value = getattr(options, name)
        require(value is None or holds(value), name, value, rule)


def positive(options: Any, *names: str) -> None:
    """Refuse what is not above 0."""
    require_each(options, names, lambda value: value > 0, "must be positive")


def zero_or_more(options: Any, *names: str) -> None:
    """Refuse what is below 0."""
    require_each(options, names, lambda value: value >= 0, "must be 0 or more")


def below_one(options: Any, *names: str) -> None:
    """Refuse what is not in [0, 1)."""
    require_each(options, names, lambda value: 0 <= value < 1, "must be in [0, 1)")


def up_to_one(options: Any, *names: str) -> None:
    """Refuse what is not in [0, 1]."""
    require_each(options, names, lambda value: 0 <= value <= 1, "must be in [0, 1]")


def at_most_one_of(options: Any, *names: str) -> None:
    """Refuse options that exclude each other; what is off, such as a share of 0, is none.

    Raises:
        ValueError: two or more are given.
    """
    given = [flag(name) for name in names if getattr(options, name)]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given; choose one.")


def goes_with(options: Any, other: str, *names: str) -> None:
    """Refuse options that mean nothing without another one; what is off or left at its default is not given.

    Raises:
        ValueError: one is given without it.
    """
    if not getattr(options, other):
        given = [name for name in names if getattr(options, name)]
        require_defaults(options, f"it goes with {flag(other)}", *given)


def require_defaults(options: Any, rule: str, *names: str) -> None:
    """Refuse options that are not left at their defaults.

    Raises:
        ValueError: one is not; the message ends with the rule.
    """
    for name in names:
        value = getattr(options, name)
        require(value == getattr(type(options), name), name, value, rule)


def json_table(options: Any, name: str, such: str) -> dict[str, Any]:
    """An option that is a JSON object, read; empty where it is not given.

    Args:
        options: that have it.
        name: of it.
        such: an example.

    Raises:
        ValueError: it is no JSON object.
    """
    text = getattr(options, name)
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = None
    require(isinstance(found, dict), name, text, f"expected JSON such as {such}")
    return found


@contextlib.contextmanager
def blamed(named: str, *kinds: type[Exception]) -> Iterator[None]:
    """Within it, what goes wrong is a line that begins with what the user gave, such as `--model NAME`.

    Args:
        named: that.
        kinds: of errors besides ValueError, of which a library's reason is taken.
    """
    refused: tuple[type[Exception], ...] = (ValueError, *kinds)
    try:
        yield
    except refused as error:
        raise ValueError(f"{named}: {messages.first_line(error) if kinds else error}") from error


class OptionTable:
    """All options of a run, by group; its fields are dataclasses with defaults."""

    def flat(self) -> dict[str, Any]:
        """Every option by name, as a YAML file would hold them."""
        groups = (getattr(self, group.name) for group in fields(cast(Any, self)))
        return {name: value for group in groups for name, value in asdict(group).items()}


class Kind(NamedTuple):
    """What an option takes: how text becomes a value, what stands for it in --help, the values where they are few.

    `convert` raises a ValueError that names the text and what is expected.
    """

    convert: Callable[[str], Any]
    shown: str
    choices: tuple[str, ...] = ()


class Recipe(NamedTuple):
    """A file of options that lies under what the user gave.

    Attributes:
        path: the YAML file.
        without: options of it that are left at their defaults.
    """

    path: Path
    without: tuple[str, ...] = ()


def parse_options(
    arguments: list[str],
    table: type[Table],
    command: str,
    about: str,
    beneath: Callable[[Mapping[str, Any]], Recipe | Mapping[str, Any] | None] = lambda given: None,
) -> Table:
    """Read a command line and, under it, the YAML file that --config names.

    Args:
        arguments: what follows the command's name.
        table: the options, by group; the groups of --help have its fields' names.
        command: the command's name.
        about: the command's docstring, for --help; see `CommandParser`.
        beneath: of what the user gave, by name: what lies under it, if anything; a file, or values, of which unknown
            names are passed over.

    Raises:
        ValueError: an option is unknown, a value breaks its rule, or the file cannot be read, has an unknown name or a
            value of another type. All unknown names are in one message.
        SystemExit: argparse's, for wrong types and --help.
    """
    groups = {group.name: cast(Any, group).default_factory for group in fields(cast(Any, table))}
    kinds = {name: kind for group in groups.values() for name, kind in kinds_of(group).items()}
    parser = CommandParser(command, about)
    parser.usage = f"{parser.prog} [--config FILE] [--option VALUE ...]"
    parser.add_argument("--config", metavar="FILE", help="YAML file of these options; the command line overrides it.")
    for title, group in groups.items():
        section = parser.add_argument_group(title.replace("_", " ").capitalize(), first_line(group.__doc__))
        for entry in fields(group):
            _add(section, entry, kinds[entry.name])
    namespace, words = parser.parse_known_args(arguments)
    if words:
        raise ValueError(f"{' '.join(words)}: no option takes this; values follow their option.")
    given = vars(namespace)
    path = given.pop("config")
    entries = [entry for group in groups.values() for entry in fields(group)]
    if path:
        given = _over(given, read_option_file(Path(path), kinds), entries)
    lower = beneath(given) or {}
    if isinstance(lower, Recipe):
        values = read_option_file(lower.path, kinds)
        lower = {name: value for name, value in values.items() if name not in lower.without}
    given = _over(given, {name: _as_read(name, lower[name], kinds[name]) for name in lower if name in kinds}, entries)
    return table(**{
        title: group(**{e.name: given[e.name] for e in fields(group) if given.get(e.name) is not None})
        for title, group in groups.items()
    })  # fmt: skip


def _as_read(name: str, value: Any, kind: Kind) -> Any:
    """A value that a program stored, as the option takes it now: files are edited, and options change."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        return kind.convert(text)
    except ValueError as error:
        raise ValueError(f"{flag(name)}: the stored options say {text[:80]}: {error}; give it anew.") from error


def _over(given: dict[str, Any], values: dict[str, Any], entries: list[Field]) -> dict[str, Any]:
    """What was given, and of a file's values those that it leaves."""
    replaced = {name for entry in entries if given.get(entry.name) is not None for name in entry.metadata["instead_of"]}
    return {**{name: value for name, value in values.items() if name not in replaced}, **given}


def kinds_of(group: type) -> dict[str, Kind]:
    """What each field of a dataclass of options takes, by its type."""
    hints = get_type_hints(group)
    return {entry.name: _kind(hints[entry.name]) for entry in fields(cast(Any, group))}


def first_line(text: str | None) -> str:
    """The first line of a docstring."""
    return (text or "").strip().split("\n")[0]


def _add(section: Any, entry: Field, kind: Kind) -> None:
    """One option of the command line. Without it the namespace has no such name, so that the file's value stands."""
    text = with_default(entry.metadata["help"], entry.default)
    shared: dict[str, Any] = {"dest": entry.name, "default": SUPPRESS, "help": text.replace("%", "%%")}
    if kind.convert is _boolean:
        section.add_argument(flag(entry.name), nargs="?", const=True, type=_typed(kind), metavar="true|false", **shared)
        section.add_argument(f"--no-{flag(entry.name)[2:]}", action="store_false", **{**shared, "help": SUPPRESS})
    else:
        section.add_argument(flag(entry.name), type=_typed(kind), metavar=_shown(entry.name, kind), **shared)


def _shown(name: str, kind: Kind) -> str:
    """What stands for an option's value in --help: its choices, its unit, or its kind."""
    unit = next((unit for ends, unit in UNITS if name.endswith(ends)), kind.shown)
    return kind.shown if kind.choices else unit


def _typed(kind: Kind) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return kind.convert(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None

    return convert


def _kind(hint: Any) -> Kind:
    """The kind of a type: int, float, str, bool or a Literal of strings, each perhaps with None; or two of them."""
    if get_origin(hint) in (Union, UnionType):
        hint, *others = (part for part in get_args(hint) if part is not NoneType)
        if others:
            return _either(_kind(hint), _kind(*others))
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return Kind(lambda text: _chosen(text, choices), "{" + ",".join(choices) + "}", choices)
    return {
        int: Kind(whole, "N"),
        float: Kind(finite, "X"),
        bool: Kind(_boolean, "true|false"),
        str: Kind(_text, "TEXT"),
    }[hint]


def _either(number: Kind, word: Kind) -> Kind:
    """A number, or a word in its place."""

    def convert(text: str) -> Any:
        if text in word.choices:
            return text
        try:
            return number.convert(text)
        except ValueError as error:
            raise ValueError(f"{error}, nor is it {' or '.join(word.choices)}") from None

    return Kind(convert, "|".join((*word.choices, number.shown)))


def _chosen(text: str, choices: tuple[str, ...]) -> str:
    if text not in choices:
        raise ValueError(f"{text!r} is none of {', '.join(choices)}")
    return text


def _text(text: str) -> str:
    if not text:  # as a shell passes an unset variable
        raise ValueError("is empty; name what is meant, or leave it out")
    return text


def _boolean(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() in TRUE
