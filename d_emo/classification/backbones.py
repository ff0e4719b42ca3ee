"""Backbones for detection and segmentation: fresh by a size's name, trained by the folder or Hub id of a classifier.

The published detectors and segmenters attend in windows of 10 x 10 tokens whatever the classifier had, in grids padded
up to them (configurations and logs of github:zhangzjn/EMOv2 at 582a96f). Needs no torchvision.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoImageProcessor

from d_emo.classification.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from d_emo.classification.ranges import STAGES
from d_emo.classification.transformers_models import EMOv2Backbone, EMOv2Config
from d_emo.classification.variants import CLASSIFIERS
from d_emo.common.block_ranges import WINDOW
from d_emo.common.messages import first_line, shown
from d_emo.common.ranges import Each, Maybe, OneOf, checked

# The side of a window in tokens. EMOv1's smaller sizes keep their classifiers' 7; its larger ones differ by the task.
DENSE_WINDOW = 10
SMALL_EMOV1_WINDOW, SMALL_EMOV1_WIDTH = 7, 200  # up to so many channels in the last stage: EMOv1-1M and EMOv1-2M
EMOV1_WINDOWS = {"detection": 10, "segmentation": 16}


def dense_window(config: EMOv2Config, task: str) -> int:
    """The published window of a backbone under dense heads, in tokens.

    Args:
        config: of the backbone.
        task: "detection" or "segmentation".

    Returns:
        10; for EMOv1 7 (1M, 2M), or 10 in detection and 16 in segmentation (5M; EMOv1-20M, of which nothing was
        published, is taken as 5M).
    """
    if config.version != 1:
        return DENSE_WINDOW
    return SMALL_EMOV1_WINDOW if config.widths[-1] <= SMALL_EMOV1_WIDTH else EMOV1_WINDOWS[task]


def is_trained(name: str | os.PathLike) -> bool:
    """Whether `open_backbone` takes weights from somewhere (a folder or Hub id) instead of drawing them."""
    return str(name) not in CLASSIFIERS or Path(name).is_dir()


@checked(
    {
        "stages": Each(OneOf(("stem", *(f"stage{number}" for number in range(1, STAGES + 1)))), 1, STAGES + 1),
        "task": OneOf(tuple(EMOV1_WINDOWS)),
        "window_size": Maybe(WINDOW),
    }
)
def open_backbone(
    name: str | os.PathLike, stages: Sequence[str], task: str = "segmentation", window_size: int | None = None
) -> EMOv2Backbone:
    """A backbone that returns the feature maps of these stages.

    Args:
        name: one of `d_emo.list_classifiers()` (fresh weights), or folder or Hub id of a trained classifier.
        stages: of "stem", "stage1" to "stage4".
        task: "detection" or "segmentation", which decides EMOv1's window.
        window_size: in tokens, whatever the folder says; None for the published one (`dense_window`). Grids are padded
            up to it.

    Raises:
        ValueError: it is neither a size nor a classifier that loads.
    """
    if not isinstance(name, str | os.PathLike) or not str(name):
        raise ValueError(
            f"backbone={shown(name)} is no name of a backbone; pass one of {', '.join(CLASSIFIERS)}, or a folder."
        )
    options: dict[str, Any] = {"out_features": list(stages), "clip_window": False}
    if not is_trained(name):
        config = EMOv2Config.of(str(name), **options)
        config.window_size = window_size or dense_window(config, task)
        return EMOv2Backbone(config)
    try:
        stored = AutoConfig.from_pretrained(name)
        if not isinstance(stored, EMOv2Config):
            raise ValueError(f"it holds a model of the type {stored.model_type!r}")
        window = window_size or dense_window(stored, task)
        return EMOv2Backbone.from_pretrained(name, window_size=window, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"backbone={shown(str(name))} does not load as an EMOv2 ({first_line(error)}); pass a folder or Hub id of "
            f"a trained classifier, or for fresh weights one of {', '.join(CLASSIFIERS)}."
        ) from error


def normalization(name: str | os.PathLike, channels: int) -> dict[str, list[float]]:
    """The `image_mean` and `image_std` that a backbone was trained with: its folder's, else ImageNet's.

    Args:
        name: see `open_backbone`.
        channels: of the images; where there are others than colours, each has the colours' average.
    """
    mean, deviation = list(IMAGENET_MEAN), list(IMAGENET_STD)
    if is_trained(name):
        with contextlib.suppress(OSError, ValueError):  # saved without an image processor
            processor: Any = AutoImageProcessor.from_pretrained(name)
            mean, deviation = list(processor.image_mean), list(processor.image_std)
    if len(mean) != channels:
        mean, deviation = [sum(mean) / len(mean)] * channels, [sum(deviation) / len(deviation)] * channels
    return {"image_mean": mean, "image_std": deviation}
