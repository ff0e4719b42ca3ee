"""Backbones for detection and segmentation: fresh by a size's name, trained by the folder or Hub id of a classifier.

The published detectors and segmenters attend in windows of 10 x 10 tokens whatever the classifier had, in grids padded
up to them (configurations and logs of github:zhangzjn/EMOv2 at 582a96f). Needs no torchvision.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoImageProcessor

from d_emo.classification.preprocessing import IMAGENET_MEAN, IMAGENET_STD, by_channel
from d_emo.classification.ranges import DENSE_WINDOW, STAGES
from d_emo.classification.transformers_config import NETWORK_ARGUMENTS, EMOv2Config
from d_emo.classification.transformers_models import EMOv2Backbone
from d_emo.classification.variants import CLASSIFIERS
from d_emo.common.block_ranges import WINDOW
from d_emo.common.messages import first_line, nearest, shown
from d_emo.common.ranges import Each, Maybe, OneOf, checked
from d_emo.common.saved_folders import may_be_on_hub

# EMOv1's windows in tokens: its smaller sizes keep their classifiers' 7; its larger ones differ by the task.
SMALL_EMOV1_WINDOW, SMALL_EMOV1_WIDTH = 7, 200  # up to so many channels in the last stage: EMOv1-1M and EMOv1-2M
EMOV1_WINDOWS = {"detection": 10, "segmentation": 16}
# What may differ from a trained classifier's configuration: no weight depends on it.
FREE = ("window_size", "clip_window", "drop_path", "output_stride", "image_size", "out_features")


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
    """Whether weights come from somewhere (a folder or Hub id) instead of being drawn."""
    return str(name) not in CLASSIFIERS or Path(name).is_dir()


def known_name(kind: str, name: Any, names: Sequence[str]) -> str:
    """A published name as it is; empty for a folder and for what may be a Hub id, which nobody is asked for.

    Args:
        kind: what the message begins with.
        name: what may be one.
        names: the published ones.

    Raises:
        ValueError: it is none of these; the message offers the nearest.
    """
    if isinstance(name, str | os.PathLike) and str(name) and "\0" not in str(name):
        if Path(name).is_dir():
            return ""
        if str(name) in names:
            return str(name)
        if may_be_on_hub(name, names):
            return ""
    hint = nearest(name, names, f"pass a classifier's folder, or one of {', '.join(names)}.")
    raise ValueError(f"{kind} {shown(name)} is unknown; {hint}")


def dense_config(name: str | os.PathLike, task: str, **overrides: Any) -> EMOv2Config:
    """The configuration of a backbone under dense heads: a size's or a folder's, with the published windows.

    Args:
        name: one of `d_emo.list_classifiers()`, or folder or Hub id of a trained classifier.
        task: "detection" or "segmentation", which decides EMOv1's window.
        **overrides: arguments of `EMOv2Config`; for a trained one those that no weight depends on.

    Raises:
        ValueError: it is neither a size nor a classifier that loads, or the weights do not fit the overrides.
    """
    stored = _stored_config(name) if is_trained(name) else EMOv2Config.of(str(name), **overrides)
    said = {key: getattr(stored, key) for key in (*NETWORK_ARGUMENTS, "num_channels", "image_size")}
    for key, value in overrides.items():
        if is_trained(name) and key not in FREE and (list(value) if isinstance(value, tuple) else value) != said[key]:
            raise ValueError(
                f"{key}={shown(value)} does not fit the weights of {name}, which has {shown(said[key])}; leave it out."
            )
    return EMOv2Config(**{**said, "window_size": dense_window(stored, task), "clip_window": False, **overrides})


def _stored_config(name: str | os.PathLike) -> EMOv2Config:
    with _loading(name):
        stored = AutoConfig.from_pretrained(name)
        if not isinstance(stored, EMOv2Config):
            raise ValueError(f"it holds a model of the type {stored.model_type!r}")
        return stored


def load_backbone(name: str | os.PathLike, config: EMOv2Config) -> EMOv2Backbone:
    """A trained classifier's stages in float32, whatever they were saved in: heads are.

    Args:
        name: folder or Hub id.
        config: see `dense_config`.

    Raises:
        ValueError: the weights are not there or do not fit.
    """
    with _loading(name):
        return EMOv2Backbone.from_pretrained(name, config=config, dtype=torch.float32)


@contextlib.contextmanager
def _loading(name: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"backbone={shown(str(name))} does not load as an EMOv2 ({first_line(error)}); pass a folder or Hub id of "
            f"a trained classifier, or for fresh weights one of {', '.join(CLASSIFIERS)}."
        ) from error


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
    known_name("backbone", name, list(CLASSIFIERS))
    options: dict[str, Any] = {"out_features": list(stages), **({"window_size": window_size} if window_size else {})}
    config = dense_config(name, task, **options)
    return load_backbone(name, config) if is_trained(name) else EMOv2Backbone(config)


def normalization(name: str | os.PathLike, channels: int) -> dict[str, list[float]]:
    """The `image_mean` and `image_std` that a backbone was trained with: its folder's, else ImageNet's.

    Args:
        name: see `open_backbone`.
        channels: of the images; where there are others than colours, each has the colours' average.
    """
    mean: Sequence[float] = IMAGENET_MEAN
    deviation: Sequence[float] = IMAGENET_STD
    if is_trained(name):
        with contextlib.suppress(OSError, ValueError):  # saved without an image processor
            processor: Any = AutoImageProcessor.from_pretrained(name)
            mean, deviation = processor.image_mean, processor.image_std
    return {"image_mean": by_channel(mean, channels), "image_std": by_channel(deviation, channels)}
