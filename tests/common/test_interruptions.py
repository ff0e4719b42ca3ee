"""Ctrl-C and closed pipes, wherever they hit a command: no traceback, the shell's codes."""

import subprocess
import sys

import pytest
from helpers.processes import offline_environment

from d_emo.common.commands import command

COMMAND = """
import os, signal, sys
from d_emo.common.commands import command

@command("do", kept="it goes on")
def main(kind):
    if kind == "pipe":
        for number in range(100_000):
            print(number)
        return
    if kind == "swallowed":  # as libraries do that try imports
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RecursionError("out of something else")
    signal.raise_signal(signal.SIGINT)

main(sys.argv[1])
"""


def run(kind, **options):
    return subprocess.run(
        [sys.executable, "-c", COMMAND, kind], env=offline_environment(), stderr=subprocess.PIPE, text=True, **options
    )


@pytest.mark.parametrize("kind", ["plain", "swallowed"])
def test_ctrl_c_ends_with_a_line(kind):
    done = run(kind, stdout=subprocess.PIPE)
    assert done.returncode == 130 and done.stderr == "\ndo: interrupted; it goes on\n" and done.stdout == ""


def test_a_closed_pipe_ends_quietly():
    head = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.readline()"], stdin=subprocess.PIPE)
    done = run("pipe", stdout=head.stdin)
    head.stdin.close()
    head.wait()
    assert done.returncode == 141 and done.stderr == ""


def test_a_command_without_output_runs(monkeypatch):
    """As daemons start it."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    ran = []

    @command("name")
    def main() -> None:
        print("nobody hears")
        ran.append(True)

    main()
    assert ran
