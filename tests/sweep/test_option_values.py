"""Every option of every command with every kind of value: it is accepted and works, or one line says why not.

`pytest -n 0 -q -s tests/sweep/test_option_values.py` prints how many cases there are; `-m slow` runs what is accepted
to its end. The table of what is expected is `helpers/option_rules.py`.
"""

import collections
import shutil
from unittest import mock

import pytest
from helpers.commands import (
    COMMANDS,
    Reached,
    SweptCommand,
    filled,
    left_behind,
    options_of,
    outcome,
    with_option,
)
from helpers.option_rules import KINDS, RULES, VALUES, kind_of

# Trainers share most of their options.
LATER = ("train_segmenter", "train_detector", "train_video_classifier")
commands = pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=[pytest.mark.slow] * (name in LATER)) for name, command in COMMANDS.items()],
    ids=lambda command: command.name,
)
# What takes minutes or has tests of its own.
NOT_RUN = {"compile", "push_to_hub", "teacher", "dry_run"}


def named(action, value: str, message: str) -> bool:
    """Whether a line names what it is about: the option, or a value that nobody could mistake."""
    names = {*action.option_strings, action.dest, *([] if action.option_strings else ["an argument"])}
    return any(name in message for name in names) or (len(value) > 2 and value[:100] in message)


def reached(*_: object, **__: object) -> None:
    """In place of a command's work."""
    raise Reached


def cases(command: SweptCommand, made, out):
    """(option, name of the value, value, command line) of every case."""
    base = filled(command.base, made, out)
    for action in options_of(command):
        for name, value in VALUES.items():
            yield action, name, value, with_option(base, action, value)


def test_every_option_has_a_rule_and_every_rule_an_option():
    known = {(command.name, action.dest) for command in COMMANDS.values() for action in options_of(command)}
    assert not [pair for pair in sorted(known) if kind_of(*pair) is None]
    named_in_table = {name for options in KINDS.values() for name in options}
    assert not named_in_table - {name for command, dest in known for name in (dest, f"{command} {dest}")}


@commands
def test_values_are_accepted_or_refused_by_rule(command, made, tmp_path, capsys):
    counts, wrong, out = collections.Counter(), [], tmp_path / "out"
    for action, name, value, arguments in cases(command, made, out):
        rule = RULES[kind_of(command.name, action.dest)]
        with mock.patch(command.parsed, reached):
            result = outcome(command.main, arguments, capsys)
        expected = "reached" if name in rule.accepted else "refused"
        if expected == "refused" and result.kind == "reached" and name not in rule.later:
            result = outcome(command.main, arguments, capsys)  # found out later, but before anything is written
        counts[result.kind] += 1
        case = f"{command.name} {action.dest} = {name}"
        if name in rule.later and result.kind in ("reached", "refused"):
            expected = result.kind
        if result.kind != expected:
            wrong.append(f"{case}: {result.kind} {result.message}, not {expected}")
        elif result.kind == "refused" and not named(action, value, result.message):
            wrong.append(f"{case}: not named in {result.message!r}")
        elif result.kind == "refused" and left_behind(out):
            wrong.append(f"{case}: left {left_behind(out)[:3]}")
        shutil.rmtree(out, ignore_errors=True)
    print(f"\n{command.name}: {counts.total()} cases, {counts['reached']} accepted, {counts['refused']} refused")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@commands
def test_what_is_accepted_works_or_says_why_not(command, made, tmp_path, capsys):
    if not command.quick:
        pytest.skip("takes minutes each time")
    counts, wrong = collections.Counter(), []
    for number, (action, name, _, arguments) in enumerate(cases(command, made, tmp_path / "@out@")):
        rule = RULES[kind_of(command.name, action.dest)]
        if name not in rule.accepted | rule.later or action.dest in NOT_RUN:
            continue
        out = tmp_path / f"out-{number}"
        result = outcome(command.main, [word.replace(str(tmp_path / "@out@"), str(out)) for word in arguments], capsys)
        counts[result.kind] += 1
        if result.kind not in ("done", "refused"):
            wrong.append(f"{command.name} {action.dest} = {name}: {result.kind} {result.message}")
    print(f"\n{command.name}: {counts.total()} runs, {counts['done']} done, {counts['refused']} refused")
    assert not wrong, "\n".join(wrong)
