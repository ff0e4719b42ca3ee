"""From options to everything a segmenter's run needs: data, network, what prepares pictures for it."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from d_emo.images.masks import PixelSource
from d_emo.models.flops import count_macs_on
from d_emo.segmentation.ranges import WITH_AUXILIARY
from d_emo.segmentation.transformers_models import (
    ADE20K_SIDES,
    SegmentationPreTrainedModel,
    make_segmentation_processor,
)
from d_emo.segmentation.unet_config import UEMOv2Config
from d_emo.segmentation.variants import WHOLE_NETWORKS
from d_emo.train.engine.batch_layout import BatchLayout
from d_emo.train.engine.cards import class_list
from d_emo.train.engine.fit import time_of_training
from d_emo.train.engine.memory import told, training_memory
from d_emo.train.engine.task_plan import TaskPlan, resolved_length, start_name
from d_emo.train.segmentation.config import SegmenterConfig
from d_emo.train.segmentation.networks import build_network


@dataclass(frozen=True, kw_only=True)
class SegmenterPlan(TaskPlan):
    """A run, resolved: no option is left at "default".

    Attributes:
        config: the options.
        source, validation: pictures with their labels.
    """

    config: SegmenterConfig
    source: PixelSource
    validation: PixelSource | None

    @property
    def model_name(self) -> str:
        """What to call the model."""
        return model_name(self.config)

    def build_model(self) -> SegmentationPreTrainedModel:
        """See `TaskPlan.build_model`."""
        return build_network(self.config.model, self.source.id2label)

    def usage_lines(self, weights: str) -> list[str]:
        """How the result is used, in lines of Python.

        Args:
            weights: folder or Hub id.
        """
        window = self.config.run.validation_window
        if window is None:
            return [
                "import d_emo  # makes transformers know EMOv2",
                "from transformers import pipeline",
                "",
                f'segment = pipeline("image-segmentation", {json.dumps(weights)})',
                'print(segment("photo.jpg"))',
            ]
        return [
            "import PIL.Image",
            "from d_emo import predict_in_windows",
            "from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation",
            "",
            f"model = AutoModelForSemanticSegmentation.from_pretrained({json.dumps(weights)})",
            f"processor = AutoImageProcessor.from_pretrained({json.dumps(weights)})",
            'pixels = processor(PIL.Image.open("photo.jpg"), return_tensors="pt").pixel_values',
            f"print(predict_in_windows(model, pixels, {window}, {self.config.run.stride}).argmax(1))",
        ]

    def lines(self, model: Any) -> dict[str, str]:
        """See `TaskPlan.lines`."""
        side = self.config.model.crop_size
        shapes = copy.deepcopy(model).to("meta")  # at 512 pixels the larger ones would take seconds
        macs = count_macs_on(shapes, torch.zeros(1, model.config.num_channels, side, side, device="meta"))
        seen = self.max_train_steps * self.layout.global_batch_size
        options = self.config.run
        names = list(self.source.id2label.values())
        windows = f"windows of {options.validation_window} every {options.stride} pixels"
        duration = time_of_training(macs, seen, self.launch)
        return {
            "classes": class_list(names),
            "crops": f"{side} x {side} pixels, {macs / 1e9:.3g} GMACs each (forward){duration and ', ' + duration}",
            "augment": self.config.augmentation.describe(),
            "scored on": windows if options.validation_window else "whole images",
            "memory": told(lambda: self.describe_memory(model.train())),
        }

    def describe_memory(self, model: Any) -> str:
        """What a step of the network holds, for people."""
        batch, side = self.layout.micro_batch_size, self.config.model.crop_size
        channels = model.config.num_channels
        memory = training_memory(
            model,
            self.launch,
            self.make_optimizer,
            lambda: model(torch.empty(batch, channels, side, side, memory_format=torch.channels_last)).logits,
        )
        return memory.describe("adamw", f"micro batch {batch}")


def make_segmenter_plan(
    config: SegmenterConfig, source: PixelSource, validation: PixelSource | None, accelerator: Accelerator
) -> SegmenterPlan:
    """Resolve every default and check that the parts fit.

    Raises:
        ValueError: they do not; the message names the option and the remedy.
    """
    if len(source.id2label) < 2:
        raise ValueError(
            f"the masks of {source.name} have one class, {source.id2label[0]!r}; a segmenter needs two or more: "
            "a single object has the background beside it (--class-names names classes that the masks do not show)."
        )
    resolved = resolved_length(config, source, accelerator, config.optimization.asked_warmup)
    model = build_network(config.model, source.id2label)
    check_fits(config, model.config, resolved["layout"], validation is not None)
    short, long = config.augmentation.short_side, config.augmentation.longest
    sides = {"shortest_edge": short, "longest_edge": long} if short and long else ADE20K_SIDES
    processor = make_segmentation_processor(model.config.image_mean, model.config.image_std, sides)
    processor.do_resize = short is not None
    return SegmenterPlan(
        config=config,
        source=source,
        validation=validation,
        processor=processor,
        output_dir=output_dir(config, source),
        **resolved,
    )


def check_fits(config: SegmenterConfig, network: Any, layout: BatchLayout, validates: bool) -> None:
    """Refuse sides and batches that the network cannot take, before anything is computed.

    Args:
        config: the options.
        network: the model's configuration.
        layout: of the batch.
        validates: whether there are pictures to validate on.

    Raises:
        ValueError: the message names the option and the remedy.
    """
    if layout.micro_batch_size == 1 and getattr(network, "head", "deeplabv3") in WITH_AUXILIARY:
        raise ValueError(
            f"--global-batch-size {layout.describe()} at once: this head averages each whole crop, and BatchNorm "
            "learns from two or more of these; use more at once, or --head segformer or semantic_fpn."
        )
    if not isinstance(network, UEMOv2Config):
        return
    multiple, window = 2 ** (network.depth - 1), config.run.validation_window
    for name, side in (("--crop-size", config.model.crop_size), ("--validation-window", window)):
        if side is not None and side % multiple:
            fitting = max(multiple, side // multiple * multiple)
            raise ValueError(f"{name} {side}: this network takes multiples of {multiple}; use {fitting}.")
    if validates and window is None:
        raise ValueError(
            f"--validation-window is missing: this network takes sides that are multiples of {multiple}, which "
            f"pictures rarely have; name the windows' side, such as {config.model.crop_size}."
        )


def model_name(config: SegmenterConfig) -> str:
    """--model and --head, or what --init-from is called."""
    options, name = config.model, start_name(config.model)
    head = options.head or ("deeplabv3" if not options.init_from and options.model not in WHOLE_NETWORKS else None)
    return name if head is None or name.endswith(head) else f"{name}-{head}"


def output_dir(config: SegmenterConfig, source: PixelSource) -> Path:
    """Where the run is written."""
    return config.run.folder(model_name(config), source.name)
