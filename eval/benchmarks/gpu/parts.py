"""Parts of a run as processes of their own: each within its own limit, all within one, and none ends another."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from d_emo.common.command_line import CommandParser
from d_emo.common.files import appended, check_writable
from d_emo.common.output import say

LOG, RESULTS = "log.txt", "results.jsonl"
# A part that would have less than this is left out; at the end so much is kept for what the caller writes.
LEAST, RESERVE = 8.0, 5.0
# So long a process may take to end after it was asked to.
PATIENCE = 10.0
# Set for every part where the user has not: nothing is fetched, and memory that is freed in pieces is used again.
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}


class Parts:
    """The parts of a run.

    Args:
        folder: gets `log.txt`.
        seconds: for all of them.
    """

    def __init__(self, folder: Path, seconds: float):
        self.folder, self.began = folder, time.monotonic()
        self.ends = self.began + seconds
        folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds left for parts."""
        return self.ends - RESERVE - time.monotonic()

    def run(
        self, name: str, seconds: float, *commands: Sequence[str], ask: int = signal.SIGTERM, kept: float = 0
    ) -> bool:
        """Run commands at once until they end or their time is over; whether all ended well by themselves.

        Args:
            name: of the part, for people.
            seconds: its limit, if so many are left.
            commands: words of each.
            ask: the signal that asks a process to end; one that does not is killed.
            kept: seconds for later parts, which this one may not use.
        """
        limit = min(seconds, self.left() - kept)
        if limit < LEAST:
            say(f"## {name}: left out, no time left")
            return False
        began = time.monotonic()
        with appended(self.folder / LOG) as log:
            log.write(f"#### {name}, at most {limit:.0f} s\n")
            log.flush()
            environment = {**ENVIRONMENT, **os.environ}
            processes = [
                subprocess.Popen(words, stdout=log, stderr=log, env=environment, start_new_session=True)
                for words in commands
            ]
            codes = [_wait(process, began + limit, ask) for process in processes]
        told = ", ".join("time over" if code is None else f"exit code {code}" for code in dict.fromkeys(codes))
        say(f"## {name}: {told}, {time.monotonic() - began:.0f} of {limit:.0f} s")
        if any(codes):
            for line in self._last_lines(4):
                say(f"   {line[:300]}")
        return codes == [0] * len(codes)

    def _last_lines(self, count: int) -> list[str]:
        with (self.folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4000))
            return file.read().decode(errors="replace").splitlines()[-count:]


def _wait(process: subprocess.Popen, until: float, ask: int) -> int | None:
    """The exit code of a process that ends by itself; None of one that has to be asked, or killed."""
    try:
        return process.wait(max(0.1, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        _signal(process, ask)
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        process.wait()
    return None


def _signal(process: subprocess.Popen, number: int) -> None:
    """To a process and to what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def module(name: str, *words: object) -> list[str]:
    """The words that run a module of this package with this Python."""
    return [sys.executable, "-m", name, *map(str, words)]


def write_result(folder: Path, **values: object) -> str:
    """Write a line of JSON into the results of a run, at once and whole; the line."""
    line = json.dumps(values, default=str)
    with appended(folder / RESULTS) as file:
        file.write(line + "\n")
    return line


def check_places(parser: CommandParser, options: argparse.Namespace) -> None:
    """Refuse an --output-dir that cannot be written, and --data that is not there."""
    try:
        check_writable(options.output_dir, "--output-dir", folder=True)
    except ValueError as error:
        parser.error(str(error))
    if options.data and not options.data.is_file():
        parser.error(f"--data {options.data}: there is no such file.")


def check_named_once(parser: CommandParser, options: argparse.Namespace, *names: str) -> None:
    """Refuse a value that is given twice to an option that takes several."""
    for name in names:
        given = getattr(options, name)
        if len(set(given)) != len(given):
            parser.error(f"--{name.replace('_', '-')} {' '.join(map(str, given))}: name each once.")
