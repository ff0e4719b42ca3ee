"""`d-emo`: the list of commands, or one of them."""

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from d_emo.cli.names import COMMANDS, GROUPS, PROGRAM, WORDS, candidates
from d_emo.common.commands import command
from d_emo.common.messages import one_line, shown
from d_emo.common.typed import Typed, called_as
from d_emo.common.versions import own_version

ABOUT = "D-EMOv2: class-conditional image generation, EMOv2 backbones, and systems on them."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names, with what follows it; without one, list them all.

    Args:
        arguments: what follows `d-emo`; by default this process's.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words or words[0] in ("-h", "--help", "--version"):
        print_about(words)
    elif (name := words[0].replace("_", "-")) in COMMANDS:
        run(name, words[1:])
    else:
        known = candidates()
        near = [name] if name in known else difflib.get_close_matches(name.lower(), known, n=3)
        meant = ", ".join(dict.fromkeys(known[match] for match in near))
        hint = f"did you mean {meant}?" if meant else f"{PROGRAM} alone lists them."
        print(one_line(f"{PROGRAM}: {shown(words[0])} is no command; {hint}"), file=sys.stderr)
        sys.exit(2)


def run(name: str, arguments: list[str]) -> None:
    """Call a command's `main`; what it says of itself and of others has the names of `d-emo`."""
    named = COMMANDS[name]
    with called_as(typed(name)):
        import_module(named.module).main(arguments)


def typed(name: str) -> Typed:
    """How a command was started that has this name."""
    named = COMMANDS[name]
    several = f"1 process is launched. Several, on GPUs or machines: accelerate launch -m {named.module} [OPTIONS]"
    return Typed(f"{PROGRAM} {name}", WORDS, several if named.launched else "")


@command(PROGRAM)
def print_about(arguments: Sequence[str]) -> None:
    """Print the version, or the commands, a line each."""
    if arguments[:1] == ["--version"]:
        print(f"{PROGRAM} (d_emo {own_version()})")
        return
    width = max(map(len, COMMANDS))
    print(f"usage: {PROGRAM} COMMAND [OPTIONS]\n\n{ABOUT}")
    for title, group in GROUPS.items():
        print(f"\n{title}:")
        for name, named in group.items():
            print(f"  {name:<{width}}  {named.about}")
    print(f"\n{PROGRAM} COMMAND --help shows a command's options; {PROGRAM} --version the version.")
