"""Every option of the detection trainer, once; `engine` and `data` have those of all trainers."""

import functools
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from d_emo.common.options import (
    OptionTable,
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

# The published ratio of the longest long side to the short side, 1333 over 800.
LONG_TO_SHORT = 1333 / 800


@dataclass(frozen=True, kw_only=True)
class DetectorOptions:
    """What is trained."""

    system: Literal["ssdlite", "retinanet", "mask_rcnn"] | None = option(
        None, "The detector. Default: that of a detector that --init-from names, else retinanet."
    )
    model: str = option("EMOv2-5M", "The backbone, a name of d_emo.list_classifiers().")
    init_from: str | None = option(
        None,
        "Start from a trained classifier (folder, Hub id, or published .pth), --model aside, or from a trained "
        "detector (folder or Hub id), whose last layers are new where the classes differ.",
    )
    model_config: str | None = option(None, 'Overrides of the backbone as JSON, such as {"drop_path": 0.1}.')
    detector_config: str | None = option(
        None, 'Options of torchvision\'s detector as JSON, such as {"detections_per_img": 300}.'
    )
    resolution: int | None = option(
        None, "ssdlite: side that images are resized to; others: their short side. Default: 320, 800."
    )
    max_size: int | None = option(
        None, "retinanet, mask_rcnn: the long side is at most this. Default: 1333 for 800, others in proportion."
    )
    frozen_stages: int | None = option(
        None, "The stem and so many stages do not learn. Default: as published on a trained backbone, else 0."
    )
    fixed_statistics: bool | None = option(
        None, "The backbone's BatchNorms keep their statistics. Default: as published on a trained backbone, else no."
    )
    compile: bool = option(False, "torch.compile the backbone with its pyramid.")
    kernels: Literal["auto", "reference", "native"] | None = option(None, KERNELS_HELP)

    def __post_init__(self):
        sides = ("resolution", "max_size")
        require_each(self, sides, lambda value: 32 <= value <= 16384, "must be from 32 to 16384")
        require_each(self, ("frozen_stages",), lambda value: 0 <= value <= 4, "must be from 0 to 4")
        if self.system is not None:
            self.sizes(self.system)
        self.overrides()
        self.settings()

    def overrides(self) -> dict[str, Any]:
        """--model-config, read.

        Raises:
            ValueError: it is no JSON object.
        """
        return json_table(self, "model_config", '{"drop_path": 0}')

    def settings(self) -> dict[str, Any]:
        """--detector-config, read; likewise."""
        return json_table(self, "detector_config", '{"detections_per_img": 300}')

    def sizes(self, system: str) -> dict[str, Any]:
        """The sizes of images as the system's function takes them; empty for its own.

        Raises:
            ValueError: they do not suit the system.
        """
        if self.resolution is None and self.max_size is None:
            return {}
        if system == "ssdlite":
            require(self.max_size is None, "max_size", self.max_size, "ssdlite's images are square")
            return {"image_size": self.resolution}
        short = self.resolution or 800
        require_each(self, ("max_size",), lambda value: value >= short, f"must be --resolution {short} or more")
        return {"min_size": short, "max_size": self.max_size or round(short * LONG_TO_SHORT)}


@dataclass(frozen=True, kw_only=True)
class DetectorDataOptions(ValidationOptions):
    """What it is trained and validated on."""

    train_data_dir: str | None = option(None, "Folder of pictures, with sub-folders as the annotations name them.")
    annotations: str | None = option(
        None,
        "Their objects: COCO's instances or panoptic JSON. Default: the one .json file in that folder, or "
        "in a folder annotations in or beside it.",
    )
    mask_dir: str | None = option(
        None, "Of a panoptic JSON: the folder of its PNG files. Default: beside it, of the same name."
    )
    dataset: str | None = option(None, "Hub id of a dataset, a local dataset folder, or .parquet files; boxes alone.")
    dataset_config: str | None = option(None, "Configuration name of a Hub dataset.")
    dataset_split: str = option("train", "Split of the dataset.")
    image_column: str = option("image", "Column that holds the pictures.")
    objects_column: str = option("objects", "Column that holds the objects, each with bbox and category.")
    box_format: Literal["xywh", "xyxy"] = option(
        "xywh", "How a dataset's boxes are written: x, y, width, height, or two corners."
    )
    class_names: str | None = option(
        None, "Names of a dataset's classes in the order of the ids: a file, one a line, or JSON. Default: its own."
    )
    max_images: int | None = option(None, "Train on the first so many images only.")
    images_without_objects: Literal["drop", "keep"] = option(
        "drop", "What becomes of them in training; published runs drop them. They are validated on, always."
    )
    min_image_side: int = option(32, "Images with a shorter side are left out of training, as in published runs.")
    validation_annotations: str | None = option(None, "Its objects. Default: as for --annotations.")
    validation_mask_dir: str | None = option(None, "Its panoptic PNG files. Default: as for --mask-dir.")

    def __post_init__(self):
        super().__post_init__()
        goes_with(self, "train_data_dir", "annotations", "mask_dir")
        goes_with(self, "validation_dir", "validation_annotations", "validation_mask_dir")
        goes_with(self, "dataset", "class_names")
        positive(self, "max_images", "min_image_side")


@dataclass(frozen=True, kw_only=True)
class DetectionAugmentationOptions:
    """What becomes of a training image and its objects alike. Every draw is a function of (seed, position)."""

    zoom_out: float | None = option(
        None, "Half of the images on a canvas of up to so many sides; 1 is off. Default: 4 for ssdlite, else off."
    )
    iou_crop: bool | None = option(
        None, "Crops that overlap an object by a drawn share at least. Default: for ssdlite alone."
    )
    photometric: bool | None = option(
        None, "Change brightness, contrast, saturation and hue at random. Default: for ssdlite alone."
    )
    random_flip: bool = option(True, "Mirror images at random.")

    def __post_init__(self):
        require_each(self, ("zoom_out",), lambda value: 1 <= value <= 16, "must be from 1 to 16")


@dataclass(frozen=True, kw_only=True)
class DetectorOptimizationOptions(TaskOptimizationOptions):
    """AdamW; the defaults are those of RetinaNet and Mask R-CNN, for batches of 16."""

    learning_rate: float = option(2e-4, "The highest learning rate.")
    lr_decay_unit: Literal["step", "epoch"] = option("epoch", "cosine: whether it falls every step or every epoch.")


@dataclass(frozen=True, kw_only=True)
class DetectorRunOptions(TaskRunOptions):
    """Length and validation; the defaults are those of RetinaNet and Mask R-CNN."""

    epochs: float = option(12.0, "Passes over the training samples.", "max_train_steps")


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(OptionTable):
    """The detection trainer's options."""

    trainer: ClassVar[str] = "train_detector"
    model: DetectorOptions = field(default_factory=DetectorOptions)
    data: DetectorDataOptions = field(default_factory=DetectorDataOptions)
    augmentation: DetectionAugmentationOptions = field(default_factory=DetectionAugmentationOptions)
    optimization: DetectorOptimizationOptions = field(default_factory=DetectorOptimizationOptions)
    run: DetectorRunOptions = field(default_factory=DetectorRunOptions)


def parse_detector_config(arguments: list[str], about: str = "Train detectors.") -> DetectorConfig:
    """Read the command line and, under it, the YAML file that --config names; see `parse_options`.

    Under both lie a resumed run's own options.
    """
    return parse_options(
        arguments,
        DetectorConfig,
        DetectorConfig.trainer,
        about,
        functools.partial(options_of_run, DetectorConfig.trainer),
    )
