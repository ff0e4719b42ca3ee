"""Every option of the video trainer, once; `engine.task_options` and `data.options` have those of other trainers."""

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from d_emo.common.options import (
    OptionTable,
    below_one,
    json_table,
    option,
    parse_options,
    positive,
    require_each,
    up_to_one,
    zero_or_more,
)
from d_emo.train.data.options import ValidationOptions
from d_emo.train.engine.options import KERNELS_HELP, options_of_run
from d_emo.train.engine.task_options import TaskOptimizationOptions, TaskRunOptions


@dataclass(frozen=True, kw_only=True)
class VideoModelOptions:
    """What is trained."""

    model: str = option("V-EMOv2-5M", "Name of d_emo.list_video_classifiers().")
    init_from: str | None = option(
        None,
        "Start from a trained EMOv2 whose kernels are inflated (folder, Hub id, or published .pth), or from a trained "
        "V-EMOv2 (folder or Hub id); --model aside. The head is new where the classes differ.",
    )
    model_config: str | None = option(
        None, 'Overrides of the network as JSON, such as {"widths": [16, 24, 48, 64], "drop_path": 0.1}.'
    )
    frames: int | None = option(None, "Frames of a clip. Default: 4, or those of a V-EMOv2 that --init-from names.")
    resolution: int | None = option(
        None, "Side of the frames in pixels. Default: 160, or that of a V-EMOv2 that --init-from names."
    )
    compile: bool = option(False, "torch.compile the network.")
    kernels: Literal["auto", "reference", "native"] | None = option(None, KERNELS_HELP)

    def __post_init__(self):
        positive(self, "frames")
        require_each(self, ("resolution",), lambda value: value >= 32, "must be 32 or more")
        self.overrides()

    def overrides(self) -> dict[str, Any]:
        """--model-config, read.

        Raises:
            ValueError: it is no JSON object.
        """
        return json_table(self, "model_config", '{"drop_path": 0.1}')


@dataclass(frozen=True, kw_only=True)
class VideoDataOptions(ValidationOptions):
    """What it is trained and validated on."""

    train_data_dir: str | None = option(None, "Folder with one sub-folder of videos a class.")
    dataset: str | None = option(None, "Hub id of a dataset, a local dataset folder, or a .parquet file, of videos.")
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.")
    dataset_split: str = option("train", "Split of the dataset.")
    video_column: str = option("video", "Column that holds the videos.")
    label_column: str = option("label", "Column that holds the classes.")
    class_names: str | None = option(
        None, "Names of classes that the data give by number only: a file (one a line, or JSON)."
    )
    on_bad_image: Literal["stop", "skip"] = option(
        "stop", "An unreadable or too short video stops the run, or is skipped aloud."
    )
    num_workers: int | None = option(None, "Loader processes, which decode. Default: 4, or a core each.")
    random_flip: bool = option(
        True, "Mirror clips at random. Not where left and right are classes: mirrored motion goes the other way."
    )


@dataclass(frozen=True, kw_only=True)
class ClipAugmentationOptions:
    """What becomes of a training clip, all frames alike. Every draw is a function of (seed, position)."""

    crop: Literal["resized", "center"] = option(
        "resized", "resized: a random area of the frame. center: the middle, as in validation."
    )
    crop_scale_min: float = option(0.08, "resized: smallest area, as a share of the frame.")
    short_side: int | None = option(
        None, "resized: the frame's short side before that, in pixels. Default: 1.2 times the resolution."
    )
    rand_augment: int = option(4, "RandAugment's operations, torchvision's; 0 for none.")
    rand_augment_magnitude: int = option(7, "How strong they are, of 10.")
    rand_augment_probability: float = option(0.5, "With which each of them is applied.")
    label_smoothing: float = option(0.0, "Share of the target that is spread over all classes.")

    def __post_init__(self):
        require_each(self, ("crop_scale_min",), lambda value: 0 < value <= 1, "must be in (0, 1]")
        positive(self, "short_side")
        require_each(self, ("rand_augment",), lambda value: 0 <= value <= 100, "must be in [0, 100]")
        require_each(self, ("rand_augment_magnitude",), lambda value: 0 <= value <= 10, "must be in [0, 10]")
        up_to_one(self, "rand_augment_probability")
        below_one(self, "label_smoothing")

    def describe(self) -> str:
        """What is on, for people."""
        policy = (
            f"RandAugment of {self.rand_augment} operations, magnitude {self.rand_augment_magnitude}, each with "
            f"{self.rand_augment_probability:g}"
            if self.rand_augment
            else "no policy"
        )
        smoothing = f", label_smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        return f"{self.crop} crop, {policy}{smoothing}"


@dataclass(frozen=True, kw_only=True)
class VideoOptimizationOptions(TaskOptimizationOptions):
    """AdamW and its schedule; the defaults are the paper's for V-EMOv2, for batches of 256."""

    learning_rate: float = option(1e-4, "The highest learning rate.")
    no_weight_decay: str | None = option(
        "norm,bias",
        "Parameters that do not decay: parts of their names, with commas between; 'vectors' are all norms, biases and "
        "layer scales.",
    )
    lr_warmup_steps: int = option(
        500, "Linear warm-up in optimizer steps, at most a quarter of the run.", "lr_warmup_epochs"
    )
    lr_warmup_epochs: float | None = option(
        None,
        "Linear warm-up in epochs, at most a quarter of the run; in place of --lr-warmup-steps.",
        "lr_warmup_steps",
    )
    lr_warmup_ratio: float = option(0.1, "Where the warm-up starts, as a share of the learning rate.")
    lr_decay_start: float = option(0.15, "cosine: where it begins to fall, as a share of the run.")
    lr_decay_end: float = option(1.1, "cosine: where it would be down, as a share of the run; may be above 1.")
    min_lr_ratio: float = option(0.1, "cosine: where it ends, as a share of the learning rate.")
    max_grad_norm: float | None = option(20.0, "Clip the gradient's norm to this; 0 is no clipping.")

    def __post_init__(self):
        super().__post_init__()
        zero_or_more(self, "lr_warmup_epochs")

    def asked_warmup(self, steps: int, epoch: float) -> int:
        """See `TaskOptimizationOptions`; in epochs where they are given."""
        return self.lr_warmup_steps if self.lr_warmup_epochs is None else round(self.lr_warmup_epochs * epoch)


@dataclass(frozen=True, kw_only=True)
class VideoConfig(OptionTable):
    """The video trainer's options."""

    trainer: ClassVar[str] = "train_video_classifier"
    model: VideoModelOptions = field(default_factory=VideoModelOptions)
    data: VideoDataOptions = field(default_factory=VideoDataOptions)
    augmentation: ClipAugmentationOptions = field(default_factory=ClipAugmentationOptions)
    optimization: VideoOptimizationOptions = field(default_factory=VideoOptimizationOptions)
    run: TaskRunOptions = field(default_factory=TaskRunOptions)


def parse_video_config(arguments: list[str], about: str = "Train V-EMOv2.") -> VideoConfig:
    """Read the command line and, under it, the YAML file that --config names; see `parse_options`.

    Under both lie a resumed run's own options.
    """
    return parse_options(
        arguments, VideoConfig, VideoConfig.trainer, about, functools.partial(options_of_run, VideoConfig.trainer)
    )
