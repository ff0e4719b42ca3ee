"""What segmenters refuse: labels that they cannot learn from, and batches too small for BatchNorm, in one line each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from d_emo.classification.checks import unknown_id

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8)


def refuse_single_value(norm: nn.Module, features: torch.Tensor) -> None:
    """Refuse to train BatchNorm on one value a channel, which has no deviation.

    Args:
        norm: that follows.
        features: (B, C, h, w), what it will work on, or what a convolution makes that of.

    Raises:
        ValueError: B, h and w are 1, and the norm is in training. A synchronised one sees other processes' too.
    """
    if not (isinstance(norm, nn.BatchNorm2d) and norm.training) or torch.jit.is_tracing():
        return
    if features.shape[0] == features.shape[-2] == features.shape[-1] == 1:
        raise ValueError(
            "a batch of 1 image leaves BatchNorm a single value a channel to train on; pass 2 images or more (loaders "
            "take drop_last=True), or call eval()."
        )


def check_labels(labels: Any, pixels: torch.Tensor, classes: int, ignored: int) -> None:
    """Refuse labels that the loss cannot work on.

    Args:
        labels: (B, h, w) class ids, of the images' size or proportions.
        pixels: (B, C, H, W).
        classes: K.
        ignored: an id that the loss leaves out.

    Raises:
        ValueError: labels of another shape, type or range.
    """
    batch, _, height, width = pixels.shape
    rule = f"pass integers ({batch}, {height}, {width}) from 0 to {classes - 1}, {ignored} where nothing is known"
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"labels is a {type(labels).__name__}; {rule}.")
    shape = tuple(labels.shape)
    if labels.dim() == 4 and labels.shape[1] == 1:
        raise ValueError(f"labels have the shape {shape}; pass labels[:, 0], one id a pixel.")
    if labels.dim() != 3 or len(labels) != batch or 0 in shape:
        raise ValueError(f"labels have the shape {shape}; {rule}.")
    if labels.dtype not in _WHOLE:
        raise ValueError(f"labels are {labels.dtype}; {rule} (labels.long()).")
    # The loss resizes the logits, so that labels may be finer or coarser; never of a picture of other proportions.
    if abs(shape[1] * width - shape[2] * height) > max(height, width):
        raise ValueError(f"labels are {shape[1]} x {shape[2]}, the images {height} x {width}; {rule}.")
    unknown = unknown_id(labels, classes, ignored)
    if unknown is not None:
        remedy = " (the image processor's do_reduce_labels=True shifts ids from 1 on)" if unknown == classes else ""
        raise ValueError(f"labels have {unknown}, the model has {classes} classes; {rule}{remedy}.")


def check_ignored(classes: int, ignored: int) -> None:
    """Refuse to leave out a label that is a class.

    Raises:
        ValueError: it is one.
    """
    if 0 <= ignored < classes:
        raise ValueError(
            f"semantic_loss_ignore_index={ignored} is one of the {classes} classes; choose another, such as -100."
        )


def check_normalization(mean: Sequence[float], deviation: Sequence[float], channels: int) -> None:
    """Refuse a mean or deviation that does not fit the images.

    Raises:
        ValueError: another number of values than channels.
    """
    for name, values in (("image_mean", mean), ("image_std", deviation)):
        if len(values) != channels:
            raise ValueError(f"{name}={list(values)} has {len(values)} values; pass one a channel, {channels}.")
