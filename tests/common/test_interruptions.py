"""Ctrl-C and closed pipes, wherever they hit a command: no traceback, the shell's codes."""

import os
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


FORKED = """
import os, signal, sys, time
from d_emo.common.commands import command

@command("forks", kept="nothing is lost")
def main(arguments):
    child = os.fork()
    if not child:  # a loader's process that has not come to leave Ctrl-C to the command
        os.kill(os.getpid(), signal.SIGINT)
        os._exit(7)
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    os.kill(os.getpid(), signal.SIGINT)

main([])
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_ctrl_c_is_the_commands_and_a_forked_process_has_nothing_to_say():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (130, ["child", "7"]), done.stderr
    assert done.stderr.strip() == "forks: interrupted; nothing is lost"
