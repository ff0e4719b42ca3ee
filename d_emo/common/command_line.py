"""Command lines: one parser for every command, whose help has groups and examples and whose complaints are one line.

Hyphens and underscores are the same. Options that do not exist are named all at once, each with what it may have meant:
a near name of this command's, or what another project's option is called here (`aliases.py`).
"""

import argparse
import difflib
import inspect
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from d_emo.common.aliases import ABSENT, ALIASES
from d_emo.common.messages import one_line
from d_emo.common.typed import as_typed, name_of, note
from d_emo.common.versions import own_version

HELP_WIDTH = 110
HELP_COLUMN = 32
# Options that name images, for words that stand by themselves.
PATHS = ("train_data_dir", "data_dir", "samples", "reference")


class UnknownOptionError(ValueError):
    """Options that the command does not have; the message names all of them."""


class _MadeError(BaseException):
    """Ends a command that was called for its parser alone; no error that a command would catch."""

    def __init__(self, parser: "CommandParser"):
        self.parser = parser


class CommandParser(argparse.ArgumentParser):
    """argparse with this package's manners.

    Args:
        command: the command's name, which begins its complaints unless the user typed another (`typed.py`).
        about: the module's docstring. Its text becomes the description, its indented lines the examples.
        epilog: what follows the examples.
    """

    def __init__(self, command: str, about: str, epilog: str = ""):
        text, examples = split_docstring(as_typed(about))
        after = [f"examples:\n{textwrap.indent(examples, '  ')}" if examples else "", as_typed(epilog), note()]
        super().__init__(
            prog=name_of(command),
            description=text,
            epilog="\n\n".join(part for part in after if part),
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self.add_argument("--version", action="version", version=f"{self.prog} (d_emo {own_version()})")

    def error(self, message: str) -> NoReturn:
        """End with one line and argparse's exit code."""
        self.exit(2, one_line(f"{self.prog}: {as_typed(message.removeprefix('argument '))}") + "\n")

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; unknown options end the program like any other mistake."""
        try:
            return super().parse_args(args, namespace)
        except UnknownOptionError as error:
            self.error(str(error))

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's, but that options have to be known, and words where the command takes none.

        Raises:
            UnknownOptionError: some are not.
        """
        if _only_parsers:
            raise _MadeError(self)
        known = self._option_string_actions
        hyphenated = {name.replace("-", "_"): name for name in known if name.startswith("--")}
        arguments: list[str] = []
        for argument in args or []:
            head, equals, value = argument.partition("=")
            if not argument or (head.startswith("--") and equals and not value):  # as a shell passes an unset variable
                named = head or (arguments[-1] if arguments and arguments[-1] in known else "an argument")
                self.error(f"{named} is empty; name what is meant, or leave it out.")
            head = hyphenated.get(head.replace("-", "_"), head)
            if arguments and arguments[-1] in known and _is_number(argument) and argument.startswith("-"):
                arguments[-1] += f"={argument}"  # argparse takes -1e-3 for an option
            else:
                arguments.append(f"{head}{equals}{value}")
        heads = [argument.partition("=")[0] for argument in arguments]
        unknown = [h for h in heads if h.startswith("-") and h.strip("-") and h not in known and not _is_number(h)]
        if not {"-h", "--help", "--version"} & set(heads):
            names = [a.dest for a in self._actions if argparse.SUPPRESS not in (a.help, a.dest)]
            wrong = [_explain(head, names) for head in dict.fromkeys(unknown)]
            wrong += [] if unknown else [_explain_word(word, names) for word in self._stray(arguments)]
            if wrong:
                raise UnknownOptionError(" ".join(wrong))
        return super().parse_known_args(arguments, namespace)

    def _stray(self, arguments: Sequence[str]) -> list[str]:
        """Words that belong to no option, of a command that takes none; arguments whose options are all known."""
        if any(not action.option_strings for action in self._actions):
            return []
        stray, room = [], 0.0
        for argument in arguments:
            head, equals, _ = argument.partition("=")
            action = self._option_string_actions.get(head)
            if action is not None:
                most = 1 if action.nargs in (None, "?") else action.nargs
                room = 0 if equals else float(most) if isinstance(most, int) else math.inf
            elif room:
                room -= 1
            else:
                stray.append(argument)
        return stray


_only_parsers = False


def parser_of(main: Callable[[list[str]], None]) -> CommandParser:
    """The parser that a command's `main` makes before it reads anything: for completion, and for tests."""
    global _only_parsers
    former, _only_parsers = _only_parsers, True
    try:
        inspect.unwrap(main)([])
    except _MadeError as made:
        return made.parser
    finally:
        _only_parsers = former
    raise TypeError(f"{main.__module__}.{main.__qualname__} makes no CommandParser")  # ours to mend


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Raw description and epilog, and room for this package's long names."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=HELP_COLUMN, width=HELP_WIDTH)

    def _get_help_string(self, action: argparse.Action) -> str:
        return as_typed(with_default(action.help or "", action.default))


def with_default(text: str, default: Any) -> str:
    """A line of help that ends with the default, unless it says it already or there is nothing to say."""
    if default in (None, False, "", argparse.SUPPRESS) or "Default:" in text:
        return text
    values = default if isinstance(default, list | tuple) else [default]
    shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    return f"{text} Default: {shown}.".strip()


def split_docstring(about: str) -> tuple[str, str]:
    """The text of a docstring, and the examples: its indented paragraphs."""
    paragraphs = about.strip("\n").split("\n\n")
    examples = [paragraph for paragraph in paragraphs if paragraph.startswith(" ")]
    text = [paragraph.strip() for paragraph in paragraphs if not paragraph.startswith(" ")]
    return "\n\n".join(text), textwrap.dedent("\n".join(examples))


def flag(name: str) -> str:
    """`report_to wandb` -> `--report-to wandb`."""
    first, space, rest = name.partition(" ")
    return f"--{first.replace('_', '-')}{space}{rest}"


def alias_of(name: str, names: Iterable[str]) -> str | None:
    """What an option of another project is called here, perhaps with its value; None if it has no counterpart."""
    known = set(names)
    candidates = ALIASES.get(name.replace("-", "_").lower(), ())
    return next((candidate for candidate in candidates if candidate.split()[0] in known), None)


def hint(name: str, names: Iterable[str]) -> str:
    """Up to three names that were perhaps meant, or where all are listed."""
    close = difflib.get_close_matches(name.replace("-", "_"), list(names), n=3)
    return f"did you mean {', '.join(close)}?" if close else "see --help for the options."


def _explain(head: str, names: Sequence[str], name: str = "") -> str:
    """One unknown option as it was written, and what to write in its place; `name` is its name where that is more."""
    name = name or head.lstrip("-").replace("-", "_")
    if attached := re.fullmatch(r"([a-z])\d+", name):  # -b64, -j8
        name = attached[1]
    if alias := alias_of(name, names):
        return f"{head} is {flag(alias)} here."
    if name.startswith("no_") and name[3:] in names:
        return f"{head} is {flag(name[3:])} false here."
    if name.lower() in ABSENT:
        return f"{head} has no counterpart here: {ABSENT[name.lower()]}."
    if name.lower() in ALIASES:
        return f"{head} is not an option; other commands have it ({flag(ALIASES[name.lower()][0])})."
    return f"{head} is not an option; {hint(name, names)}"


def _explain_word(word: str, names: Sequence[str]) -> str:
    """A word that no option takes: perhaps `option=value` as Hydra's users write it, perhaps a path."""
    key, equals, value = word.partition("=")
    if equals and key:
        name = key.lstrip("+~").rpartition(".")[2].replace("-", "_")
        if name in names:
            return f"{word} is {flag(name)} {value} here."
        return _explain(word, names, name)
    images = [flag(name) for name in PATHS if name in names]
    if images:
        return f"{word}: no option takes this; values follow their option, and images are named with " + (
            " and ".join(images) + "."
        )
    return f"{word}: no option takes this; values follow their option."


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
