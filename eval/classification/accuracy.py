"""What a classifier answers on a set of images: predictions, accuracy, and how they are read and prepared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from d_emo.images.decode import trim_strip
from d_emo.images.prepared import prepared
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
    def of(cls, logits: torch.Tensor, labels: torch.Tensor) -> "Predictions":
        """What logits (N, K) say of things of these classes (N,)."""
        ranked = logits.topk(min(TOP, logits.shape[1])).indices
        return cls(labels, ranked, F.cross_entropy(logits, labels, reduction="none"))

    @classmethod
    def joined(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Several sets as one; empty ones add nothing."""
        parts = [part for part in parts if len(part.labels)]
        if not parts:
            return cls(*(torch.empty(0) for _ in range(3)))
        return cls(*(torch.cat([getattr(p, name) for p in parts]) for name in ("labels", "ranked", "losses")))


class PreparedImages:
    """Images as an image processor of transformers prepares them: index -> (3, H, W), and the class id."""

    def __init__(self, source: ImageSource, processor: Any):
        self.source, self.processor = source, processor

    def __call__(self, index: int) -> tuple[torch.Tensor, int]:
        image = trim_strip(self.source.read(index).convert("RGB"))
        return self.processor(images=image, return_tensors="pt")["pixel_values"][0], int(self.source.labels[index])


def _stacked(samples: list[tuple[torch.Tensor, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, H, W) and class ids (N,)."""
    pixels, labels = zip(*samples, strict=True)
    return torch.stack(pixels), torch.tensor(labels)


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
    parts = []
    with prepared(
        source,
        PreparedImages(source, processor),
        _stacked,
        about="classifying",
        batch_size=batch_size,
        num_workers=num_workers,
        rank=rank,
        world_size=world_size,
        progress=progress,
    ) as batches:
        for images, labels in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
                logits = model(images.to(device)).logits.float().cpu()  # (B, K)
            parts.append(Predictions.of(logits, labels))
    return Predictions.joined(parts)
