"""What a detector finds in a set of pictures, scored; each process its share."""

from collections.abc import Callable
from typing import Any

import torch

from d_emo.eval.detection.scores import MASK_THRESHOLD, DetectionScores
from d_emo.images.decode import to_pixels
from d_emo.images.objects import ObjectSource, Scene
from d_emo.images.prepared import prepared

# A picture with its objects, and what was found there, on the CPU; masks are (n, H, W) bool.
Keep = Callable[[Scene, dict[str, torch.Tensor]], None]


class PreparedScenes:
    """Pictures as a detector takes them: index -> (channels, H, W) uint8, and the picture with its objects."""

    def __init__(self, source: ObjectSource, channels: int):
        self.source, self.channels = source, channels

    def __call__(self, index: int) -> tuple[torch.Tensor, Scene]:
        scene = self.source.read(index)
        pixels = torch.from_numpy(to_pixels(scene.image, self.channels).copy())  # (H, W, channels)
        return pixels.permute(2, 0, 1), scene


@torch.inference_mode()
def evaluate_objects(
    model: Any,
    source: ObjectSource,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    mixed_precision: bool = False,
    num_workers: int = 0,
    progress: bool = False,
    keep: Keep | None = None,
) -> DetectionScores:
    """Show a detector every picture of a source, or a process's share of them, and score what it finds.

    Each picture goes through alone: beside a larger one it would be padded, and other things would be found.

    Args:
        model: of `d_emo.detection`, in eval mode; its labels are the source's.
        source: scenes by index.
        device: where the model is.
        rank, world_size: this process takes every `world_size`-th picture from `rank` on.
        mixed_precision: autocast to bfloat16.
        num_workers: loader processes.
        progress: show how far it is.
        keep: called with every picture, in order.

    Returns:
        The share's scores, of masks too where the detector finds masks and the source has them; `merge` joins shares.

    Raises:
        UnreadableImageError: a picture cannot be decoded; every picture counts.
        ValueError: the detector refuses a picture; the message names it.
    """
    scores = DetectionScores(len(source.id2label), masks=source.has_masks and finds_masks(model))
    with prepared(
        source,
        PreparedScenes(source, getattr(model, "image_channels", 3)),
        about="detecting in",
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
        progress=progress,
    ) as scenes:
        for pixels, scene in scenes:
            try:
                with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
                    (answer,) = model([pixels.to(device).float() / 255])
            except ValueError as error:
                raise ValueError(f"{scene.name}: {error}") from error
            found = {name: values for name, values in answer.items() if name != "masks"}
            found = {name: values.cpu() for name, values in found.items()}
            if scores.masks:
                found["masks"] = (answer["masks"][:, 0] > MASK_THRESHOLD).cpu()
            scores.update([found], [scene])
            if keep is not None:
                keep(scene, found)
    return scores


def finds_masks(model: Any) -> bool:
    """Whether a detector finds masks."""
    from torchvision.models.detection import MaskRCNN

    return isinstance(model, MaskRCNN)
