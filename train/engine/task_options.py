"""The options that the trainers of classifiers, segmenters, detectors and video classifiers have in common."""

from dataclasses import dataclass
from typing import Literal

from d_emo.common.options import below_one, option, positive, require, up_to_one, zero_or_more
from d_emo.train.engine.options import RunOptions, StepOptions
from d_emo.train.engine.weight_decay import NORMS, undecayed


@dataclass(frozen=True, kw_only=True)
class TaskOptimizationOptions(StepOptions):
    """AdamW with rates and decay by parameter name, and a schedule in parts of the run."""

    learning_rate: float = option(1.2e-4, "The highest learning rate.")
    lr_multipliers: str | None = option(
        None, "Other rates by the beginning of a parameter's name: decode_head.=10 is ten times that. Commas between."
    )
    weight_decay: float = option(0.05, "AdamW's decay.")
    no_weight_decay: str | None = option(
        NORMS,
        "Parameters that do not decay: parts of their names, with commas between; 'vectors' are all norms, biases and "
        "layer scales.",
    )
    adam_beta1: float = option(0.9, "AdamW's first beta.")
    adam_beta2: float = option(0.999, "AdamW's second beta.")
    lr_warmup_steps: int = option(500, "Linear warm-up in optimizer steps, at most a quarter of the run.")
    lr_warmup_ratio: float = option(1e-5, "Where the warm-up starts, as a share of the learning rate.")
    lr_decay: Literal["constant", "cosine"] = option("cosine", "What the learning rate does later on.")
    lr_decay_start: float = option(0.5, "cosine: where it begins to fall, as a share of the run.")
    lr_decay_end: float = option(1.0, "cosine: where it would be down, as a share of the run; may be above 1.")
    lr_decay_unit: Literal["step", "epoch"] = option("step", "cosine: whether it falls every step or every epoch.")
    min_lr_ratio: float = option(0.0, "cosine: where it ends, as a share of the learning rate.")
    max_grad_norm: float | None = option(0.1, "Clip the gradient's norm to this; 0 is no clipping.")
    ema_decay: float = option(
        0.0, "Decay of the averaged weights and buffers, once an optimizer step. 0, as published: the last weights."
    )

    def __post_init__(self):
        positive(self, "learning_rate")
        below_one(self, "adam_beta1", "adam_beta2", "ema_decay")
        up_to_one(self, "lr_warmup_ratio", "min_lr_ratio", "lr_decay_start")
        zero_or_more(self, "weight_decay", "lr_warmup_steps", "max_grad_norm")
        require(
            self.lr_decay_end > self.lr_decay_start,
            "lr_decay_end",
            self.lr_decay_end,
            f"must be above --lr-decay-start {self.lr_decay_start:g}",
        )
        self.multipliers()

    def asked_warmup(self, steps: int, epoch: float) -> int:
        """Steps of warm-up of a run of so many steps, of which an epoch has `epoch`."""
        return self.lr_warmup_steps

    def multipliers(self) -> dict[str, float]:
        """--lr-multipliers, read: factors by the beginning of a name.

        Raises:
            ValueError: a part is no NAME=NUMBER, or a number is not positive.
        """
        found = {}
        for part in filter(None, (self.lr_multipliers or "").split(",")):
            name, _, number = part.strip().partition("=")
            try:
                factor = float(number)
            except ValueError:
                factor = float("nan")
            require(
                bool(name) and 0 < factor < float("inf"),
                "lr_multipliers",
                self.lr_multipliers,
                "expected NAME=NUMBER with commas between, such as decode_head.=10",
            )
            found[name] = factor
        return found

    def undecayed(self) -> list[str]:
        """--no-weight-decay, read: parts of names."""
        return undecayed(self.no_weight_decay)


@dataclass(frozen=True, kw_only=True)
class TaskRunOptions(RunOptions):
    """Length and validation."""

    epochs: float = option(50.0, "Passes over the training samples.", "max_train_steps")
    max_train_steps: int | None = option(None, "Optimizer steps in place of --epochs.")
    global_batch_size: int = option(16, "Samples an optimizer step, over all processes.")
    validate_every: int | None = option(None, "Steps between two validations. Default: an epoch.")

    def __post_init__(self):
        super().__post_init__()
        positive(self, "epochs", "max_train_steps", "validate_every")
