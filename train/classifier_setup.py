"""From options to everything a classifier's run needs: data, network, optimizer, schedule, what is saved."""

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoImageProcessor, TimmWrapperConfig, TimmWrapperForImageClassification
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate

from d_emo.flops import count_macs_on, count_parameters
from d_emo.images import ImageSource, first_line
from d_emo.kernels import backend_report
from d_emo.models.emov2_transformers import EMOv2Config, EMOv2ForImageClassification, make_image_processor
from d_emo.train.batches import BatchLayout, batch_layout
from d_emo.train.classifier_config import ClassifierConfig, ClassifierDataOptions, ClassifierOptimizationOptions
from d_emo.train.data import load_source

TIMM = "timm:"
# Images up to this side are shown at twice their size: the networks halve the grid five times.
SMALL_SIDE = 64
RESOLUTION = 224
DIGITS_SHARE = 0.2


@dataclass(frozen=True)
class ClassifierPlan:
    """A run, resolved: no option is left at "default".

    Attributes:
        source: training images.
        validation: images to validate on, with the same class ids; None for none.
        resolution: image side in pixels.
        flip: whether images are mirrored at random.
        processor: prepares images for validation and use.
        max_train_steps: optimizer steps in all.
        warmup_steps: of them.
        validate_every: steps.
    """

    config: ClassifierConfig
    source: ImageSource
    validation: ImageSource | None
    layout: BatchLayout
    resolution: int
    flip: bool
    processor: Any
    output_dir: Path
    max_train_steps: int
    warmup_steps: int
    validate_every: int
    device: torch.device

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
        labels = {"id2label": names, "label2id": {name: number for number, name in names.items()}}
        options = self.config.model
        if options.init_from:
            return start_from(options.init_from, labels)
        try:
            if options.model.startswith(TIMM):
                name = options.model.removeprefix(TIMM)
                config = TimmWrapperConfig(architecture=name, model_args=options.overrides() or None, **labels)
                return TimmWrapperForImageClassification(config)
            return EMOv2ForImageClassification(
                EMOv2Config.of(options.model, self.resolution, **labels, **options.overrides())
            )
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"--model {options.model}: {first_line(error)}") from error

    def identity(self) -> dict[str, Any]:
        """What decides a run's results: its options with defaults resolved, and its data."""
        return {
            **self.config.flat(),
            "lr_schedule_steps": self.max_train_steps,
            "warmup_steps": self.warmup_steps,
            "resolution": self.resolution,
            "random_flip": self.flip,
            "data": self.source.name,
            "data_size": self.source.size,
            "data_fingerprint": self.source.fingerprint,
        }

    def describe(self) -> str:
        """What would run, for people."""
        config, layout, validation = self.config, self.layout, self.validation
        model = self.build_model()
        images = torch.zeros(1, 3, self.resolution, self.resolution)
        augmentation, optimization, distillation = config.augmentation, config.optimization, config.distillation
        mixing = [f"{name} {getattr(augmentation, name):g}" for name in ("random_erasing", "mixup", "cutmix")
                  if getattr(augmentation, name)]  # fmt: skip
        epochs = (
            f"{self.max_train_steps * layout.global_batch_size / self.source.size:,.1f} epochs, "
            if self.source.size
            else ""
        )
        lines = {
            "model": f"{self.model_name}: {count_parameters(model):,} parameters, "
            f"{count_macs_on(model, images) / 1e6:.1f} MMACs an image (forward)",
            "data": f"{self.source.name}: {self.source.describe_size()}, {len(self.source.id2label)} classes, "
            f"{self.resolution} x {self.resolution}, {'' if self.flip else 'not '}mirrored at random",
            "validation": f"{validation.name}: {validation.describe_size()}, every {self.validate_every:,} steps"
            if validation
            else "none (--validation-dir, --validation-dataset, --validation-split or --validation-share)",
            "augment": ", ".join(
                [
                    f"{augmentation.crop} crop",
                    augmentation.policy or "no policy",
                    *mixing,
                    f"label smoothing {augmentation.label_smoothing:g}",
                ]
            ),  # fmt: skip
            "optimizer": f"AdamW, learning rate {optimization.learning_rate:g} (cosine after {self.warmup_steps:,} steps "
            f"of warm-up), decay {optimization.weight_decay:g}, averaging {optimization.ema_decay}",
            "teacher": f"{distillation.teacher}, weight {distillation.teacher_weight:g}, tau {distillation.teacher_tau:g}"
            if distillation.teacher
            else "none",
            "batch": layout.describe(),
            "length": f"{self.max_train_steps:,} steps, {epochs}{self.max_train_steps * layout.global_batch_size:,} images",
            "kernels": backend_report(self.device),
            "output": str(self.output_dir),
        }
        return "\n".join(f"  {name:<10} {value}" for name, value in lines.items())


