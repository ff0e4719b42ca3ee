"""Every option of the classification trainer, once; `engine.options` and `data.options` have those of all trainers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from d_emo.common.options import (
    OptionTable,
    Recipe,
    below_one,
    json_table,
    option,
    parse_options,
    positive,
    require,
    up_to_one,
    zero_or_more,
)
from d_emo.train.data.options import DataOptions, ValidationOptions, digits_recipe
from d_emo.train.engine.options import KERNELS_HELP, StepOptions, options_of_run
from d_emo.train.engine.task_options import TaskRunOptions


@dataclass(frozen=True, kw_only=True)
class ClassifierOptions:
    """What is trained."""

    model: str = option("EMOv2-5M", "Name of d_emo.list_classifiers(), or timm:NAME for any network of timm.")
    init_from: str | None = option(
        None, "Start from a trained EMOv2 (folder or Hub id), --model aside; the head is new where the classes differ."
    )
    model_config: str | None = option(
        None, 'Overrides of the network as JSON, such as {"attention_type": "remote", "drop_path": 0.1}.'
    )
    resolution: int | None = option(
        None, "Image side in pixels. Default: 224, or twice the side of images of up to 64 pixels."
    )
    compile: bool = option(False, "torch.compile the network.")
    kernels: Literal["auto", "reference", "native"] | None = option(None, KERNELS_HELP)

    def __post_init__(self):
        require(self.resolution is None or self.resolution >= 32, "resolution", self.resolution, "must be 32 or more")
        require(
            not (self.init_from and self.overrides()),
            "model_config",
            self.model_config,
            "the network of --init-from is what it is; leave one of them out",
        )

    def overrides(self) -> dict[str, Any]:
        """--model-config, read.

        Raises:
            ValueError: it is no JSON object.
        """
        return json_table(self, "model_config", '{"drop_path": 0.1}')


@dataclass(frozen=True, kw_only=True)
class ClassifierDataOptions(ValidationOptions, DataOptions):
    """What it is trained and validated on."""

    def __post_init__(self):
        super().__post_init__()
        require(not self.latents, "latents", self.latents, "classifiers are trained on images")
        require(not self.unconditional, "unconditional", self.unconditional, "classifiers need classes")


@dataclass(frozen=True, kw_only=True)
class AugmentationOptions:
    """What becomes of a training image; timm's transforms. Every draw is a function of (seed, position)."""

    crop: Literal["resized", "padded", "center"] = option(
        "resized", "resized: a random area. padded: shifted by up to an eighth, for small images. center: fixed."
    )
    crop_scale_min: float = option(0.08, "resized: smallest area, as a share of the image.")
    crop_ratio: float | None = option(
        None, "Validation: side of the centre crop over the short side. Default: 0.875, with other crops 1."
    )
    crop_interpolation: Literal["bicubic", "bilinear", "random"] = option(
        "bicubic", "resized: how crops are resized. random: bilinear or bicubic, drawn an image."
    )
    auto_augment: str | None = option("rand-m9-mstd0.5-inc1", "timm's policy, or none.")
    color_jitter: float = option(0.4, "Brightness, contrast, saturation; as in timm it is off beside --auto-augment.")
    random_erasing: float = option(0.0, "Probability of erasing a rectangle (pixel noise).")
    mixup: float = option(0.0, "Alpha of mixup; 0 is off.")
    cutmix: float = option(0.0, "Alpha of CutMix; 0 is off.")
    label_smoothing: float = option(0.1, "Share of the target that is spread over all classes.")

    def __post_init__(self):
        below_one(self, "random_erasing", "label_smoothing")
        for name in ("mixup", "cutmix", "color_jitter"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 (off) or more")
        for name in ("crop_scale_min", "crop_ratio"):
            value = getattr(self, name)
            require(value is None or 0 < value <= 1, name, value, "must be in (0, 1]")

    def describe(self) -> str:
        """What is on, for people."""
        mixing = [
            f"{name} {getattr(self, name):g}"
            for name in ("random_erasing", "mixup", "cutmix", "label_smoothing")
            if getattr(self, name)
        ]
        return ", ".join([f"{self.crop} crop", self.policy or "no policy", *mixing])

    @property
    def policy(self) -> str | None:
        """timm's policy, None for none."""
        return None if self.auto_augment in (None, "none") else self.auto_augment

    @property
    def validation_crop(self) -> float:
        """Side of the validation crop over the resized image's short side."""
        return self.crop_ratio or (0.875 if self.crop == "resized" else 1.0)


@dataclass(frozen=True, kw_only=True)
class DistillationOptions:
    """Soft distillation: the teacher sees what the student sees, normalised as it was trained."""

    teacher: str | None = option(
        None, "timm:NAME (timm's weights), timm:local-dir:FOLDER, or a transformers classifier (folder or Hub id)."
    )
    teacher_weight: float = option(1.0, "The loss is cross-entropy + this times tau^2 KL(teacher, student).")
    teacher_tau: float = option(1.0, "Temperature tau of both.")
    teacher_resolution: int | None = option(
        None, "Side that the teacher's images are resized to. Default: as they are."
    )

    def __post_init__(self):
        zero_or_more(self, "teacher_weight")
        positive(self, "teacher_tau", "teacher_resolution")

    def describe(self) -> str:
        """The teacher, for people."""
        return f"{self.teacher}, weight {self.teacher_weight:g}, tau {self.teacher_tau:g}" if self.teacher else "none"


@dataclass(frozen=True, kw_only=True)
class ClassifierOptimizationOptions(StepOptions):
    """The optimizer. The defaults are the paper's, for batches of 1024."""

    optimizer: str = option("adamw", "A name of timm's optimizers.")
    learning_rate: float = option(1.5e-3, "The highest learning rate.")
    weight_decay: float = option(0.05, "The decay; never of norms, biases and layer scale.")
    adam_beta1: float = option(0.9, "AdamW's first beta.")
    adam_beta2: float = option(0.999, "AdamW's second beta.")
    adam_eps: float = option(1e-8, "The optimizer's epsilon.")
    lr_decay: Literal["cosine", "step"] = option("cosine", "How the learning rate falls after the warm-up.")
    decay_epochs: float = option(2.4, "step: epochs between two falls.")
    decay_rate: float = option(0.97, "step: what it is multiplied by.")
    warmup_epochs: float = option(20.0, "Linear warm-up, part of --epochs and at most a quarter of them.")
    warmup_lr_ratio: float = option(1 / 6000, "Where the warm-up starts, as a share of the learning rate.")
    min_lr_ratio: float = option(1 / 6000, "Where the cosine ends, as a share of the learning rate.")
    max_grad_norm: float | None = option(5.0, "Clip the gradient's norm to this; 0 is no clipping.")
    ema_decay: float = option(0.9998, "Decay of the averaged weights and buffers, once an optimizer step.")

    def __post_init__(self):
        positive(self, "learning_rate", "decay_epochs")
        below_one(self, "adam_beta1", "adam_beta2", "ema_decay")
        zero_or_more(self, "warmup_epochs", "weight_decay", "adam_eps", "max_grad_norm")
        up_to_one(self, "warmup_lr_ratio", "min_lr_ratio")
        require(0 < self.decay_rate <= 1, "decay_rate", self.decay_rate, "must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class ClassifierRunOptions(TaskRunOptions):
    """The classification trainer's length."""

    epochs: float = option(300.0, "Passes over the training images.", "max_train_steps")
    max_train_steps: int | None = option(None, "Optimizer steps in place of --epochs; streams of unknown size need it.")
    global_batch_size: int = option(1024, "Images an optimizer step, over all processes.")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig(OptionTable):
    """The classification trainer's options."""

    trainer: ClassVar[str] = "train_classifier"
    model: ClassifierOptions = field(default_factory=ClassifierOptions)
    data: ClassifierDataOptions = field(default_factory=ClassifierDataOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    distillation: DistillationOptions = field(default_factory=DistillationOptions)
    optimization: ClassifierOptimizationOptions = field(default_factory=ClassifierOptimizationOptions)
    run: ClassifierRunOptions = field(default_factory=ClassifierRunOptions)


def parse_classifier_config(
    arguments: list[str], about: str = "Train EMOv2 or any network of timm."
) -> ClassifierConfig:
    """Read the command line and, under it, the YAML file that --config names; see `parse_options`.

    Under both lie a resumed run's own options, or without a source of data the digits' recipe.
    """

    def beneath(given: Mapping[str, Any]) -> Recipe | Mapping[str, Any] | None:
        return options_of_run(ClassifierConfig.trainer, given) or digits_recipe("classifier/digits.yaml", given)

    return parse_options(arguments, ClassifierConfig, ClassifierConfig.trainer, about, beneath)
