"""From options to everything a classifier's run needs: data, network, optimizer, schedule, what is saved."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import AutoImageProcessor, TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from d_emo.classification.transformers_models import (
    NETWORK_ARGUMENTS,
    EMOv2Config,
    EMOv2ForImageClassification,
    make_image_processor,
)
from d_emo.common.messages import first_line
from d_emo.common.options import blamed
from d_emo.common.packaged import model_place
from d_emo.common.saved_folders import CLASSIFIER, refuse_nobodys, refuse_other_tasks
from d_emo.images.source import ImageSource
from d_emo.models.flops import count_macs_on
from d_emo.train.classification.config import ClassifierConfig
from d_emo.train.engine.fit import time_of_training
from d_emo.train.engine.memory import told, training_memory
from d_emo.train.engine.task_plan import TaskPlan, named_start, resolved_length, start_name

TIMM = "timm:"
# Images up to this side are shown at twice their size: the networks halve the grid five times.
SMALL_SIDE = 64
RESOLUTION = 224
# timm's optimizers whose state is counted; others look at values or compile code on their first step.
COUNTED = ("adam", "adamw", "lamb", "lion", "momentum", "nadamw", "rmsprop", "rmsproptf", "sgd")


@dataclass(frozen=True, kw_only=True)
class ClassifierPlan(TaskPlan):
    """A run, resolved: no option is left at "default".

    Attributes:
        resolution: image side in pixels.
        flip: whether images are mirrored at random.
    """

    config: ClassifierConfig
    source: ImageSource
    validation: ImageSource | None
    resolution: int
    flip: bool

    @property
    def model_name(self) -> str:
        """What to call the model."""
        return model_name(self.config)

    def build_model(self) -> Any:
        """The network as a classifier of transformers, with fresh weights or those of --init-from.

        Raises:
            ValueError: no such network, or overrides that it does not take.
        """
        names = self.source.id2label
        labels: dict[str, Any] = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        options = self.config.model
        if options.init_from:
            return start_from(options.init_from, labels, self.resolution)
        try:
            if options.model.startswith(TIMM):
                name = options.model.removeprefix(TIMM)
                config = TimmWrapperConfig(architecture=name, model_args=options.overrides() or None, **labels)
                return TimmWrapperForImageClassification(config)
            overrides = options.overrides()
            unknown = [name for name in overrides if name not in NETWORK_ARGUMENTS]
            if unknown:
                raise ValueError(f"--model-config has {unknown}; choose from {', '.join(NETWORK_ARGUMENTS)}.")
            return EMOv2ForImageClassification(EMOv2Config.of(options.model, self.resolution, **labels, **overrides))
        except (ValueError, TypeError, RuntimeError, ImportError) as error:
            raise ValueError(f"--model {options.model}: {first_line(error)}") from error

    def make_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        """See `make_classifier_optimizer`."""
        return make_classifier_optimizer(model, self)

    def make_schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """See `make_classifier_schedule`."""
        return make_classifier_schedule(optimizer, self)

    def identity(self) -> dict[str, Any]:
        """See `TaskPlan`; with the images' size."""
        return {**super().identity(), "resolution": self.resolution, "random_flip": self.flip}

    def lines(self, model: Any) -> dict[str, str]:
        """See `TaskPlan.lines`."""
        macs = count_macs_on(model, torch.zeros(1, 3, self.resolution, self.resolution))
        duration = time_of_training(macs, self.max_train_steps * self.layout.global_batch_size, self.launch)
        return {
            "model": ", ".join(filter(None, [f"{macs / 1e6:.1f} MMACs an image (forward)", duration])),
            "data": f"{self.resolution} x {self.resolution}, {'' if self.flip else 'not '}mirrored at random",
            "augment": self.config.augmentation.describe(),
            "teacher": self.config.distillation.describe(),
            "memory": told(lambda: self.describe_memory(model.train())),
        }

    def describe_optimizer(self) -> str:
        """See `TaskPlan.describe_optimizer`."""
        options = self.config.optimization
        return (
            f"{options.optimizer}, learning rate {options.learning_rate:g} ({options.lr_decay} after "
            f"{self.warmup_steps:,} steps of warm-up), decay {options.weight_decay:g}, averaging {options.ema_decay}"
        )

    def describe_memory(self, model: Any) -> str:
        """What a step of the network holds, for people."""
        optimizer, batch, side = self.config.optimization.optimizer, self.layout.micro_batch_size, self.resolution
        counted = optimizer in COUNTED
        memory = training_memory(
            model,
            self.launch,
            (lambda module: make_classifier_optimizer(module, self)) if counted else None,
            lambda: model(torch.empty(batch, 3, side, side, memory_format=torch.channels_last)).logits,
        )
        missing = [] if counted else [f"{optimizer}'s state"]
        if self.config.distillation.teacher:
            missing.append("the teacher")
        without = f"; without {' and '.join(missing)}" if missing else ""
        return memory.describe(optimizer, f"micro batch {batch}{without}")


