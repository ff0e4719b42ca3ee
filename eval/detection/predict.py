"""What a detector finds in a set of pictures, scored; each process its share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from d_emo.common.output import Progress
from d_emo.common.processes import leave_interrupts
from d_emo.eval.detection.scores import MASK_THRESHOLD, DetectionScores
from d_emo.images.decode import UnreadableImageError, to_pixels
from d_emo.images.objects import ObjectSource, Scene

# A picture with its objects, and what was found there, on the CPU; masks are (n, H, W) bool.
Keep = Callable[[Scene, dict[str, torch.Tensor]], None]


class PreparedScenes(Dataset):
    """Pictures as a detector takes them, with their objects; messages in place of unreadable ones."""

    def __init__(self, source: ObjectSource, channels: int, indices: Sequence[int]):
        self.source = source
        self.channels = channels
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[torch.Tensor | None, Scene | None, str]:
        try:
            scene = self.source.read(self.indices[number])
        except UnreadableImageError as error:
            return None, None, str(error)
        pixels = torch.from_numpy(to_pixels(scene.image, self.channels).copy())  # (H, W, channels) uint8
        return pixels.permute(2, 0, 1), scene, ""


def _as_it_is(sample: Any) -> Any:
    return sample


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
    loader = DataLoader(
        PreparedScenes(source, getattr(model, "image_channels", 3), range(rank, source.size, world_size)),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        worker_init_fn=leave_interrupts,
        generator=torch.Generator(),  # a run that is validated must not draw otherwise than one that is not
    )
    scores = DetectionScores(len(source.id2label), masks=source.has_masks and finds_masks(model))
    with Progress(source.size, "image", f"detecting in {source.name}", shown=progress, leave=False) as bar:
        for pixels, scene, message in loader:
            if message:
                raise UnreadableImageError(f"{message}. Repair or remove it.")
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
            bar.update(world_size)  # the other processes are about as far
    return scores


def finds_masks(model: Any) -> bool:
    """Whether a detector finds masks."""
    from torchvision.models.detection import MaskRCNN

    return isinstance(model, MaskRCNN)
