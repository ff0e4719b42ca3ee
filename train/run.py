"""A training run in progress, and the errors that end one."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from d_emo.pipelines import DEMOPipeline
from d_emo.train.averaging import WeightAverage
from d_emo.train.batch_norm import StepStatistics
from d_emo.train.data import StreamPlace
from d_emo.train.in_loop_fid import InLoopFID
from d_emo.train.on_track import PublishedLoss
from d_emo.train.setup import Plan


class NonFiniteLossError(FloatingPointError):
    """Loss or gradient is NaN or infinite; raised before the weights change."""


class LoaderError(RuntimeError):
    """A process or thread that reads data failed."""


@dataclass
class Run:
    """The live parts of a training run."""

    plan: Plan
    accelerator: Accelerator
    model: torch.nn.Module
    average: WeightAverage
    optimizer: torch.optim.Optimizer
    statistics: StepStatistics
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    pipeline: DEMOPipeline
    published: PublishedLoss | None = None
    fid: InLoopFID | None = None
    repository: str | None = None  # of --push-to-hub
    step: int = 0
    place: StreamPlace = field(
        default_factory=StreamPlace
    )  # of this process in a stream; unused for data read by index
    window: list[torch.Tensor] = field(default_factory=list)  # losses since the last log line
    seconds: float = 0.0  # that these steps took, pauses for samples, scores and checkpoints aside

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.plan.output_dir

    def refresh_pipeline(self) -> None:
        """Bring the averaged weights into the pipeline, before it draws or is saved; every process calls this."""
        self.average.write_into(self.pipeline.transformer)

    def say(self, message: str) -> None:
        """Print a line once, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message)
