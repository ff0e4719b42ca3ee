"""Helpers of the tests: seeded weights, tiny models with random parameters, the trainer as a subprocess."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from d_emo import DEMOPipeline, create_model
from d_emo.kernels import use_backend
from d_emo.kernels.dispatch import chosen_backend
from d_emo.train import train_dit

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
SHARED = ROOT.parent / "shared"


def golden(name: str) -> dict:
    """A file of published outputs, copied from the project's shared folder."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def seeded_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix or bias that stands for `name` in the golden files (their rule for plain weights and biases)."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    scale = 0.1 if len(shape) == 1 else 1 / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy((scale * random.standard_normal(shape)).astype(np.float32))


def seeded_state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """The golden classifiers' state dictionary: each tensor from its name (their rules for every kind of tensor)."""
    state = {}
    for name, shape in shapes.items():
        random = np.random.RandomState(zlib.crc32(name.encode()))
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(shape, dtype=torch.int64)
        elif name.endswith(("running_var", "gamma")):
            state[name] = torch.from_numpy((0.5 + random.random_sample(shape)).astype(np.float32))
        elif len(shape) == 1:
            value = 0.1 * random.standard_normal(shape) + (1.0 if name.endswith("weight") else 0.0)
            state[name] = torch.from_numpy(value.astype(np.float32))
        else:
            state[name] = seeded_weight(name, tuple(shape))
    return state


def seeded_input(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """The golden files' standard-normal input."""
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter and running statistic a random value: a fresh adaLN-Zero model outputs zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("pos_embed") or not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator) * 0.3 / max(1.0, tensor[0].numel() ** 0.5)
        if name.endswith("running_var"):
            noise = 0.5 + noise.abs()
        elif "norm" in name and name.endswith("weight"):
            noise = 1 + noise
        tensor.copy_(noise)
    return model


def tiny_model(family: str = "D-EMOv2", **overrides) -> torch.nn.Module:
    """A real model of a few thousand parameters, randomised, in eval mode."""
    config = {
        "sample_size": 16,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
        "num_classes": 10,
    }
    return randomize(create_model(f"{family}-S-2", **{**config, **overrides})).eval()


def dit_scheduler(**overrides) -> DDPMScheduler:
    """DiT's sampler."""
    config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "variance_type": "learned_range",
              "clip_sample": False, "timestep_spacing": "linspace"}  # fmt: skip
    return DDPMScheduler(**{**config, **overrides})


def tiny_pipeline(flow: bool = False, **overrides) -> DEMOPipeline:
    """A pixel-space pipeline around `tiny_model`, three named classes."""
    objective = {"learn_sigma": False, "prediction_type": "flow_prediction"} if flow else {}
    model = tiny_model(**{"in_channels": 3, "num_classes": 3, **objective, **overrides})
    names = {0: "tench, Tinca tinca", 1: "crane, bird", 2: "crane, machine"}
    pipeline = DEMOPipeline(
        model,
        FlowMatchEulerDiscreteScheduler() if flow else dit_scheduler(),
        id2label=names if model.config.num_classes else None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def shared() -> Path:
    """The project's shared folder; tests that need it are skipped where it is missing."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared")
    return SHARED


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
    code = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{script}"
    process = psutil.Popen([sys.executable, "-c", code], env=offline_environment())
    try:
        while not condition():
            assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait(30)


def run_here(
    capsys: pytest.CaptureFixture, *arguments: object, main: Callable[[list[str]], None] = train_dit.main
) -> tuple[object, str]:
    """Run a command's `main` in this process; what it exits with (0 for success) and all that it printed."""
    AcceleratorState._reset_state(True)
    code: object = 0
    try:
        with use_backend(chosen_backend()):  # undoes --kernels
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


@pytest.fixture
def offline(monkeypatch):
    """Never ask the Hub."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
