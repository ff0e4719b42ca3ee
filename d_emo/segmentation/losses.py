"""What segmenters learn by: cross-entropy, and Dice for classes that fill few pixels."""

import torch
import torch.nn.functional as F


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignored: int, over_ignored: bool = False) -> torch.Tensor:
    """A mean over the pixels with a label, 0 where none has one.

    Args:
        logits: (B, classes, H, W).
        labels: (B, H, W), int64: classes, or `ignored`.
        over_ignored: divide by all pixels instead, as mmsegmentation 1.2.2 does by default.
    """
    total = F.cross_entropy(logits, labels, ignore_index=ignored, reduction="sum")
    return total / (labels.numel() if over_ignored else (labels != ignored).sum().clamp(min=1))


def dice_loss(logits: torch.Tensor, labels: torch.Tensor, ignored: int) -> torch.Tensor:
    """1 - 2 sum(p t) / (sum(p) + sum(t)), a mean over the classes that the labels show; 0 where they show none.

    p are probabilities and t is 1 where the label is the class; sums are over all pixels of the batch that have a label
    (V-Net, arXiv 1606.04797, with plain sums below the line). A class weighs the same however few pixels it has.

    Args:
        logits, labels, ignored: see `cross_entropy`.
    """
    known = (labels != ignored).unsqueeze(1)  # (B, 1, H, W)
    truth = F.one_hot(torch.where(known[:, 0], labels, 0), logits.shape[1]).movedim(-1, 1) * known  # (B, classes, H, W)
    probabilities = logits.softmax(dim=1) * known  # (B, classes, H, W)
    both = (probabilities * truth).sum(dim=(0, 2, 3))  # (classes,)
    total = (probabilities + truth).sum(dim=(0, 2, 3))  # (classes,)
    shown = truth.sum(dim=(0, 2, 3)) > 0  # (classes,)
    missed = 1 - 2 * both / total.clamp(min=torch.finfo(total.dtype).tiny)
    return (missed * shown).sum() / shown.sum().clamp(min=1)
