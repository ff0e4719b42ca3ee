"""Runs of the trainers, in this process where one suffices, and what is compared of their folders."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from d_emo.kernels import use_backend
from d_emo.kernels.dispatch import chosen_backend
from d_emo.train import train_dit
from helpers.processes import Trainer

# Small and quick, of any length: what the digits' recipe has otherwise suits its thousand steps.
TINY = ["--model", "D-EMOv2-N-8", "--global-batch-size", "8", "--log-every", "1", "--sample-every", "0",
        "--report-to", "none", "--num-workers", "0", "--objective", "dit", "--lr-scheduler", "constant",
        "--lr-warmup-steps", "0"]  # fmt: skip


@contextlib.contextmanager
def uncounted() -> Iterator[None]:
    """Within it, trainers neither count what a step will hold nor time the machine: that is half of a tiny run's time.

    Their plan says that it was not counted. Processes of their own (`Trainer`) do.
    """

    def refuse(*_: object) -> None:
        raise RuntimeError("this test needs no count")

    rehearsal, rate = "d_emo.train.engine.memory.Launch.rehearsed", "d_emo.train.engine.fit.TIMED_SIDE"
    with mock.patch(rehearsal, refuse), mock.patch(rate, 64):
        yield


def uncounted_but_for_plans(arguments: Sequence[object]) -> contextlib.AbstractContextManager[None]:
    """`uncounted`, unless a plan is all that is asked for."""
    return contextlib.nullcontext() if "--dry-run" in arguments else uncounted()


def run_here(
    capsys: pytest.CaptureFixture, *arguments: object, main: Callable[[list[str]], None] = train_dit.main
) -> tuple[object, str]:
    """Run a command's `main` in this process; what it exits with (0 for success) and all that it printed."""
    AcceleratorState._reset_state(True)
    code: object = 0
    try:
        with uncounted_but_for_plans(arguments), use_backend(chosen_backend()):  # undoes --kernels
            main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    finally:
        AcceleratorState._reset_state(True)
    captured = capsys.readouterr()
    return code, captured.out + captured.err + (code if isinstance(code, str) else "")


def train_to_the_end(
    capsys: pytest.CaptureFixture,
    log: Path,
    *arguments: object,
    processes: int = 1,
    main: Callable[[list[str]], None] = train_dit.main,
    kind: type[Trainer] = Trainer,
) -> str:
    """Run a trainer, `main` here or `kind` elsewhere, which must succeed; what it printed.

    One process is this one: starting another costs ten seconds of imports.
    """
    if processes == 1:
        code, output = run_here(capsys, *arguments, main=main)
    else:
        with kind(log, *arguments, processes=processes) as trainer:
            code, output = trainer.finish(), trainer.output
    assert code == 0, output
    return output


def train_in_parts(capsys: pytest.CaptureFixture, folder: Path, *arguments: object, processes: int = 1) -> Path:
    """Four steps in one go, and stopped after two and gone on with, which must have the same bits; the former's folder.

    Args:
        capsys: of the test.
        folder: gets `whole` and `parts`.
        arguments: of the trainer, lengths, checkpoints and output aside.
        processes: to train on.
    """
    run = (*arguments, "--checkpoint-every", "2", "--output-dir")
    whole, parts = folder / "whole", folder / "parts"
    train_to_the_end(capsys, folder / "log", *run, whole, "--max-train-steps", "4", processes=processes)
    for more in (("--max-train-steps", "2"), ("--max-train-steps", "4", "--resume-from", "latest")):
        train_to_the_end(capsys, folder / "log", *run, parts, *more, processes=processes)
    assert losses(parts) == losses(whole)
    assert_same_bits(parts / "checkpoint-0000004", whole / "checkpoint-0000004")
    return whole


def assert_two_processes_train_as_one(capsys: pytest.CaptureFixture, folder: Path, *arguments: object) -> None:
    """Losses of a run of two micro batches, on one process and one on each of two, agree to 1e-6."""
    run = (*arguments, "--micro-batch-size", "4", "--output-dir")
    for processes in (1, 2):
        train_to_the_end(capsys, folder / "log", *run, folder / str(processes), processes=processes)
    one, two = ([float(line.split(",")[1]) for line in losses(folder / name)[1:]] for name in ("1", "2"))
    assert two == pytest.approx(one, rel=1e-6)


def losses(folder: Path) -> list[str]:
    """The log without its columns of speed and time."""
    return [line.rsplit(",", 2)[0] for line in (folder / "train_log.csv").read_text().splitlines()]


def assert_same_bits(first: Path, second: Path) -> None:
    """Two checkpoints hold the same weights, average and optimizer, bit for bit."""
    state = ("training_state/model.safetensors", "training_state/optimizer.safetensors")
    for name in (*state, "transformer/diffusion_pytorch_model.safetensors"):
        a, b = load_file(first / name), load_file(second / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
