"""Scripts in processes of their own: started, waited for, interrupted, killed.

What the commands import takes ten seconds a process. So `Script` forks its processes from one that has imported it all;
`Command` starts the command line itself, for the tests that are about it.
"""

import contextlib
import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from helpers.paths import ROOT, TESTS

TRAIN_DIT = ROOT / "train" / "train_dit.py"
IMPORTED = [
    "helpers.uncollected",
    "diffusers",
    "transformers",
    "sklearn.datasets",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "d_emo.train.encode_latents",
    "d_emo.train.classification.trainer",
    "d_emo.train.diffusion.trainer",
    "d_emo.eval.evaluate_fid",
]


def offline_environment() -> dict[str, str]:
    """An environment in which the Hub is never asked and the CPU is used."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def torchrun(processes: int, *arguments: object) -> list[str]:
    """The command that starts a script, or `-m` and a module, in several processes on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes]
    return [str(part) for part in [*launcher, "--master-addr", "127.0.0.1", "--master-port", free_port(), *arguments]]


class Running:
    """Processes whose output is kept in a file. Always ended, with their children."""

    def __init__(self, log: Path, processes: Sequence[psutil.Process]):
        self.log, self.processes = log, processes

    @property
    def process(self) -> psutil.Process:
        """The only process, or the first one."""
        return self.processes[0]

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def exit_codes(self) -> list[int | None]:
        """The exit code of each process, None while it runs."""
        raise NotImplementedError

    def is_running(self) -> bool:
        """Whether any process runs."""
        return None in self.exit_codes()

    def kill(self) -> None:
        """kill -9, children included (torchrun starts its workers in sessions of their own)."""
        for process in self.processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                for victim in [*process.children(recursive=True), process]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        victim.kill()
        deadline = time.monotonic() + 60
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not self.is_running()

    def wait_until(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        """Wait for a condition while the processes run."""
        deadline = time.monotonic() + seconds
        while not condition() and self.is_running() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert condition(), self.output

    def finish(self, seconds: float = 180) -> int:
        """Wait for the end; the first exit code that is not 0, or 0. As under torchrun, one failure ends all."""
        deadline = time.monotonic() + seconds
        while self.is_running() and time.monotonic() < deadline:
            if any(self.exit_codes()):
                time.sleep(1)  # for the other processes to say what went wrong with them
                self.kill()
            time.sleep(0.01)
        assert not self.is_running(), self.output
        return next((code for code in self.exit_codes() if code), 0)

    @property
    def output(self) -> str:
        return self.log.read_text()


class Command(Running):
    """A command line."""

    def __init__(self, log: Path, command: Sequence[object]):
        with log.open("w") as output:
            self.popen = psutil.Popen(
                [str(part) for part in command],
                env=offline_environment(),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        super().__init__(log, [self.popen])

    def exit_codes(self) -> list[int | None]:
        return [self.popen.poll()]


def _run(log: str, environment: dict[str, str], script: str, arguments: list[str]) -> None:
    """In the forked process: what `python SCRIPT ARGUMENTS > LOG 2>&1` does; `-c` and code in place of a script."""
    import torch

    gc.freeze()  # what was imported stays, and pages that nobody writes to are not copied
    gc.enable()
    multiprocessing.set_start_method(None, force=True)  # the platform's, for the processes that it starts in turn
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if script == "-c":
        sys.argv = ["-c", *arguments[1:]]
        sys.path.insert(0, str(TESTS))
        exec(compile(arguments[0], "<code>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")


class Script(Running):
    """A script, or `-c` and code that may import these helpers, with arguments; several processes as under torchrun."""

    def __init__(self, log: Path, script: object, *arguments: object, processes: int = 1):
        log.write_text("")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTED)
        environments, port = [offline_environment() for _ in range(processes)], free_port()
        for rank, environment in enumerate(environments):
            if processes > 1:  # what torchrun sets
                numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                environment.update({name: str(number) for name, number in numbers.items()})
                environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
        self.forked: list[BaseProcess] = []
        own = dict(os.environ)
        path = os.pathsep.join([str(TESTS), *filter(None, [own.get("PYTHONPATH")])])
        os.environ.update({**offline_environment(), "PYTHONPATH": path})  # for what the first process imports
        try:
            for environment in environments:
                parts = (str(log), environment, str(script), [str(part) for part in arguments])
                self.forked.append(context.Process(target=_run, args=parts))
                self.forked[-1].start()
        finally:
            os.environ.clear()
            os.environ.update(own)
        super().__init__(log, [psutil.Process(process.pid) for process in self.forked])

    def exit_codes(self) -> list[int | None]:
        return [process.exitcode for process in self.forked]


class Trainer(Script):
    """The trainer of diffusion models, or another `script`."""

    script = TRAIN_DIT

    def __init__(self, log: Path, *arguments: object, processes: int = 1):
        super().__init__(log, self.script, *arguments, processes=processes)


def run_script(log: Path, script: object, *arguments: object, processes: int = 1) -> tuple[int, str]:
    """Run a script to its end; its exit code and all that it printed."""
    with Script(log, script, *arguments, processes=processes) as running:
        return running.finish(), running.output


def kill_when(log: Path, code: str, condition: Callable[[], bool]) -> None:
    """Run Python code that may import these helpers, and end it by kill -9 as soon as the condition holds."""
    with Script(log, "-c", code) as running:
        running.wait_until(condition)
        assert running.is_running()
