"""A training run in progress, and the errors that end one."""

import shutil
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator

from d_emo.common.commands import CommandError
from d_emo.common.output import say, time_stamp
from d_emo.common.processes import hardware
from d_emo.train.data.batches import StreamPlace
from d_emo.train.engine.averaging import PowerAverage, WeightAverage
from d_emo.train.engine.batch_norm import StepStatistics
from d_emo.train.engine.cards import Circumstances
from d_emo.train.engine.finite import FiniteSteps
from d_emo.train.engine.plan import LossCurve, RunPlan, run_identity

# Beside the card.
CARD_PICTURE = "picture.png"

PlanT = TypeVar("PlanT", bound=RunPlan, covariant=True)


class NonFiniteLossError(CommandError):
    """Loss or gradient is NaN or infinite; raised before the weights change."""


class LoaderError(CommandError):
    """A process or thread that reads data failed."""


class UnfinishedError(CommandError):
    """What was computed is whole, but could not be brought where it should go; the message says how to do that."""


class Savable(Protocol):
    """A pipeline or another bundle that goes into a folder."""

    def save_pretrained(self, save_directory: Any) -> Any:
        """Write it."""


@dataclass(kw_only=True)
class Parts:
    """What every run trains: a model, its averages, and what changes them.

    Attributes:
        average: the one that is drawn from, scored and published.
        followed: those of which others are made later.
    """

    model: torch.nn.Module
    average: WeightAverage
    optimizer: torch.optim.Optimizer
    statistics: StepStatistics
    finite: FiniteSteps
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    followed: list[PowerAverage] = field(default_factory=list)

    @property
    def averages(self) -> list[WeightAverage]:
        """All of them."""
        return [self.average, *self.followed]


@dataclass(kw_only=True)
class TrainingRun(Parts, ABC, Generic[PlanT]):
    """The live parts of a run. A wing says what of it is published, and how.

    Attributes:
        plan: what is to be done.
        place: of this process in a stream; unused for data read by index.
        window: losses since the last log line.
        seconds: that these steps took, pauses for samples, scores and checkpoints aside.
        seconds_before: that the run took before it was continued.
        published: a published loss curve to compare with.
    """

    plan: PlanT
    accelerator: Accelerator
    step: int = 0
    place: StreamPlace = field(default_factory=StreamPlace)
    window: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0
    seconds_before: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    published: LossCurve | None = None

    @property
    def elapsed(self) -> float:
        """Seconds that the run took so far, all of it, without the time between an interruption and what continued."""
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.plan.output_dir

    def identity(self) -> dict[str, Any]:
        """See `run_identity`."""
        return run_identity(self.plan, self.accelerator)

    @abstractmethod
    def result(self) -> Savable:
        """The averaged model of now, with what it takes to use it; every process calls this."""

    @abstractmethod
    def card(self, folder: Path) -> str:
        """The model card of the result, as it lies in a folder."""

    def logged(self) -> dict[str, torch.Tensor]:
        """What a line of the log has beside the loss since the last one: scalars by name, for screen and tracker."""
        return {}

    def save_state(self, folder: Path) -> None:
        """Write into a checkpoint's folder of state what else a continued run needs; every process calls this."""

    def save_more(self, folder: Path) -> None:
        """Write what belongs beside the result; the main process calls this."""
        picture = self.picture()
        if picture is not None:
            shutil.copyfile(picture, folder / CARD_PICTURE)

    def picture(self) -> Path | None:
        """What the card shows of this step, if there is something."""
        return None

    def circumstances(self, folder: Path, repository: str | None = None) -> Circumstances:
        """How the run went, for a card in a folder that may be sent to a repository."""
        return Circumstances(
            weights=repository or folder.as_posix(),
            step=self.step,
            seconds=self.elapsed,
            hardware=hardware(self.accelerator.device, self.accelerator.num_processes),
            picture=CARD_PICTURE if self.picture() is not None else None,
        )

    def say(self, message: str) -> None:
        """Print a line once, above the progress bar."""
        if self.accelerator.is_main_process:
            say(message)

    def report(self, message: str) -> None:
        """Print what happened at this step: a line with the time of day and the step of how many."""
        self.say(f"{time_stamp()} step {self.step}/{self.plan.max_train_steps}: {message}")


# A run of either wing, where its plan's kind does not matter.
AnyRun = TrainingRun[Any]
