"""Train EMOv2, EMOv1 or any network of timm on class-labelled images.

    accelerate launch train/train_classifier.py --config train/configs/classifier/digits.yaml
    accelerate launch train/train_classifier.py --config train/configs/classifier/emov2.yaml --model EMOv2-5M \\
        --train-data-dir imagenet/train --validation-dir imagenet/val
    accelerate launch train/train_classifier.py --config train/configs/classifier/finetune.yaml \\
        --init-from EMOv2-5M --train-data-dir my_photos

The same script runs on a CPU, a GPU or many; options are in `classifier_config.py`. It writes a folder that
`transformers.pipeline("image-classification")` loads.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed
from transformers import AutoModelForImageClassification

from d_emo.common.processes import is_sharded
from d_emo.eval.classification.accuracy import Predictions, predict
from d_emo.kernels import set_backend
from d_emo.train.classification.augmentation import Augmentation, Targets
from d_emo.train.classification.config import ClassifierConfig, parse_classifier_config
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
    VALIDATION_COLUMNS,
    VALIDATION_FILE,
    log_validation,
    plot_validation,
)
from d_emo.train.data import stream_loader
from d_emo.train.data.batches import Batch
from d_emo.train.engine import checkpoints, loader, loop, start
from d_emo.train.engine.averaging import WeightAverage
from d_emo.train.engine.batch_norm import StepStatistics
from d_emo.train.engine.log import truncate_log
from d_emo.train.engine.run import TrainingRun


@dataclass
class Classifier:
    """What a run publishes: the averaged network with its image processor."""

    model: Any
    processor: Any

    def save_pretrained(self, folder: Path) -> None:
        """Write both into a folder that transformers loads."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


@dataclass(kw_only=True)
class ClassifierRun(TrainingRun):
    """A run of the classification trainer."""

    classifier: Classifier
    augmentation: Augmentation
    targets: Targets
    teacher: Teacher | None


def main(arguments: list[str]) -> None:
    """Set up, train, save."""
    try:
        config = parse_classifier_config(arguments, __doc__)
        source, validation = load_sources(config.data)
        accelerator = start.make_accelerator(
            config.run, config.optimization.mixed_precision, output_dir(config, source)
        )
        if config.model.kernels:
            set_backend(config.model.kernels)
        plan = make_classifier_plan(config, source, validation, accelerator)
        if accelerator.is_main_process:
            if not (config.data.dataset or config.data.train_data_dir):
                print("No data was named: training on scikit-learn's handwritten digits (--train-data-dir for yours).")
            print(plan.describe(), flush=True)
        if config.run.dry_run:
            return
        run = make_run(plan, accelerator)
        start.claim_or_resume(run, ClassifierConfig().flat(), lambda path: load_average(run, path))
        if accelerator.is_main_process:
            truncate_log(plan.output_dir / VALIDATION_FILE, run.step, VALIDATION_COLUMNS)
    except ValueError as error:
        sys.exit(f"train_classifier: {error}")
    loop.run_to_the_end("train_classifier", run, lambda: train(run))


def make_run(plan: ClassifierPlan, accelerator: Accelerator) -> ClassifierRun:
    """Build network, average, optimizer, schedule and teacher, and hand them to Accelerate."""
    config, seed = plan.config, plan.config.run.seed
    if is_sharded(accelerator):
        raise ValueError("classifiers are small; launch without FSDP.")
    set_seed(seed % 2**32)
    model = plan.build_model().to(memory_format=torch.channels_last)
    statistics = StepStatistics(model, constant=config.model.compile)
    average = WeightAverage(model, config.optimization).to(accelerator.device)
    optimizer = make_classifier_optimizer(model, plan)
    lr_schedule = make_classifier_schedule(optimizer, plan)
    accelerator.gradient_accumulation_steps = plan.layout.accumulation
    if config.model.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(lr_schedule)
    classes, processor = len(plan.source.id2label), plan.processor
    teacher = None
    if config.distillation.teacher:
        teacher = Teacher(config.distillation, classes, processor.image_mean, processor.image_std)
        teacher.to(accelerator.device)
    # Stochastic depth draws from the global generator: other masks on every process.
    set_seed((seed + accelerator.process_index) % 2**32)
    return ClassifierRun(
        plan=plan,
        accelerator=accelerator,
        model=model,
        average=average,
        optimizer=optimizer,
        statistics=statistics,
        lr_schedule=lr_schedule,
        classifier=Classifier(average.module, processor),
        augmentation=Augmentation(
            config.augmentation,
            plan.resolution,
            plan.flip,
            tuple(processor.image_mean),
            tuple(processor.image_std),
            seed,
        ),
        targets=Targets(config.augmentation, classes, seed),
        teacher=teacher,
    )


def load_average(run: ClassifierRun, path: Path) -> None:
    """Restore the average; the rest is restored already."""
    run.average.load_whole_state(AutoModelForImageClassification.from_pretrained(path).state_dict())


def train(run: ClassifierRun) -> int:
    """Step until the end, or until the user interrupts; log, validate and save on the way.

    Returns:
        The exit code: 0, or the shell's code for the signal that stopped the run.
    """
    plan = run.plan
    run.model.train()

    def score() -> None:
        if run.step % plan.validate_every == 0:
            validate(run)

    stopped = loop.train_until_done(
        run,
        iter(loader.make_loader(run, run.augmentation)),
        lambda batch: batch_loss(run, batch),
        show=lambda: None,
        save=lambda: save(run),
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
        num_workers=plan.source.num_workers if data.num_workers is None else data.num_workers,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        mixed_precision=accelerator.mixed_precision == "bf16",
        progress=accelerator.is_main_process,
    )
    log_validation(run, Predictions.joined(gather_object([share])))


def save(run: ClassifierRun) -> None:
    """Write a checkpoint, then delete the older ones that the user does not keep."""
    options = run.plan.config.run

    def write_more(folder: Path) -> None:
        if run.plan.source.stream is not None:
            stream_loader.save_place(folder / checkpoints.STATE_FOLDER, run.accelerator, run.place)

    card = classifier_card(run.plan, run.step)
    path = checkpoints.save_checkpoint(run.accelerator, run.classifier, run.output_dir, run.step, card, write_more)
    run.say(f"step {run.step}: saved {path}")
    if run.accelerator.is_main_process:
        checkpoints.prune_checkpoints(run.output_dir, options.keep_checkpoints, options.keep_every)


def finish(run: ClassifierRun) -> None:
    """Validate, save the classifier into the run's folder, say what to do next."""
    if run.step % run.plan.validate_every:
        validate(run)
    if run.accelerator.is_main_process:
        card = classifier_card(run.plan, run.step)
        checkpoints.publish_pipeline(run.classifier, run.output_dir, card, index_name="config.json")
        plot_validation(run.output_dir, run.plan.model_name)
        run.say(f'done: transformers.pipeline("image-classification", "{run.output_dir}")("photo.jpg")')
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1:])
