"""Completion of `d-emo` by the TAB key: names of commands, their options, and the values that these take.

    source <(d-emo completion bash)                             # bash, for this shell; in ~/.bashrc for every one
    d-emo completion zsh > ~/.zfunc/_d-emo                      # zsh, in a folder of its $fpath

Prints a script for the shell, made of the options that all commands have: after an update, make it again.
"""

import argparse
from importlib import import_module
from typing import Any

from d_emo.cli.names import COMMANDS, PROGRAM
from d_emo.common.command_line import CommandParser, parser_of
from d_emo.common.commands import command

SHELLS = ("bash", "zsh")
# Ends of the names of options that take a folder, and of those that take a file or a folder.
FOLDERS = ("_dir", "_from", "vae", "latents")
FILES = (
    "config",
    "output",
    "model",
    "dataset",
    "reference",
    "samples",
    "checkpoint",
    "runs",
    "export",
    "json",
    "images",
)


@command("completion", extra="completion")
def main(arguments: list[str]) -> None:
    """Print a shell's script."""
    parser = CommandParser("completion", __doc__)
    parser.add_argument("shell", choices=SHELLS, help="Whose script.")
    options = parser.parse_args(arguments)
    import shtab

    print(shtab.complete(all_parsers(shtab.FILE, shtab.DIRECTORY), options.shell))


def all_parsers(file: Any, folder: Any) -> argparse.ArgumentParser:
    """Every command's parser below one of `d-emo`'s; what completes files and folders is shtab's."""
    parser = argparse.ArgumentParser(PROGRAM)
    parser.add_argument("--version", action="store_true", help="Show the version.")
    below = parser.add_subparsers(dest="command")
    for name, named in COMMANDS.items():
        own = parser_of(import_module(named.module).main)
        added = below.add_parser(name, help=named.about, parents=[own], add_help=False, allow_abbrev=False)
        for action in added._actions:
            if action.nargs == 0 or action.choices is not None:
                continue
            if action.dest.endswith(FOLDERS):
                action.complete = folder  # type: ignore[attr-defined]
            elif action.dest.endswith(FILES):
                action.complete = file  # type: ignore[attr-defined]
    return parser
