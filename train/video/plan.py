"""From options to everything a video classifier's run needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from d_emo.train.engine.task_plan import TaskPlan, refuse_bfloat16_on_cpu, resolved_length, start_name
from d_emo.train.video.config import VideoConfig
from d_emo.train.video.start import Start, look_up
from d_emo.video.folders import ClipSource


@dataclass(frozen=True, kw_only=True)
class VideoPlan(TaskPlan):
    """A run, resolved; `start` says what of, with how many frames of which side."""

    start: Start

    @property
    def model_name(self) -> str:
        """What to call the model."""
        return model_name(self.config)

    def build_model(self) -> Any:
        """See `Start.build`."""
        return self.start.build(self.source.id2label)

    def identity(self) -> dict[str, Any]:
        """See `TaskPlan`; with the clips' size."""
        return {**super().identity(), "frames": self.start.frames, "resolution": self.start.resolution}

    def lines(self, model: Any) -> dict[str, str]:
        """See `TaskPlan`."""
        side = self.start.resolution
        mirrored = "" if self.config.data.random_flip else "not "
        return {
            "start": self.start.describe(),
            "clips": f"{self.start.frames} frames of {side} x {side}, {mirrored}mirrored at random",
            "augment": self.config.augmentation.describe(),
        }


def model_name(config: VideoConfig) -> str:
    """--model, or what --init-from is called."""
    return start_name(config.model)


def output_dir(config: VideoConfig, source: ClipSource) -> Path:
    """Where the run is written."""
    return config.run.folder(model_name(config), source.name)


def make_video_plan(
    config: VideoConfig, source: ClipSource, validation: ClipSource | None, accelerator: Accelerator
) -> VideoPlan:
    """Resolve every default and check that the parts fit.

    Raises:
        ValueError: they do not; the message names the option and the remedy.
    """
    refuse_bfloat16_on_cpu(accelerator, "PyTorch's convolutions in space and time")
    if len(source.id2label) < 2:
        raise ValueError(
            f"the videos of {source.name} are of {len(source.id2label)} class; a classifier needs two or more: name a "
            "folder of class folders (--train-data-dir), or the column of classes (--label-column)."
        )
    start = look_up(config.model)
    return VideoPlan(
        config=config,
        source=source,
        validation=validation,
        processor=start.processor(),
        output_dir=output_dir(config, source),
        start=start,
        **resolved_length(config, source, accelerator, config.optimization.asked_warmup),
    )
