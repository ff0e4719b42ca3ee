"""Every option of the segmentation trainer, once; `engine` and `data` have those of all trainers."""

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from d_emo.common.options import (
    OptionTable,
    at_most_one_of,
    goes_with,
    json_table,
    option,
    parse_options,
    positive,
    require,
    require_each,
)
from d_emo.train.data.options import ValidationOptions
from d_emo.train.engine.options import KERNELS_HELP, options_of_run
from d_emo.train.engine.task_options import TaskOptimizationOptions, TaskRunOptions


@dataclass(frozen=True, kw_only=True)
class SegmenterOptions:
    """What is trained."""

    model: str = option("EMOv2-5M", "Name of d_emo.list_segmenters(): a backbone, U-EMOv2-5M or UNet-S5-D16.")
    head: Literal["deeplabv3", "pspnet", "segformer", "semantic_fpn"] | None = option(
        None, "On a backbone. Default: deeplabv3, or that of a segmenter that --init-from names."
    )
    init_from: str | None = option(
        None,
        "Start from a trained classifier (folder, Hub id, or published .pth), --model aside, or from a trained "
        "segmenter (folder or Hub id), whose last layer is new where the classes differ.",
    )
    model_config: str | None = option(
        None, 'Overrides of the network as JSON, such as {"drop_path": 0.1, "loss_over_ignored": true}.'
    )
    crop_size: int = option(512, "Side of what is learned from, in pixels.")
    compile: bool = option(False, "torch.compile the network.")
    kernels: Literal["auto", "reference", "native"] | None = option(None, KERNELS_HELP)

    def __post_init__(self):
        require(self.crop_size >= 32, "crop_size", self.crop_size, "must be 32 or more")
        self.overrides()

    def overrides(self) -> dict[str, Any]:
        """--model-config, read.

        Raises:
            ValueError: it is no JSON object.
        """
        return json_table(self, "model_config", '{"dropout": 0}')


@dataclass(frozen=True, kw_only=True)
class SegmenterDataOptions(ValidationOptions):
    """What it is trained and validated on."""

    train_data_dir: str | None = option(
        None, "Folder of pictures whose masks lie beside it by a usual name, or that holds both (images, masks)."
    )
    mask_dir: str | None = option(None, "Folder of the masks: same sub-folders, same names. Default: looked for.")
    image_suffix: str | None = option(
        None, "What pictures' names end with behind what they share with their masks'. Default: told by the names."
    )
    mask_suffix: str | None = option(
        None, "What masks' names end with behind what they share with their pictures'. Default: told by the names."
    )
    images_without_masks: Literal["stop", "drop"] = option(
        "stop", "Pictures in the folder that have no mask end the run before it begins, or are left out."
    )
    panoptic_json: str | None = option(None, "COCO's panoptic JSON: --train-data-dir and --mask-dir are its folders.")
    panoptic_classes: Literal["categories", "things"] = option(
        "categories", "Of --panoptic-json: every category is a class, or things are one and stuff the other."
    )
    dataset: str | None = option(None, "Hub id of a dataset, a local dataset folder, or .parquet files.")
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.")
    dataset_split: str = option("train", "Split of the dataset.")
    image_column: str = option("image", "Column that holds the pictures.")
    mask_column: str | None = option(None, "Column that holds the masks. Default: one with a usual name.")
    class_names: str | None = option(
        None, "Names of classes in the order of the ids: a file, one a line, or JSON. Default: told by the masks."
    )
    palette: str | None = option(None, "Of masks of colours: a file with a line R G B NAME, or NAME R G B, a class.")
    reduce_zero_label: bool = option(False, "0 is no class, and the others count from 1, as in ADE20K.")
    ignore_index: int | None = option(
        None, "A number in masks that is no class. Default: 255, but where there is nothing but 0 and 255."
    )
    max_images: int | None = option(None, "Use the first so many images only, of those to validate on as well.")
    validation_mask_dir: str | None = option(None, "Its masks. Default: looked for.")
    validation_json: str | None = option(None, "Its panoptic JSON.")

    def __post_init__(self):
        super().__post_init__()
        for name in ("class_names", "palette", "mask_suffix"):
            at_most_one_of(self, "panoptic_json", name)
        goes_with(self, "train_data_dir", "mask_dir", "panoptic_json")
        goes_with(self, "validation_dir", "validation_mask_dir", "validation_json")
        goes_with(self, "dataset", "mask_column")
        if self.validation_dir and bool(self.panoptic_json) != bool(self.validation_json):
            raise ValueError("--panoptic-json and --validation-json go together; name both, or none.")
        positive(self, "max_images")
        require(
            self.ignore_index is None or 0 <= self.ignore_index < 2**16,
            "ignore_index",
            self.ignore_index,
            "must be in [0, 65536)",
        )


