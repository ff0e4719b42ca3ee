"""From the classification trainer's options to a trained classifier: set up, step, validate, save."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object

from d_emo.eval.classification.accuracy import Predictions, predict
from d_emo.train.classification.augmentation import Augmentation, Targets
from d_emo.train.classification.config import ClassifierConfig
from d_emo.train.classification.distillation import Teacher
from d_emo.train.classification.model_card import classifier_card
from d_emo.train.classification.plan import ClassifierPlan, make_classifier_plan, output_dir
from d_emo.train.classification.sources import load_sources
from d_emo.train.data.batches import Batch
from d_emo.train.engine import loader
from d_emo.train.engine.task import Bundle, Scores, TaskRun, prepare_parts, run_task


@dataclass(kw_only=True)
class ClassifierRun(TaskRun[ClassifierPlan]):
    """A run of the classification trainer."""

    score_names = ("top1", "top5", "loss")
    augmentation: Augmentation
    targets: Targets
    teacher: Teacher | None

    def card(self, folder: Path) -> str:
        """See `TrainingRun.card`."""
        return classifier_card(self.plan, self.circumstances(folder))

    def batches(self) -> Iterable[Batch]:
        """See `TaskRun.batches`."""
        return loader.make_loader(self, self.augmentation)

    def batch_loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy, and what the teacher adds."""
        device = self.accelerator.device
        images = batch.images.to(device, memory_format=torch.channels_last, non_blocking=True)  # (B, 3, H, W)
        images, targets = self.targets(images, batch.labels.to(device), batch.positions)  # targets (B, K)
        logits = self.model(images).logits.float()  # (B, K)
        loss = F.cross_entropy(logits, targets)
        if self.teacher is not None:
            with self.accelerator.autocast():
                loss = loss + self.teacher.loss(logits, images)
        return loss

    def score(self) -> Scores | None:
        """See `TaskRun.score`."""
        plan = self.plan
        assert plan.validation is not None
        share = predict(
            self.bundle.model,
            plan.validation,
            plan.processor,
            batch_size=plan.layout.micro_batch_size,
            **self.evaluation(),
        )
        predictions = Predictions.joined(gather_object([share]))
        return Scores(predictions.scores, predictions.describe(plan.source.id2label, "images, averaged weights"))

    def usage(self) -> str:
        """See `TaskRun.usage`."""
        return f'transformers.pipeline("image-classification", "{self.output_dir}")("photo.jpg")'


def run(config: ClassifierConfig) -> None:
    """Set up, train, save."""
    sources = load_sources(config.data)
    run_task(
        config,
        sources=sources,
        folder=output_dir(config, sources[0]),
        make_plan=make_classifier_plan,
        make_run=make_run,
        hint="--train-data-dir",
    )


def make_run(plan: ClassifierPlan, accelerator: Accelerator) -> ClassifierRun:
    """The run of a plan: network, average, optimizer, schedule, teacher."""
    config, seed = plan.config, plan.config.run.seed
    parts = prepare_parts(plan, accelerator, config.model.compile)
    classes, processor = len(plan.source.id2label), plan.processor
    mean, deviation = tuple(processor.image_mean), tuple(processor.image_std)
    teacher = None
    if config.distillation.teacher:
        teacher = Teacher(config.distillation, classes, processor.image_mean, processor.image_std)
        teacher.to(accelerator.device)
    return ClassifierRun(
        **vars(parts),
        plan=plan,
        accelerator=accelerator,
        bundle=Bundle(parts.average.module, processor),
        augmentation=Augmentation(config.augmentation, plan.resolution, plan.flip, mean, deviation, seed),
        targets=Targets(config.augmentation, classes, seed),
        teacher=teacher,
    )
