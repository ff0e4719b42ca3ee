"""From the classification trainer's options to a trained classifier: set up, step, validate, save."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers import AutoModelForImageClassification

from d_emo.common.processes import is_sharded, loader_processes
from d_emo.eval.classification.accuracy import Predictions, predict
from d_emo.kernels import use_backend
from d_emo.train.classification.augmentation import Augmentation, Targets
from d_emo.train.classification.config import ClassifierConfig
from d_emo.train.classification.distillation import Teacher
from d_emo.train.classification.model_card import classifier_card
from d_emo.train.classification.plan import (
    ClassifierPlan,
    make_classifier_optimizer,
    make_classifier_plan,
    make_classifier_schedule,
    output_dir,
)
from d_emo.train.classification.sources import load_sources
from d_emo.train.classification.validation_log import (
    CURVES,
    VALIDATION_COLUMNS,
    VALIDATION_FILE,
    log_validation,
    plot_validation,
)
from d_emo.train.data.batches import Batch
from d_emo.train.data.sources import check_output
from d_emo.train.engine import loader, loop, saving, start
from d_emo.train.engine.log import truncate_log
from d_emo.train.engine.run import TrainingRun


@dataclass
class Classifier:
    """What a run publishes: the averaged network with its image processor."""

    model: Any
    processor: Any

    def save_pretrained(self, save_directory: Path) -> None:
        """Write both into a folder that transformers loads."""
        self.model.save_pretrained(save_directory)
        self.processor.save_pretrained(save_directory)


@dataclass(kw_only=True)
class ClassifierRun(TrainingRun[ClassifierPlan]):
    """A run of the classification trainer."""

    classifier: Classifier
    augmentation: Augmentation
    targets: Targets
    teacher: Teacher | None

    def result(self) -> Classifier:
        """See `TrainingRun.result`; the classifier's network is the average itself."""
        return self.classifier

    def card(self, folder: Path) -> str:
        """See `TrainingRun.card`."""
        return classifier_card(self.plan, self.circumstances(folder))

    def picture(self) -> Path | None:
        """See `TrainingRun.picture`: the curves of loss and accuracy."""
        path = self.output_dir / CURVES
        return path if path.is_file() else None


def run(config: ClassifierConfig) -> None:
    """Set up, train, save."""
    source, validation = load_sources(config.data)
    check_output(config.data, output_dir(config, source))
    accelerator = start.make_accelerator(config.run, config.optimization.mixed_precision, output_dir(config, source))
    with use_backend(config.model.kernels):
        plan = make_classifier_plan(config, source, validation, accelerator)
        start.announce(plan, accelerator, "--train-data-dir")
        if config.run.dry_run:
            return
        classifier = make_run(plan, accelerator)
        loop.run_to_the_end(classifier, lambda: train(classifier))


def make_run(plan: ClassifierPlan, accelerator: Accelerator) -> ClassifierRun:
    """Build network, average, optimizer, schedule and teacher, and hand them to Accelerate."""
    config, seed = plan.config, plan.config.run.seed
    if is_sharded(accelerator):
        raise ValueError("accelerate launch with FSDP: classifiers are small and not sharded; launch without FSDP.")
    set_seed(seed % 2**32)
    model = plan.build_model().to(memory_format=torch.channels_last)
    optimizer = make_classifier_optimizer(model, plan)
    lr_schedule = make_classifier_schedule(optimizer, plan)
    parts = start.prepare(
        plan, accelerator, model, optimizer, lr_schedule, model.compile if config.model.compile else None
    )
    classes, processor = len(plan.source.id2label), plan.processor
    mean, deviation = tuple(processor.image_mean), tuple(processor.image_std)
    teacher = None
    if config.distillation.teacher:
        teacher = Teacher(config.distillation, classes, processor.image_mean, processor.image_std)
        teacher.to(accelerator.device)
    # Stochastic depth draws from the global generator: other masks on every process.
    set_seed((seed + accelerator.process_index) % 2**32)
    return ClassifierRun(
        **vars(parts),
        plan=plan,
        accelerator=accelerator,
        classifier=Classifier(parts.average.module, processor),
        augmentation=Augmentation(config.augmentation, plan.resolution, plan.flip, mean, deviation, seed),
        targets=Targets(config.augmentation, classes, seed),
        teacher=teacher,
    )


def load_average(run: ClassifierRun, path: Path) -> None:
    """Restore the average; the rest is restored already."""
    run.average.load_whole_state(AutoModelForImageClassification.from_pretrained(path).state_dict())


def train(run: ClassifierRun) -> int:
    """Claim the folder, step until the end or until the user interrupts; log, validate and save on the way.

    Returns:
        The exit code: 0, or the shell's code for the signal that stopped the run.
    """
    plan = run.plan
    start.claim_or_resume(run, ClassifierConfig().flat(), lambda path: load_average(run, path))
    if run.accelerator.is_main_process:
        truncate_log(plan.output_dir / VALIDATION_FILE, run.step, VALIDATION_COLUMNS)
    run.model.train()

    def score() -> None:
        if run.step % plan.validate_every == 0:
            validate(run)

    stopped = loop.train_until_done(
        run,
        iter(loader.make_loader(run, run.augmentation)),
        lambda batch: batch_loss(run, batch),
        show=lambda: None,
        score=score,
    )
    if stopped is not None:
        return stopped
    finish(run)
    return 0


def batch_loss(run: ClassifierRun, batch: Batch) -> torch.Tensor:
    """Mean loss of a micro batch: cross-entropy, and what the teacher adds."""
    device = run.accelerator.device
    images = batch.images.to(device, memory_format=torch.channels_last, non_blocking=True)  # (B, 3, H, W)
    images, targets = run.targets(images, batch.labels.to(device), batch.positions)  # targets (B, K)
    logits = run.model(images).logits.float()  # (B, K)
    loss = F.cross_entropy(logits, targets)
    if run.teacher is not None:
        with run.accelerator.autocast():
            loss = loss + run.teacher.loss(logits, images)
    return loss


def validate(run: ClassifierRun) -> None:
    """Score the averaged network on the validation images, each process its share; say, log and plot it."""
    plan, accelerator = run.plan, run.accelerator
    if plan.validation is None:
        return
    data = plan.config.data
    share = predict(
        run.classifier.model,
        plan.validation,
        plan.processor,
        batch_size=plan.layout.micro_batch_size,
        num_workers=loader_processes(data.num_workers, plan.source.num_workers),
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        mixed_precision=accelerator.mixed_precision == "bf16",
        progress=accelerator.is_main_process,
    )
    log_validation(run, Predictions.joined(gather_object([share])))


def finish(run: ClassifierRun) -> None:
    """Validate, save the classifier into the run's folder, say what to do next."""
    if run.step % run.plan.validate_every:
        validate(run)
    if run.accelerator.is_main_process:
        plot_validation(run.output_dir, run.plan.model_name)
    saving.publish(run, "config.json")
    if run.accelerator.is_main_process:
        run.say(f'done: transformers.pipeline("image-classification", "{run.output_dir}")("photo.jpg")')
    run.accelerator.wait_for_everyone()
