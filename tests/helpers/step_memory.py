"""What training steps of a model take of a process of their own, beside what was counted before: two numbers in MiB.

    python tests/helpers/step_memory.py D-EMOv2-S-2 8                  a micro batch of 8, 32 x 32 x 4
    python tests/helpers/step_memory.py D-EMOv2-S-2 8 checkpointing    with gradient checkpointing
    python tests/helpers/step_memory.py D-EMOv2-S-2 8 apart            each tensor in pages of its own, without gaps

The first number is what was counted.
"""

import ctypes
import sys

import torch

from d_emo import create_model
from d_emo.common.processes import keep_freed_memory
from d_emo.eval.benchmarks.peak_memory import PeakMemory
from d_emo.train.diffusion.config import OptimizationOptions
from d_emo.train.diffusion.optimizer import make_optimizer
from d_emo.train.engine.averaging import WeightAverage
from d_emo.train.engine.memory import Launch, TrainingMemory, training_memory

OPTIONS = OptimizationOptions()
CPU = torch.device("cpu")


def noisy_batch(model: torch.nn.Module, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Zeros that a model of diffusion takes."""
    latents = torch.zeros(batch, model.config.in_channels, *model.sample_shape)
    return latents, torch.zeros(batch), torch.zeros(batch, dtype=torch.long)


def output(model: torch.nn.Module, batch: int) -> torch.Tensor:
    """What it makes of them."""
    return model(*noisy_batch(model, batch), return_dict=False)[0]


def counted(model: torch.nn.Module, batch: int, launch: Launch = Launch(CPU)) -> TrainingMemory:  # noqa: B008
    """What the trainer's plan says of a step."""
    return training_memory(model, launch, lambda module: make_optimizer(module, OPTIONS), lambda: output(model, batch))


def train(name: str, batch: int, checkpointing: bool, steps: int = 2, **overrides: object) -> None:
    """Build what a run has and take steps of two micro batches each."""
    model = create_model(name, **overrides).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    average, optimizer = WeightAverage(model, OPTIONS), make_optimizer(model, OPTIONS)
    for _ in range(steps):
        for _ in range(2):
            output(model, batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)


def main(name: str, batch: str, *more: str) -> None:
    """Print what was counted and what the process took."""
    checkpointing = "checkpointing" in more
    with torch.device("meta"):
        model = create_model(name).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    total = counted(model, int(batch)).total
    train("-".join([*name.split("-")[:-1], "8"]), 1, checkpointing, num_layers=1)  # libraries and kernels are loaded
    if "apart" in more:
        m_mmap_threshold = -3  # malloc.h
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 2**15)
    else:
        keep_freed_memory()  # as the trainers do
    with PeakMemory(CPU) as peak:
        train(name, int(batch), checkpointing)
    print(f"{total / 2**20:.0f} {peak.mib:.0f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