def make_classifier_plan(
    config: ClassifierConfig, source: ImageSource, validation: ImageSource | None, accelerator: Accelerator
) -> ClassifierPlan:
    """Resolve every default and check that the parts fit.

    Raises:
        ValueError: they do not; the message names the option and the remedy.
    """
    if len(source.id2label) < 2:
        raise ValueError(f"{source.name} has {len(source.id2label)} class(es); a classifier needs two or more.")
    options = config.run
    layout = batch_layout(
        options.global_batch_size,
        options.micro_batch_size,
        accelerator.num_processes,
        accelerator.device.type == "cpu",
    )
    small = source.resolution <= SMALL_SIDE
    resolution = config.model.resolution or (2 * source.resolution if small else RESOLUTION)
    if options.max_train_steps is None and not source.size:
        raise ValueError(f"--max-train-steps is missing: {source.name} does not tell how many images an epoch has.")
    epoch = source.size / layout.global_batch_size
    steps = options.max_train_steps or math.ceil(options.epochs * epoch)
    if config.optimization.warmup_epochs > options.epochs:
        raise ValueError(
            f"--warmup-epochs {config.optimization.warmup_epochs:g} is more than --epochs {options.epochs:g}; "
            "the warm-up is part of them."
        )
    return ClassifierPlan(
        config=config,
        source=source,
        validation=validation,
        layout=layout,
        resolution=resolution,
        flip=source.flip if config.data.random_flip is None else config.data.random_flip,
        processor=make_processor(config, resolution),
        output_dir=output_dir(config, source),
        max_train_steps=steps,
        # In proportion, so that --max-train-steps shortens both.
        warmup_steps=round(steps * config.optimization.warmup_epochs / options.epochs),
        validate_every=options.validate_every or (max(1, round(epoch)) if source.size else options.checkpoint_every),
        device=accelerator.device,
    )


def make_processor(config: ClassifierConfig, resolution: int) -> Any:
    """The image processor that is saved; with --init-from its mean and deviation are kept."""
    processor = make_image_processor(resolution, config.augmentation.validation_crop)
    if config.model.init_from:
        try:
            former: Any = AutoImageProcessor.from_pretrained(config.model.init_from)
        except (OSError, ValueError) as error:
            raise ValueError(f"--init-from {config.model.init_from}: {first_line(error)}") from error
        processor.image_mean, processor.image_std = list(former.image_mean), list(former.image_std)
    return processor


def start_from(name: str, labels: dict[str, Any]) -> EMOv2ForImageClassification:
    """Trained weights for a new task: a fresh head where the classes differ.

    Args:
        name: folder or Hub id.
        labels: `id2label` and `label2id` of the new task.

    Raises:
        ValueError: it does not load, or is no EMOv2.
    """
    try:
        model = EMOv2ForImageClassification.from_pretrained(name)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"--init-from {name} does not load as EMOv2 ({first_line(error)}).") from error
    if model.config.id2label != labels["id2label"]:
        model.emov2.reset_classifier(len(labels["id2label"]))
        model.config.id2label, model.config.label2id = labels["id2label"], labels["label2id"]
    return model


