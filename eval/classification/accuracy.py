"""What a classifier answers on a set of images: predictions, accuracy, and how they are read and prepared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from d_emo.common.output import Progress
from d_emo.common.processes import leave_interrupts
from d_emo.images.decode import UnreadableImageError, trim_strip
from d_emo.images.source import ImageSource

TOP = 5


@dataclass(frozen=True)
class Predictions:
    """Answers, one row an image.

    Attributes:
        labels: (N,) true class ids.
        ranked: (N, 5) the most probable classes, the first one first; fewer columns where there are fewer classes.
        losses: (N,) cross-entropies in nats.
    """

    labels: torch.Tensor
    ranked: torch.Tensor
    losses: torch.Tensor

    def accuracy(self, top: int = 1) -> float:
        """Share of images whose class is among the `top` most probable ones, in [0, 1]."""
        return float((self.ranked[:, :top] == self.labels[:, None]).any(dim=1).float().mean())

    def hardest(self) -> tuple[int, float]:
        """The class of which the smallest share is recognised, and that share in [0, 1]; the first of several."""
        counts = torch.bincount(self.labels)
        found = torch.bincount(self.labels[self.ranked[:, 0] == self.labels], minlength=len(counts))
        shares = (found / counts).nan_to_num(nan=2.0)  # classes without an image come last
        return int(shares.argmin()), float(shares.min())

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats."""
        return float(self.losses.mean())

    @property
    def scores(self) -> tuple[float, float, float]:
        """Top-1 and top-5 accuracy in [0, 1], and the loss."""
        return self.accuracy(1), self.accuracy(5), self.loss

    def describe(self, id2label: Mapping[int, str], things: str) -> str:
        """The scores and the hardest class, for people.

        Args:
            id2label: class names by id.
            things: what was classified.
        """
        top1, top5, loss = self.scores
        label, found = self.hardest()
        return (
            f"top-1 {top1:.2%}, top-5 {top5:.2%}, loss {loss:.4f} ({len(self.labels):,} {things}), hardest "
            f"{id2label[label]} {found:.1%}"
        )

    @classmethod
    def joined(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Several sets as one; empty ones add nothing."""
        parts = [part for part in parts if len(part.labels)]
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("labels", "ranked", "losses")))


class PreparedImages(Dataset):
    """Images as an image processor of transformers prepares them; messages in place of unreadable ones."""

    def __init__(self, source: ImageSource, processor: Any, indices: Sequence[int]):
        self.source = source
        self.processor = processor
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int, str]:
        index = self.indices[number]
        try:
            image = trim_strip(self.source.read(index).convert("RGB"))
        except UnreadableImageError as error:
            return torch.empty(0), 0, str(error)
        pixels = self.processor(images=image, return_tensors="pt")["pixel_values"][0]  # (3, H, W)
        return pixels, int(self.source.labels[index]), ""


def _collate(samples: Sequence[tuple[torch.Tensor, int, str]]) -> tuple[Any, Any, str]:
    """A batch, or the message of its first unreadable image: raised where the user sees it, not in a loader process."""
    pixels, labels, messages = zip(*samples, strict=True)
    message = next((message for message in messages if message), "")
    return (None, None, message) if message else (torch.stack(pixels), torch.tensor(labels), "")


@torch.inference_mode()
def predict(
    model: Any,
    source: ImageSource,
    processor: Any,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    mixed_precision: bool = False,
    progress: bool = False,
) -> Predictions:
    """Show a classifier every image of a source, or a process's share of them.

    Args:
        model: of transformers, in eval mode; takes (B, 3, H, W) and answers with `logits` (B, K).
        source: images by index, with the model's class ids.
        processor: prepares an image.
        batch_size: images at once.
        num_workers: loader processes.
        device: where the model is.
        rank, world_size: this process takes every `world_size`-th image from `rank` on.
        mixed_precision: autocast to bfloat16.
        progress: show how far it is.

    Raises:
        UnreadableImageError: an image cannot be decoded; every image counts.
    """
    indices = range(rank, source.size, world_size)
    loader = DataLoader(
        PreparedImages(source, processor, indices),
        batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        worker_init_fn=leave_interrupts,
        generator=torch.Generator(),  # a run that is validated must not draw otherwise than one that is not
    )
    parts = []
    with Progress(source.size, "image", f"classifying {source.name}", shown=progress, leave=False) as bar:
        for images, labels, message in loader:
            if message:
                raise UnreadableImageError(f"{message}. Repair or remove it.")
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
                logits = model(images.to(device)).logits.float().cpu()  # (B, K)
            ranked = logits.topk(min(TOP, logits.shape[1])).indices
            parts.append(Predictions(labels, ranked, F.cross_entropy(logits, labels, reduction="none")))
            bar.update(len(labels) * world_size)  # the other processes are about as far
    return Predictions.joined(parts) if parts else Predictions(*(torch.empty(0) for _ in range(3)))
