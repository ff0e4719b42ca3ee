"""Every command that a document shows is taken by its parser."""

import argparse
import functools
import re
import shlex
from collections.abc import Iterator
from importlib import import_module

import pytest
from helpers.commands import COMMANDS as SWEPT
from helpers.documents import DOCUMENTS, code_blocks, read_document, without_blocks

from d_emo.cli.names import COMMANDS, PROGRAM
from d_emo.common.command_line import parser_of

# What stands for more in a document, so that the line is none by itself.
LEFT_OUT = ("...", "…", "$RANK")
# What may stand before a script.
LAUNCHERS = ("python", "python3", "accelerate", "torchrun", "nohup", "nice")


def shown_code(text: str) -> Iterator[str]:
    """Lines of a document's shell blocks, continued ones joined, and its inline code."""
    for block in code_blocks(text, "bash"):
        yield from block.replace("\\\n", " ").splitlines()
    for code in re.findall(r"`([^`]+)`", without_blocks(text)):
        yield " ".join(code.split())


def command_lines(text: str) -> Iterator[tuple[str, list[str]]]:
    """The modules that a document's commands begin, each with the arguments."""
    for line in shown_code(text):
        for part in re.split(r"&&|\|\s|;\s", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # an inline piece of another language
                continue
            if not any(sign in part for sign in LEFT_OUT) and (found := begun(words)):
                yield found


def begun(words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a line begins, and its arguments; None where it begins none of ours."""
    words = words[: words.index(">")] if ">" in words else words
    words = words[next((place for place, word in enumerate(words) if "=" not in word), 0) :]  # variables come first
    if words[:1] == [PROGRAM] and words[1:]:
        assert words[1].startswith("-") or words[1] in COMMANDS, f"{shlex.join(words)}: no such command"
        return None if words[1].startswith("-") else (COMMANDS[words[1]].module, words[2:])
    if words[:1] and words[0] in SWEPT and words[1:]:  # evaluate_fid --model runs/digits, in a sentence
        return SWEPT[words[0]].module, words[1:]
    for place, word in enumerate(words):
        script = re.search(r"(?:^|/)((?:train|eval)/[\w/]+)\.py$", word)
        module = (
            script[1].replace("/", ".") if script else re.fullmatch(r"d_emo\.((?:train|eval|pipelines)\.[\w.]+)", word)
        )
        if module and (place == 0 or words[0].rpartition("/")[2] in LAUNCHERS) and (script or words[place - 1] == "-m"):
            return f"d_emo.{module if script else module[1]}", words[place + 1 :]
    return None


@functools.cache
def parser_of_module(module: str) -> argparse.ArgumentParser:
    """A command's parser."""
    return parser_of(import_module(module).main)


def parsed(module: str, arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    """Let a command's parser read a line; one without arguments names the command and is none."""
    try:
        if arguments:
            parser_of_module(module).parse_args(arguments)
    except SystemExit as stop:
        if stop.code:  # --help ends a command, too
            pytest.fail(f"{module} {shlex.join(arguments)}\n{capsys.readouterr().err}")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_a_document_are_parsed_by_their_parsers(document, capsys):
    for module, arguments in command_lines(read_document(document)):
        parsed(module, arguments, capsys)


def test_commands_are_found_in_blocks_and_in_text(capsys):
    text = """
Run `train/train_dit.py --model DiT-B-2`, `evaluate_fid --steps 5`, not `train_dit`, or `eval/fid/names.py` of `python`:

```bash
X=1 accelerate launch --config_file a.yaml train/train_dit.py --config b.yaml \\
    --resume-from latest   # as before
python -m d_emo.eval.evaluate_fid --model m > log && .venv/bin/python eval/tables/model_table.py
accelerate launch train/train_dit.py ...
d-emo fid --model m && d-emo --version
```
"""
    assert list(command_lines(text)) == [
        ("d_emo.train.train_dit", ["--config", "b.yaml", "--resume-from", "latest"]),
        ("d_emo.eval.evaluate_fid", ["--model", "m"]),
        ("d_emo.eval.tables.model_table", []),
        ("d_emo.eval.evaluate_fid", ["--model", "m"]),
        ("d_emo.train.train_dit", ["--model", "DiT-B-2"]),
        ("d_emo.eval.evaluate_fid", ["--steps", "5"]),
        ("d_emo.eval.fid.names", []),
    ]
    with pytest.raises(pytest.fail.Exception):
        parsed("d_emo.train.train_dit", ["--modell", "DiT-B-2"], capsys)
    with pytest.raises(AssertionError, match="d-emo figs"):
        list(command_lines("`d-emo figs --model m`"))
