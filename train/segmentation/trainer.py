"""From the segmentation trainer's options to a trained segmenter: set up, step, validate, save."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from d_emo.eval.segmentation.predict import evaluate_pixels
from d_emo.train.data.batches import Batch, TrainingSamples
from d_emo.train.engine import loader
from d_emo.train.engine.task import Bundle, Scores, TaskRun, prepare_parts, run_task
from d_emo.train.segmentation.augmentation import SegmentationAugmentation
from d_emo.train.segmentation.config import SegmenterConfig
from d_emo.train.segmentation.model_card import segmenter_card
from d_emo.train.segmentation.plan import SegmenterPlan, make_segmenter_plan, output_dir
from d_emo.train.segmentation.sources import load_sources


@dataclass(kw_only=True)
class SegmenterRun(TaskRun[SegmenterPlan]):
    """A run of the segmentation trainer."""

    score_names = ("miou", "mdice", "aacc", "macc")
    augmentation: SegmentationAugmentation

    def card(self, folder: Path) -> str:
        """See `TrainingRun.card`."""
        return segmenter_card(self.plan, self.circumstances(folder))

    def batches(self) -> Iterable[Batch]:
        """See `TaskRun.batches`."""
        return loader.indexed_loader(self, TrainingSamples(self.plan.source, self.augmentation))

    def batch_loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy at the labels' size, and the auxiliary head's."""
        device = self.accelerator.device
        images = batch.images.to(device, memory_format=torch.channels_last, non_blocking=True)  # (B, 3, S, S)
        labels = batch.labels.to(device, non_blocking=True)  # (B, S, S)
        return self.model(images, labels=labels).loss

    def score(self) -> Scores | None:
        """See `TaskRun.score`."""
        plan = self.plan
        assert plan.validation is not None
        share = evaluate_pixels(
            self.bundle.model.eval(),
            plan.processor,
            plan.validation,
            window=plan.config.run.validation_window,
            stride=plan.config.run.stride,
            **self.evaluation(),
        )
        first, *others = gather_object([share])
        scores = functools.reduce(lambda whole, part: whole.merge(part) or whole, others, first)
        shares = [(float(value), name) for value, name in zip(scores.iou, plan.source.id2label.values(), strict=True)]
        worst, found = min((pair for pair in shares if pair[0] == pair[0]), default=(float("nan"), "none"))
        return Scores(
            (scores.miou, scores.mdice, scores.aacc, scores.macc),
            f"mIoU {scores.miou:.2%}, mDice {scores.mdice:.2%}, aAcc {scores.aacc:.2%}, mAcc {scores.macc:.2%} "
            f"({plan.validation.size:,} images, averaged weights), lowest IoU {found} {worst:.1%}",
        )

    def usage(self) -> str:
        """See `TaskRun.usage`."""
        return f'transformers.pipeline("image-segmentation", "{self.output_dir}")("photo.jpg"); see README.md there'


def run(config: SegmenterConfig) -> None:
    """Set up, train, save."""
    sources = load_sources(config.data)
    run_task(
        config,
        sources=sources,
        folder=output_dir(config, sources[0]),
        make_plan=make_segmenter_plan,
        make_run=make_run,
    )


def make_run(plan: SegmenterPlan, accelerator: Accelerator) -> SegmenterRun:
    """The run of a plan: network, average, optimizer, schedule, augmentation."""
    config, processor = plan.config, plan.processor
    parts = prepare_parts(plan, accelerator, config.model.compile)
    mean, deviation = tuple(processor.image_mean), tuple(processor.image_std)
    return SegmenterRun(
        **vars(parts),
        plan=plan,
        accelerator=accelerator,
        bundle=Bundle(parts.average.module, processor),
        augmentation=SegmentationAugmentation(
            config.augmentation, config.model.crop_size, mean, deviation, config.run.seed
        ),
    )