@dataclass(frozen=True, kw_only=True)
class SegmentationAugmentationOptions:
    """What becomes of a training image and its mask alike. Every draw is a function of (seed, position)."""

    short_side: int | None = option(
        None, "Pictures are brought to this short side in pixels, the ratio kept. Default: they stay as they are."
    )
    long_side: int | None = option(None, "With --short-side: the long side is at most this. Default: 4 times that.")
    scale_min: float = option(0.5, "Smallest random factor of that size.")
    scale_max: float = option(2.0, "Largest random factor of that size.")
    crop_max_share: float = option(
        0.75, "A crop in which one class fills more of the labelled pixels is drawn again, up to 10 times; 1 is off."
    )
    random_flip: bool = option(True, "Mirror images at random.")
    photometric: bool = option(True, "Change brightness, contrast, saturation and hue at random.")

    def __post_init__(self):
        require_each(self, ("short_side", "long_side"), lambda value: value >= 16, "must be 16 or more")
        goes_with(self, "short_side", "long_side")
        if self.long_side is not None:
            require(
                self.long_side >= (self.short_side or 0),
                "long_side",
                self.long_side,
                f"must be --short-side {self.short_side} or more",
            )
        require(0 < self.scale_min <= 16, "scale_min", self.scale_min, "must be in (0, 16]")
        require(
            self.scale_min <= self.scale_max <= 16,
            "scale_max",
            self.scale_max,
            f"must be from --scale-min {self.scale_min:g} to 16",
        )
        require(0 < self.crop_max_share <= 1, "crop_max_share", self.crop_max_share, "must be in (0, 1]")

    @property
    def longest(self) -> int | None:
        """--long-side, or its default: 2048 for 512, as published."""
        return self.long_side or (4 * self.short_side if self.short_side else None)

    def describe(self) -> str:
        """What is on, for people."""
        size = f"short side {self.short_side}" if self.short_side else "as they are"
        parts = [f"{size} times {self.scale_min:g} to {self.scale_max:g}"]
        if self.crop_max_share < 1:
            parts.append(f"one class at most {self.crop_max_share:.0%} of a crop")
        parts += [name for name, on in (("flip", self.random_flip), ("photometric", self.photometric)) if on]
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class SegmenterRunOptions(TaskRunOptions):
    """Length and validation."""

    validation_window: int | None = option(
        None, "Validate window by window of this side in pixels. Default: whole images."
    )
    validation_stride: int | None = option(None, "Pixels from a window to the next. Default: two thirds of it.")

    def __post_init__(self):
        super().__post_init__()
        positive(self, "validation_window", "validation_stride")
        goes_with(self, "validation_window", "validation_stride")
        if self.validation_window:
            within, rule = self.validation_window, f"leaves gaps between windows of {self.validation_window}"
            require_each(self, ("validation_stride",), lambda value: value <= within, rule)

    @property
    def stride(self) -> int | None:
        """--validation-stride, or its default: 170 for 256, as published."""
        window = self.validation_window
        return self.validation_stride or (max(1, window * 2 // 3) if window else None)


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig(OptionTable):
    """The segmentation trainer's options."""

    trainer: ClassVar[str] = "train_segmenter"
    model: SegmenterOptions = field(default_factory=SegmenterOptions)
    data: SegmenterDataOptions = field(default_factory=SegmenterDataOptions)
    augmentation: SegmentationAugmentationOptions = field(default_factory=SegmentationAugmentationOptions)
    optimization: TaskOptimizationOptions = field(default_factory=TaskOptimizationOptions)
    run: SegmenterRunOptions = field(default_factory=SegmenterRunOptions)


def parse_segmenter_config(arguments: list[str], about: str = "Train segmenters.") -> SegmenterConfig:
    """Read the command line and, under it, the YAML file that --config names; see `parse_options`.

    Under both lie a resumed run's own options.
    """
    return parse_options(
        arguments,
        SegmenterConfig,
        SegmenterConfig.trainer,
        about,
        functools.partial(options_of_run, SegmenterConfig.trainer),
    )
