"""What a segmenter says of pictures of any size, and how it does on a set of them."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from d_emo.eval.segmentation.scores import SegmentationScores
from d_emo.images.pixels import LabelledPicture, PixelSource
from d_emo.images.prepared import prepared
from d_emo.segmentation.sliding import predict_in_windows

# Classes whose logits are resized to the picture at once: of 150 classes, all would take 600 bytes a pixel.
CLASSES_AT_ONCE = 16
WINDOWS_AT_ONCE = 4

# A picture with its labels, what was predicted (H, W), and the picture's own scores.
Keep = Callable[[LabelledPicture, np.ndarray, SegmentationScores], None]


class PreparedPictures:
    """Pictures as an image processor prepares them: index -> (1, 3, h, w), and the picture with its labels.

    The whole of each, whatever the processor is used to: what a classifier's habit of cutting the centre leaves would
    be laid over the whole picture.

    Args:
        source: of the pictures.
        processor: of transformers.
        options: of it, for every picture.

    Raises:
        ValueError: it fills pictures up, so that logits would not lie on them.
    """

    def __init__(self, source: PixelSource, processor: Any, options: Mapping[str, Any]):
        self.source, self.processor, self.options = source, processor, {**options}
        if getattr(processor, "do_center_crop", None):
            self.options["do_center_crop"] = False
        if getattr(processor, "do_pad", None):
            raise ValueError(
                "the model's image processor fills pictures up (do_pad), so that what the model says would not lie on "
                "them; set do_pad to false in its preprocessor_config.json."
            )

    def __call__(self, index: int) -> tuple[torch.Tensor, LabelledPicture]:
        sample = self.source.read(index)
        return self.processor(images=sample.image, return_tensors="pt", **self.options)["pixel_values"], sample


@torch.inference_mode()
def evaluate_pixels(
    model: Any,
    processor: Any,
    source: PixelSource,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = WINDOWS_AT_ONCE,
    mixed_precision: bool = False,
    num_workers: int = 0,
    progress: bool = False,
    keep: Keep | None = None,
    processor_options: Mapping[str, Any] | None = None,
) -> SegmentationScores:
    """Show a segmenter every picture of a source, or a process's share of them, one by one, and count pixels.

    Args:
        model: of transformers, in eval mode; takes (1, 3, h, w) and answers with `logits` (1, K, h', w').
        processor: prepares a picture; the labels stay as they are, and the logits are resized to them.
        source: pictures and labels by index, with the model's class ids.
        device: where the model is.
        rank, world_size: this process takes every `world_size`-th picture from `rank` on; sum the parts with `merge`.
        window: side of windows in pixels of the prepared picture; None for whole pictures.
        stride: pixels from a window to the next; None for two thirds of a window.
        batch_size: windows at once.
        mixed_precision: autocast to bfloat16.
        num_workers: loader processes.
        progress: show how far it is.
        keep: called with every picture, in order.
        processor_options: of the processor for every picture, such as `do_resize` and `size`.

    Raises:
        UnreadableImageError: a picture or its labels cannot be read; every picture counts.
        ValueError: the model has other classes than the source, or refuses a picture.
    """
    scores = SegmentationScores(len(source.id2label))
    with prepared(
        source,
        PreparedPictures(source, processor, processor_options or {}),
        about="segmenting",
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
        progress=progress,
    ) as pictures:
        for pixels, sample in pictures:
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
                logits = picture_logits(model, pixels.to(device), window, stride, batch_size)  # (1, K, h', w')
            if logits.shape[1] != scores.num_classes:
                raise ValueError(
                    f"the model has {logits.shape[1]} classes, {source.name} {scores.num_classes}; both need the same."
                )
            predicted = likeliest(logits, sample.labels.shape)[0]  # (H, W)
            alone = SegmentationScores(scores.num_classes)
            alone.update(predicted, sample.labels)
            scores.merge(alone)
            if keep is not None:
                keep(sample, predicted.cpu().numpy(), alone)
    return scores


def picture_logits(
    model: Any, pixels: torch.Tensor, window: int | None, stride: int | None, batch_size: int = WINDOWS_AT_ONCE
) -> torch.Tensor:
    """(B, 3, h, w) -> (B, K, h', w') float32: on the head's own grid, or from windows (B, K, h, w)."""
    if window is None:
        return model(pixels).logits.float()
    return predict_in_windows(model, pixels, window, default_stride(window) if stride is None else stride, batch_size)


def default_stride(window: int) -> int:
    """Pixels from a window to the next: two thirds of it, 170 of 256 as published."""
    return max(1, 2 * window // 3)


def likeliest(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, K, h, w), resized bilinearly to (H, W) -> (B, H, W) class ids; a few classes at a time."""
    best: torch.Tensor | None = None
    for first in range(0, logits.shape[1], CLASSES_AT_ONCE):
        some = logits[:, first : first + CLASSES_AT_ONCE]
        if some.shape[2:] != size:
            some = F.interpolate(some, size, mode="bilinear", align_corners=False)  # (B, k, H, W)
        values, ids = some.max(dim=1)  # (B, H, W)
        ids += first
        if best is None:
            best, chosen = values, ids
        else:
            better = values > best
            best, chosen = torch.where(better, values, best), torch.where(better, ids, chosen)
    assert best is not None  # there is a class
    return chosen
