"""Commands as processes of their own: started, waited for, killed."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from helpers.paths import ROOT, TESTS


def trainer_command(*arguments: object, processes: int = 1) -> list[str]:
    """The command that starts the trainer script."""
    script = ROOT / "train" / "train_dit.py"
    return (
        [*map(str, [sys.executable, script, *arguments])] if processes == 1 else torchrun(processes, script, *arguments)
    )


def torchrun(processes: int, *arguments: object) -> list[str]:
    """The command that starts a script, or `-m` and a module, in several processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes]
    return [str(part) for part in [*launcher, "--master-addr", "127.0.0.1", "--master-port", port, *arguments]]


def offline_environment() -> dict[str, str]:
    """An environment in which the Hub is never asked and the CPU is used."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


class Trainer:
    """The trainer as a process of its own, whose output is kept in a file. Always ended, with its children."""

    def __init__(self, log: Path, *arguments: object, processes: int = 1):
        self.log = log
        with log.open("w") as output:
            self.process = psutil.Popen(
                self.command(*arguments, processes=processes),
                env=offline_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def command(self, *arguments: object, processes: int) -> list[str]:
        """The command line."""
        return trainer_command(*arguments, processes=processes)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """kill -9, children included (torchrun starts its workers in sessions of their own)."""
        if self.process.is_running():
            for process in [*self.process.children(recursive=True), self.process]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait(60)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        """Wait for a condition while the trainer runs."""
        deadline = time.monotonic() + seconds
        while not condition() and self.process.is_running() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert condition(), self.output

    def finish(self, seconds: float = 180) -> int:
        """Wait for the end and return the exit code."""
        return self.process.wait(seconds)

    @property
    def output(self) -> str:
        return self.log.read_text()


def kill_when(script: str, condition: Callable[[], bool]) -> None:
    """Run Python code that may import these helpers, and end it by kill -9 as soon as the condition holds."""
    code = f"import sys\nsys.path.insert(0, {str(TESTS)!r})\n{script}"
    process = psutil.Popen([sys.executable, "-c", code], env=offline_environment())
    try:
        while not condition():
            assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait(30)
