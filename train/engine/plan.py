"""What the engine needs to know of a resolved run, whatever is trained; the wings' plans and options fit in."""

from pathlib import Path
from typing import Any, ClassVar, Protocol

from accelerate import Accelerator

from d_emo.images.source import ImageStream
from d_emo.train.data.batches import SampleSource
from d_emo.train.data.options import LoaderOptions
from d_emo.train.engine.batch_layout import BatchLayout
from d_emo.train.engine.memory import Launch
from d_emo.train.engine.options import RunOptions


class TrainingData(SampleSource, Protocol):
    """What it is trained on, whatever a sample is; `ImageSource` is one."""

    @property
    def id2label(self) -> dict[int, str]:
        """Names of the classes by id."""

    @property
    def num_workers(self) -> int:
        """Default number of loader processes."""

    @property
    def stream(self) -> ImageStream | None:
        """What is read in place of an index."""

    def describe_size(self) -> str:
        """How much it is, for people."""

    def identity(self) -> dict[str, Any]:
        """What a run remembers of its data, to be resumed on the same."""


class OptimizationOptions(Protocol):
    """What the optimisation of all trainers has in common."""

    @property
    def mixed_precision(self) -> str | None:
        """Of autocast: "no", "bf16", or None for `make_accelerator`'s choice."""

    @property
    def max_grad_norm(self) -> float | None:
        """Gradients are clipped to this norm; None for no clipping."""

    @property
    def ema_decay(self) -> float:
        """Decay of the averages a step, in [0, 1)."""

    @property
    def ema_warmup(self) -> bool:
        """Let the decay grow to that."""


class RunConfig(Protocol):
    """A trainer's options, by group.

    Attributes:
        trainer: the command that they are of.
    """

    trainer: ClassVar[str]

    @property
    def data(self) -> LoaderOptions:
        """Where images come from."""

    @property
    def optimization(self) -> OptimizationOptions:
        """How weights change."""

    @property
    def run(self) -> RunOptions:
        """Batch and output."""

    def flat(self) -> dict[str, Any]:
        """Every option by name."""


class RunPlan(Protocol):
    """A run, resolved: no option is left at "default"."""

    @property
    def config(self) -> RunConfig:
        """The options that it was made of."""

    @property
    def source(self) -> TrainingData:
        """What it is trained on."""

    @property
    def layout(self) -> BatchLayout:
        """How a global batch is shared."""

    @property
    def launch(self) -> Launch:
        """What it is computed on."""

    @property
    def output_dir(self) -> Path:
        """The run's folder."""

    @property
    def max_train_steps(self) -> int:
        """Optimizer steps in all."""

    @property
    def model_name(self) -> str:
        """What to call the model."""

    def identity(self) -> dict[str, Any]:
        """What decides the run's results: its options with defaults resolved, and its data."""

    def describe(self) -> str:
        """What would run, for people."""


def run_identity(plan: RunPlan, accelerator: Accelerator) -> dict[str, Any]:
    """What decides a run's results: the trainer, the plan's, and the precision, which a launch may choose."""
    own = {"trainer": plan.config.trainer, "mixed_precision": accelerator.mixed_precision}
    return {**plan.identity(), **own}


class LossCurve(Protocol):
    """A loss to hold a run against."""

    def mean(self, first: int, last: int) -> float | None:
        """Mean over the steps after `first` up to `last`; None where the curve has none."""
