"""What the plans of classifiers, segmenters, detectors and video classifiers have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from d_emo.kernels import backend_report
from d_emo.models.flops import count_parameters
from d_emo.train.engine.batch_layout import BatchLayout, batch_layout
from d_emo.train.engine.fit import fitting_warmup, steps_of_epochs
from d_emo.train.engine.memory import Launch
from d_emo.train.engine.plan import RunConfig, TrainingData
from d_emo.train.engine.task_optimizer import make_optimizer, rate_factor
from d_emo.train.engine.task_options import TaskOptimizationOptions, TaskRunOptions

# Of a size that --init-from names.
A_SIZE = "that is a size, whose weights are fresh; name it as --model, or a trained one's folder."


class ModelOptions(Protocol):
    """What any task's network starts from."""

    @property
    def model(self) -> str:
        """A size's name, or another network's."""

    @property
    def init_from(self) -> str | None:
        """Trained weights."""


class TaskConfig(RunConfig, Protocol):
    """A trainer's options, of which those of the run are all tasks'."""

    @property
    def run(self) -> TaskRunOptions:
        """Batch, length, output."""


@dataclass(frozen=True, kw_only=True)
class TaskPlan(ABC):
    """A run, resolved: no option is left at "default".

    Attributes:
        source: to train on.
        validation: to validate on, with the same classes; None for none.
        processor: prepares samples for validation and use.
        max_train_steps: optimizer steps in all.
        warmup_steps: of them.
        validate_every: steps.
        launch: what it is computed on.
    """

    config: Any
    source: Any
    validation: Any
    layout: BatchLayout
    processor: Any
    output_dir: Path
    max_train_steps: int
    warmup_steps: int
    validate_every: int
    launch: Launch

    @property
    @abstractmethod
    def model_name(self) -> str:
        """What to call the model."""

    @abstractmethod
    def build_model(self) -> Any:
        """The network, with fresh weights or those of --init-from, frozen as it is trained."""

    @abstractmethod
    def lines(self, model: Any) -> dict[str, str]:
        """What is to be said of this task's runs, by topic; also more of "model" and "data" than of any task's."""

    def identity(self) -> dict[str, Any]:
        """What decides a run's results: its options with defaults resolved, and its data."""
        return {
            **self.config.flat(),
            "lr_schedule_steps": self.max_train_steps,
            "warmup_steps": self.warmup_steps,
            **self.source.identity(),
        }

    def make_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """See `task_optimizer.make_optimizer`."""
        return make_optimizer(model, self.config.optimization)

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """See `task_optimizer.rate_factor`."""
        epoch = self.source.size / self.layout.global_batch_size
        factor = rate_factor(self.config.optimization, self.max_train_steps, self.warmup_steps, epoch)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def describe_optimizer(self) -> str:
        """How weights change, for people."""
        options: TaskOptimizationOptions = self.config.optimization
        rates = f", but {options.lr_multipliers}" if options.lr_multipliers else ""
        fall = f" from {options.lr_decay_start:.0%} of the run on" if options.lr_decay == "cosine" else ""
        return (
            f"adamw, learning rate {options.learning_rate:g}{rates} ({self.warmup_steps:,} steps of warm-up, "
            f"{options.lr_decay}{fall}), decay {options.weight_decay:g}, averaging {options.ema_decay:g}"
        )

    def describe(self) -> str:
        """What would run, for people."""
        model, size = self.build_model(), self.source.size
        seen = self.max_train_steps * self.layout.global_batch_size
        learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        length = [f"{self.max_train_steps:,} steps", f"{seen / size:,.1f} epochs" if size else "", f"{seen:,} samples"]
        lines = {
            "model": f"{self.model_name}: {count_parameters(model):,} parameters, {learning:,} of them learn",
            "data": f"{self.source.name}: {self.source.describe_size()}, {len(self.source.id2label)} classes",
            "validation": f"{self.validation.name}: {self.validation.describe_size()}, every {self.validate_every:,} "
            "steps"
            if self.validation is not None
            else "none (--validation-dir, --validation-dataset, --validation-split or --validation-share)",
        }
        for topic, text in self.lines(model).items():
            lines[topic] = ", ".join(filter(None, [lines.get(topic), text]))
        lines |= {
            "optimizer": self.describe_optimizer(),
            "batch": self.layout.describe(),
            "length": ", ".join(filter(None, length)),
            "kernels": backend_report(self.launch.device),
            "output": str(self.output_dir),
        }
        return "\n".join(f"  {name:<10} {value}" for name, value in lines.items())


def named_start(options: ModelOptions) -> str:
    """What a network starts from, as the user named it."""
    return f"--init-from {options.init_from}" if options.init_from else f"--model {options.model}"


def start_name(options: ModelOptions) -> str:
    """What a network starts from, for the names of its run: --model, or the folder or file of --init-from."""
    if not options.init_from:
        return options.model
    path = Path(options.init_from)
    return path.stem if path.is_file() else path.name


def refuse_bfloat16_on_cpu(accelerator: Accelerator, convolutions: str, what: str = "training") -> None:
    """Refuse a run in bfloat16 on a CPU, for convolutions whose gradients PyTorch 2.14 leaves undefined there.

    Raises:
        ValueError: it would be such a run.
    """
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu":
        raise ValueError(
            f"{what} in bfloat16 on a CPU: {convolutions} have undefined gradients there; use --mixed-precision no (of "
            "a run that is gone on with also --allow-change mixed_precision)."
        )


def resolved_length(
    config: TaskConfig,
    source: TrainingData,
    accelerator: Accelerator,
    asked_warmup: Callable[[int, float], int],
) -> dict[str, Any]:
    """The parts of a plan that follow from the length of the run and the launch.

    Args:
        config: the options.
        source: to train on.
        accelerator: of the run.
        asked_warmup: steps of the run and of an epoch -> steps of warm-up.

    Raises:
        ValueError: batch sizes do not fit each other, a stream is to be trained on for epochs, or the launch is
            sharded.
    """
    options, launch = config.run, Launch.of(accelerator)
    if launch.sharded:
        raise ValueError("accelerate launch with FSDP: these networks are small and not sharded; launch without FSDP.")
    layout = batch_layout(
        options.global_batch_size,
        options.micro_batch_size,
        accelerator.num_processes,
        accelerator.device.type == "cpu",
    )
    if options.max_train_steps is None and not source.size:
        raise ValueError(f"--max-train-steps is missing: {source.name} does not tell how many images an epoch has.")
    epoch = source.size / layout.global_batch_size
    steps = options.max_train_steps or steps_of_epochs(options.epochs, source.size, layout.global_batch_size)
    return {
        "layout": layout,
        "max_train_steps": steps,
        "warmup_steps": fitting_warmup(asked_warmup(steps, epoch), steps),
        "validate_every": options.validate_every or (max(1, round(epoch)) if source.size else options.checkpoint_every),
        "launch": launch,
    }