def make_classifier_plan(
    config: ClassifierConfig, source: ImageSource, validation: ImageSource | None, accelerator: Accelerator
) -> ClassifierPlan:
    """Resolve every default and check that the parts fit.

    Raises:
        ValueError: they do not; the message names the option and the remedy.
    """
    if len(source.id2label) < 2:
        count = len(source.id2label)
        raise ValueError(
            f"the images of {source.name} are of {count or 'no'} class{'' if count == 1 else 'es'}; a classifier needs "
            "two or more: name a folder of class folders (--train-data-dir), or the column of classes (--label-column)."
        )
    warmup, epochs = config.optimization.warmup_epochs, config.run.epochs
    # In proportion, so that --max-train-steps shortens both.
    length = resolved_length(config, source, accelerator, lambda steps, epoch: round(steps * warmup / epochs))
    layout = length["layout"]
    if layout.micro_batch_size % 2 and (config.augmentation.mixup or config.augmentation.cutmix):
        raise ValueError(f"--mixup and --cutmix pair images: {layout.describe()} at once is odd; use an even number.")
    small = source.resolution <= SMALL_SIDE
    resolution = config.model.resolution or (2 * source.resolution if small else RESOLUTION)
    return ClassifierPlan(
        config=config,
        source=source,
        validation=validation,
        resolution=resolution,
        flip=source.flip if config.data.random_flip is None else config.data.random_flip,
        processor=make_processor(config, resolution),
        output_dir=output_dir(config, source),
        **length,
    )


def make_processor(config: ClassifierConfig, resolution: int) -> Any:
    """The image processor that is saved; with --init-from its mean and deviation are kept."""
    processor = make_image_processor(resolution, config.augmentation.validation_crop)
    if config.model.init_from:
        with blamed(named_start(config.model), OSError):
            former: Any = AutoImageProcessor.from_pretrained(model_place(config.model.init_from))
        processor.image_mean, processor.image_std = list(former.image_mean), list(former.image_std)
    return processor


def start_from(name: str, labels: dict[str, Any], resolution: int) -> EMOv2ForImageClassification:
    """Trained weights for a new task: a fresh head where the classes differ.

    Args:
        name: see `model_place`.
        labels: `id2label` and `label2id` of the new task.
        resolution: image side in pixels; the windows stay as they were trained.

    Raises:
        ValueError: it does not load, or is no EMOv2.
    """
    place = model_place(name)
    with blamed(f"--init-from {name}"):
        refuse_other_tasks(place, CLASSIFIER)
    try:
        refuse_nobodys(place)
        model = EMOv2ForImageClassification.from_pretrained(place, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"--init-from {name} does not load as EMOv2 ({first_line(error)}).") from error
    if model.config.id2label != labels["id2label"]:
        model.emov2.reset_classifier(len(labels["id2label"]))
        model.config.id2label, model.config.label2id = labels["id2label"], labels["label2id"]
    model.config.image_size = resolution
    return model


def model_name(config: ClassifierConfig) -> str:
    """--model, or what --init-from is called."""
    return start_name(config.model).removeprefix(TIMM)


def output_dir(config: ClassifierConfig, source: ImageSource) -> Path:
    """Where the run is written."""
    return config.run.folder(model_name(config), source.name)


def make_classifier_optimizer(model: torch.nn.Module, plan: ClassifierPlan) -> torch.optim.Optimizer:
    """timm's optimizer of that name; vectors (norms, biases, layer scale) do not decay.

    Raises:
        ValueError: timm does not know it.
    """
    from timm.optim import create_optimizer_v2

    options = plan.config.optimization
    more: dict[str, Any] = (
        {"betas": (options.adam_beta1, options.adam_beta2), "fused": True} if options.optimizer == "adamw" else {}
    )
    try:
        return create_optimizer_v2(
            model, options.optimizer, options.learning_rate, options.weight_decay, eps=options.adam_eps, **more
        )
    except (ValueError, AssertionError, TypeError) as error:
        raise ValueError(f"--optimizer {options.optimizer}: {first_line(error)}.") from error


def make_classifier_schedule(
    optimizer: torch.optim.Optimizer, plan: ClassifierPlan
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then a cosine or steps; counts optimizer steps."""
    options, warmup = plan.config.optimization, plan.warmup_steps
    if options.lr_decay == "cosine":
        return get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
            optimizer,
            warmup,
            plan.max_train_steps,
            min_lr_rate=options.min_lr_ratio,
            warmup_lr_rate=options.warmup_lr_ratio,
        )
    interval = max(1, round(plan.max_train_steps * options.decay_epochs / plan.config.run.epochs))

    def factor(step: int) -> float:
        if step < warmup:
            return options.warmup_lr_ratio + (1 - options.warmup_lr_ratio) * step / warmup
        return options.decay_rate ** ((step - warmup) // interval)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
