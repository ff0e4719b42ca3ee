"""From the video trainer's options to a trained video classifier: set up, step, validate, save."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object

from d_emo.eval.classification.accuracy import Predictions
from d_emo.eval.video.accuracy import predict_clips
from d_emo.train.data.batches import Batch, TrainingImages
from d_emo.train.engine import loader
from d_emo.train.engine.task import Bundle, Scores, TaskRun, prepare_parts, run_task
from d_emo.train.video.augmentation import ClipAugmentation
from d_emo.train.video.config import VideoConfig
from d_emo.train.video.model_card import video_card
from d_emo.train.video.plan import VideoPlan, make_video_plan, output_dir
from d_emo.train.video.sources import load_sources


@dataclass(kw_only=True)
class VideoRun(TaskRun[VideoPlan]):
    """A run of the video trainer."""

    score_names = ("top1", "top5", "loss")
    augmentation: ClipAugmentation

    def card(self, folder: Path) -> str:
        """See `TrainingRun.card`."""
        return video_card(self.plan, self.circumstances(folder))

    def batches(self) -> Iterable[Batch]:
        """See `TaskRun.batches`."""
        return loader.indexed_loader(self, TrainingImages(self.plan.source, self.augmentation))

    def batch_loss(self, batch: Batch) -> torch.Tensor:
        """Cross-entropy."""
        device = self.accelerator.device
        clips = batch.images.to(device, non_blocking=True)  # (B, T, 3, H, W)
        logits = self.model(clips).logits.float()  # (B, K)
        smoothing = self.plan.config.augmentation.label_smoothing
        return F.cross_entropy(logits, batch.labels.to(device), label_smoothing=smoothing)

    def score(self) -> Scores | None:
        """See `TaskRun.score`: one clip, the middle crop."""
        plan = self.plan
        assert plan.validation is not None
        share = predict_clips(
            self.bundle.model,
            plan.processor,
            plan.validation,
            batch_size=plan.layout.micro_batch_size,
            **self.evaluation(),
            skip_bad=plan.config.data.on_bad_image == "skip",
        )
        parts = gather_object([share])
        if not any(len(part.labels) for part in parts):
            return None
        predictions = Predictions.joined(parts)
        return Scores(predictions.scores, predictions.describe(plan.source.id2label, "videos, averaged weights"))

    def usage(self) -> str:
        """See `TaskRun.usage`."""
        return f'transformers.pipeline("video-classification", "{self.output_dir}")("clip.mp4")'


def run(config: VideoConfig) -> None:
    """Set up, train, save."""
    sources = load_sources(config.data)
    run_task(
        config,
        sources=sources,
        folder=output_dir(config, sources[0]),
        make_plan=make_video_plan,
        make_run=make_run,
    )


def make_run(plan: VideoPlan, accelerator: Accelerator) -> VideoRun:
    """The run of a plan: network, average, optimizer, schedule."""
    config, processor = plan.config, plan.processor
    parts = prepare_parts(plan, accelerator, config.model.compile)
    return VideoRun(
        **vars(parts),
        plan=plan,
        accelerator=accelerator,
        bundle=Bundle(parts.average.module, processor),
        augmentation=ClipAugmentation(
            config.augmentation,
            plan.start.frames,
            plan.start.resolution,
            config.data.random_flip,
            processor.image_mean,
            processor.image_std,
            config.run.seed,
        ),
    )
