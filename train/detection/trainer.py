"""From the detection trainer's options to a trained detector: set up, step, validate, save."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from d_emo.detection.saved import DetectorBundle, load_detector
from d_emo.train.data.batches import Batch, TrainingSamples
from d_emo.train.detection.augmentation import joined
from d_emo.train.detection.config import DetectorConfig
from d_emo.train.detection.model_card import detector_card
from d_emo.train.detection.plan import DetectorPlan, make_detector_plan, model_name, system_of
from d_emo.train.detection.sources import load_sources
from d_emo.train.engine import loader
from d_emo.train.engine.task import Scores, TaskRun, prepare_parts, run_task

# Of the scores, those that are kept; the report line has those of small, medium and large objects, too.
BOX_SCORES = ("mAP", "mAP50", "mAP75")
MASK_SCORES = ("mask_mAP", "mask_mAP50", "mask_mAP75")


@dataclass(kw_only=True)
class DetectorRun(TaskRun[DetectorPlan]):
    """A run of the detection trainer.

    Attributes:
        parts: sums of the losses by name since the last log line, and of how many micro batches.
    """

    score_names: ClassVar[tuple[str, ...]] = BOX_SCORES
    parts: dict[str, torch.Tensor] = field(default_factory=dict)

    def card(self, folder: Path) -> str:
        """See `TrainingRun.card`."""
        return detector_card(self.plan, self.circumstances(folder), self.score_names)

    def batches(self) -> Iterable[Batch]:
        """See `TaskRun.batches`."""
        return loader.indexed_loader(self, TrainingSamples(self.plan.source, self.plan.augmentation), joined)

    def batch_loss(self, batch: Batch) -> torch.Tensor:
        """The sum of the detector's losses."""
        device = self.accelerator.device
        images = [image.to(device, non_blocking=True).float() / 255 for image in batch.images]
        targets = [
            {name: values.to(device, non_blocking=True) for name, values in target.items()} for target in batch.labels
        ]
        losses: Mapping[str, torch.Tensor] = self.model(images, targets)
        for name, value in losses.items():
            self.parts[name] = self.parts.get(name, torch.zeros((), device=device)) + value.detach()
        return torch.stack([value.float() for value in losses.values()]).sum()

    def logged(self) -> dict[str, torch.Tensor]:
        """See `TrainingRun.logged`: the mean of each loss."""
        count = max(1, len(self.window) * self.plan.layout.accumulation)
        means = {name: total / count for name, total in self.parts.items()}
        self.parts.clear()
        return means

    def score(self) -> Scores | None:
        """See `TaskRun.score`."""
        from d_emo.eval.detection.predict import evaluate_objects  # torchmetrics, seconds of imports

        plan = self.plan
        assert plan.validation is not None
        share = evaluate_objects(self.bundle.model, plan.validation, **self.evaluation())
        first, *others = gather_object([share])
        if not self.accelerator.is_main_process:
            return Scores((), "")
        for other in others:
            first.merge(other)
        found = first.compute()
        sizes = ", ".join(f"{size} {_shown(found[f'mAP_{size}'])}" for size in ("small", "medium", "large"))
        named = ", ".join(f"{name.replace('_', ' ')} {_shown(found[name])}" for name in self.score_names)
        return Scores(
            tuple(found[name] for name in self.score_names),
            f"{named}; {sizes} ({plan.validation.size:,} images, averaged weights)",
        )

    def load_average(self, path: Path) -> None:
        """See `TaskRun.load_average`."""
        self.average.load_whole_state(load_detector(path).model.state_dict())

    def usage(self) -> str:
        """See `TaskRun.usage`."""
        return f'd_emo.detection.saved.load_detector("{self.output_dir}").model.eval()(images)'


@dataclass(kw_only=True)
class MaskDetectorRun(DetectorRun):
    """A run that learns masks, too."""

    score_names: ClassVar[tuple[str, ...]] = (*BOX_SCORES, *MASK_SCORES)


def run(config: DetectorConfig) -> None:
    """Set up, train, save."""
    system = system_of(config.model)
    sources = load_sources(config.data, system == "mask_rcnn")
    run_task(
        config,
        sources=sources,
        folder=config.run.folder(model_name(config.model, system), sources[0].name),
        make_plan=make_detector_plan,
        make_run=make_run,
    )


def make_run(plan: DetectorPlan, accelerator: Accelerator) -> DetectorRun:
    """The run of a plan: network, average, optimizer, schedule."""
    parts = prepare_parts(plan, accelerator, plan.config.model.compile, lambda model: model.backbone)
    bundle = DetectorBundle(parts.average.module, plan.source.id2label, plan.settings)
    kind = MaskDetectorRun if plan.system == "mask_rcnn" else DetectorRun
    return kind(**vars(parts), plan=plan, accelerator=accelerator, bundle=cast(Any, bundle))


def _shown(value: float) -> str:
    return "-" if value != value else f"{value:.1%}"