def load_sources(data: ClassifierDataOptions) -> tuple[ImageSource, ImageSource | None]:
    """The images to train on and those to validate on, with the same class ids.

    Raises:
        ValueError: either does not open, or their classes differ.
    """
    source = load_source(data)
    share = data.validation_share
    if data.validation_dir:
        return source, same_classes(load_source(_other(data, train_data_dir=data.validation_dir)), source)
    if data.validation_dataset:
        return source, same_classes(load_source(_other(data, dataset=data.validation_dataset)), source)
    if data.validation_split:
        other = _other(data, dataset=data.dataset, dataset_split=data.validation_split)
        return source, same_classes(load_source(other), source)
    if share is None:
        share = DIGITS_SHARE if not (data.dataset or data.train_data_dir) else 0.0
    return held_out(source, share) if share else (source, None)


def _other(data: ClassifierDataOptions, **changes: Any) -> ClassifierDataOptions:
    """The same columns and names, of another source, read by index."""
    bare = {"dataset": None, "train_data_dir": None, "streaming": False, "validation_dir": None,
            "validation_dataset": None, "validation_split": None, "validation_share": None}  # fmt: skip
    return replace(data, **{**bare, **changes})


def same_classes(validation: ImageSource, source: ImageSource) -> ImageSource:
    """The validation images with the training images' class ids.

    Raises:
        ValueError: it has a class that was not trained.
    """
    if validation.id2label == source.id2label:
        return validation
    ids = {name: number for number, name in source.id2label.items()}
    unknown = [name for name in validation.id2label.values() if name not in ids]
    if unknown:
        raise ValueError(
            f"{validation.name}, to validate on, has classes that {source.name} does not have: "
            f"{', '.join(unknown[:5])}; they have {len(validation.id2label)} and {len(ids)}."
        )
    table = np.array([ids[validation.id2label[number]] for number in range(len(validation.id2label))])
    return replace(validation, labels=table[validation.labels], id2label=source.id2label)


def held_out(source: ImageSource, share: float) -> tuple[ImageSource, ImageSource]:
    """Split a source into two, each class by the same share; the same split every time.

    Raises:
        ValueError: it is a stream, or too small.
    """
    from sklearn.model_selection import train_test_split

    if source.stream is not None:
        raise ValueError(f"--validation-share {share:g}: a stream has no index; name other images to validate on.")
    try:
        parts = train_test_split(np.arange(source.size), test_size=share, random_state=0, stratify=source.labels)
    except ValueError as error:
        raise ValueError(f"--validation-share {share:g}: {first_line(error)}") from error
    train, held = (subset(source, np.sort(part)) for part in parts)
    return train, replace(held, name=f"{source.name}, held out")


def subset(source: ImageSource, indices: np.ndarray) -> ImageSource:
    """Some images of a source."""
    return replace(
        source, size=len(indices), read=lambda index: source.read(int(indices[index])), labels=source.labels[indices]
    )


def model_name(config: ClassifierConfig) -> str:
    """--model, or what --init-from is called."""
    return Path(config.model.init_from).name if config.model.init_from else config.model.model.removeprefix(TIMM)


def output_dir(config: ClassifierConfig, source: ImageSource) -> Path:
    """--output-dir, or runs/MODEL-DATA with the data's name made fit for a folder."""
    default = f"runs/{model_name(config)}-{re.sub(r'[^A-Za-z0-9._-]+', '-', source.name)}"
    return Path(config.run.output_dir or default)


def make_classifier_optimizer(model: torch.nn.Module, options: ClassifierOptimizationOptions) -> torch.optim.Optimizer:
    """AdamW; vectors (norms, biases, layer scale) do not decay."""
    from timm.optim import param_groups_weight_decay

    return torch.optim.AdamW(
        param_groups_weight_decay(model, options.weight_decay),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_eps,
        fused=True,
    )


def make_cosine_schedule(
    optimizer: torch.optim.Optimizer, plan: ClassifierPlan
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then a cosine; counts optimizer steps."""
    options = plan.config.optimization
    return get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer,
        plan.warmup_steps,
        plan.max_train_steps,
        min_lr_rate=options.min_lr_ratio,
        warmup_lr_rate=options.warmup_lr_ratio,
    )
