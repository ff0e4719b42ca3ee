"""A training run in progress, and the errors that end one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from d_emo.train.data.batches import StreamPlace
from d_emo.train.diffusion.on_track import PublishedLoss
from d_emo.train.engine.averaging import WeightAverage
from d_emo.train.engine.batch_norm import StepStatistics


class NonFiniteLossError(FloatingPointError):
    """Loss or gradient is NaN or infinite; raised before the weights change."""


class LoaderError(RuntimeError):
    """A process or thread that reads data failed."""


@dataclass(kw_only=True)
class TrainingRun:
    """The live parts of a run, whatever is trained.

    Attributes:
        plan: what is to be done; `Plan` or `ClassifierPlan`, of which the loop uses what they share: options, source,
            batch layout, output folder, number of steps.
        place: of this process in a stream; unused for data read by index.
        window: losses since the last log line.
        seconds: that these steps took, pauses for samples, scores and checkpoints aside.
        published: a published loss curve to compare with.
    """

    plan: Any
    accelerator: Accelerator
    model: torch.nn.Module
    average: WeightAverage
    optimizer: torch.optim.Optimizer
    statistics: StepStatistics
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    step: int = 0
    place: StreamPlace = field(default_factory=StreamPlace)
    window: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0
    published: PublishedLoss | None = None

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.plan.output_dir

    def say(self, message: str) -> None:
        """Print a line once, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message)
