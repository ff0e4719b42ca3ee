"""Every command that a document shows is taken by its parser."""

import argparse
import functools
import re
import shlex
from collections.abc import Iterator

import pytest
from helpers.commands import COMMANDS, SweptCommand, parser_of
from helpers.documents import DOCUMENTS, code_blocks, read_document, without_blocks

BY_MODULE = {command.module: command for command in COMMANDS.values()}
# What stands for more in a document, so that the line is none by itself.
LEFT_OUT = ("...", "…", "$RANK")


def shown_code(text: str) -> Iterator[str]:
    """Lines of a document's shell blocks, continued ones joined, and its inline code."""
    for block in code_blocks(text, "bash"):
        yield from block.replace("\\\n", " ").splitlines()
    for code in re.findall(r"`([^`]+)`", without_blocks(text)):
        yield " ".join(code.split())


def module_of(word: str) -> str | None:
    """The module of `train/train_dit.py`, also behind a folder, of `d_emo.eval.evaluate_fid`, of `evaluate_fid`."""
    if found := re.search(r"(?:^|/)((?:train|eval)/[\w/]+)\.py$", word):
        return "d_emo." + found[1].replace("/", ".")
    if word in COMMANDS:
        return COMMANDS[word].module
    return word if re.fullmatch(r"d_emo\.(?:train|eval)\.[\w.]+", word) else None


def command_lines(text: str) -> Iterator[tuple[str, list[str]]]:
    """The modules that a document's commands begin, each with the arguments."""
    for line in shown_code(text):
        for part in re.split(r"&&|\|\s|;\s", line):
            if any(sign in part for sign in LEFT_OUT):
                continue
            try:
                words = shlex.split(part, comments=True)
            except ValueError:  # an inline piece of another language
                continue
            for place, word in enumerate(words):
                if module := module_of(word):
                    named = words[place - 1 : place] == ["-m"] or word.endswith(".py") or words[place + 1 : place + 2]
                    if named and (place == 0 or begins_a_program(words[:place])):
                        arguments = words[place + 1 :]
                        redirected = arguments.index(">") if ">" in arguments else len(arguments)
                        yield module, arguments[:redirected]
                    break


def begins_a_program(words: list[str]) -> bool:
    """Whether what stands before a script starts it: Python, a launcher, variables."""
    first = next((word for word in words if "=" not in word), "python")
    return first.rpartition("/")[2] in ("python", "python3", "accelerate", "torchrun", "nohup", "nice")


@functools.cache
def parser_of_module(module: str) -> argparse.ArgumentParser:
    """The parser of a command, of those that the sweep leaves out, too."""
    return parser_of(BY_MODULE.get(module) or SweptCommand(module, module, (), ""))


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
Run `train/train_dit.py --model DiT-B-2` or

```bash
X=1 accelerate launch --config_file a.yaml train/train_dit.py --config b.yaml \\
    --resume-from latest   # as before
python -m d_emo.eval.evaluate_fid --model m > log && .venv/bin/python eval/tables/model_table.py
accelerate launch train/train_dit.py ...
```
"""
    assert list(command_lines(text)) == [
        ("d_emo.train.train_dit", ["--config", "b.yaml", "--resume-from", "latest"]),
        ("d_emo.eval.evaluate_fid", ["--model", "m"]),
        ("d_emo.eval.tables.model_table", []),
        ("d_emo.train.train_dit", ["--model", "DiT-B-2"]),
    ]
    with pytest.raises(pytest.fail.Exception):
        parsed("d_emo.train.train_dit", ["--modell", "DiT-B-2"], capsys)
