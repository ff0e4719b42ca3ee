"""Mask R-CNN's parts where the published runs differ from torchvision's: outputs, pooling, losses (as mmdet 3.3.0's).

Shapes: B images, N boxes of all of them, K classes of objects, C channels, M side of a mask.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign, roi_align

from d_emo.detection.boxes import at_least_float32

BOX_FEATURES = 1024
MASK_CHANNELS = 256
# A box of so many pixels goes to the finest level, one of twice the size to the next.
FINEST_SIDE = 56


class BoxPredictor(nn.Module):
    """Scores of K classes and the background, boxes of the K classes alone.

    torchvision expects a box of the background in front, and leaves it out again; it is zero here and no parameter.
    """

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.cls_score = nn.Linear(in_channels, num_classes + 1)
        self.bbox_pred = nn.Linear(in_channels, num_classes * 4)
        for layer, deviation in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, C) -> scores (N, 1 + K), the background first, and boxes (N, 4 + 4 K)."""
        scores, boxes = self.cls_score(features), self.bbox_pred(features)
        return at_least_float32(scores), at_least_float32(F.pad(boxes, (4, 0)))


class MaskPredictor(MaskRCNNPredictor):
    """Masks of K classes; see `BoxPredictor` for the background's."""

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__(in_channels, MASK_CHANNELS, num_classes)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(N, C, M / 2, M / 2) -> logits (N, 1 + K, M, M)."""
        return at_least_float32(F.pad(super().forward(features), (0, 0, 0, 0, 1, 0)))


class ProposalHead(RPNHead):
    """torchvision's, whose outputs are float32 under autocast too: boxes are made of them."""

    def forward(self, x: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Maps (B, C, h, w) -> objectness (B, A, h, w) and boxes (B, 4 A, h, w) of each."""
        objectness, boxes = super().forward(x)
        return [at_least_float32(level) for level in objectness], [at_least_float32(level) for level in boxes]


class ProposalsWithL1(RegionProposalNetwork):
    """torchvision's region proposals, whose boxes learn by L1 (torchvision: smooth L1 with beta 1/9)."""

    def compute_loss(
        self,
        objectness: torch.Tensor,
        pred_bbox_deltas: torch.Tensor,
        labels: list[torch.Tensor],
        regression_targets: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Means over the sampled anchors: cross-entropy of all, L1 of those on an object. Both are scalars."""
        positive, negative = (torch.where(torch.cat(part))[0] for part in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        wanted = torch.cat(regression_targets)[positive]
        boxes = F.l1_loss(pred_bbox_deltas[positive], wanted, reduction="sum") / sampled.numel()
        classes = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], torch.cat(labels)[sampled])
        return classes, boxes


class RoIAlignOfLevels(MultiScaleRoIAlign):
    """RoIAlign (arXiv 1703.06870) with as many samples a cell as it has pixels, and pixels' centres at .5.

    torchvision's own takes 2 x 2 samples and is half a pixel off (`aligned=False`).

    Args:
        size: cells along a side of the result.
        strides: of the four finest levels, in pixels.
    """

    def __init__(self, size: int, strides: list[int]):
        super().__init__(["0", "1", "2", "3"], size, sampling_ratio=0)
        self.strides = strides[:4]

    def forward(self, x: dict[str, torch.Tensor], boxes: list[torch.Tensor], image_shapes: Any) -> torch.Tensor:
        """Maps (B, C, h, w) by name and boxes (n, 4) of each image -> (N, C, size, size)."""
        maps = [x[name] for name in self.featmap_names]
        images = torch.cat([torch.full_like(some[:, :1], number) for number, some in enumerate(boxes)])
        rois = at_least_float32(torch.cat([images, torch.cat(boxes)], dim=1))  # (N, 5)
        side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        level = (side / FINEST_SIDE + 1e-6).log2().floor().clamp(0, len(maps) - 1)  # (N,)
        pooled = maps[0].new_zeros(rois.shape[0], maps[0].shape[1], *self.output_size)
        for number, (features, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.where(level == number)[0]
            # CPUs have no kernel for bfloat16.
            values = roi_align(features.to(rois.dtype), rois[chosen], self.output_size, 1 / stride, 0, aligned=True)
            pooled[chosen] = values.to(pooled.dtype)
        return pooled


class RoIHeadsWithL1(RoIHeads):
    """torchvision's heads on proposals; boxes learn by L1 (torchvision: smooth L1 with beta 1/9), masks are 0 or 1."""

    def forward(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        """Maps and proposals (n, 4) of each image -> what was found in each, or in training the losses."""
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)  # (N, 256, 7, 7)
        scores, boxes = self.box_predictor(self.box_head(pooled))  # (N, 1 + K), (N, 4 + 4 K)
        classes = torch.cat(labels)  # (N,), 0 is the background
        on_objects = torch.where(classes > 0)[0]
        chosen = boxes.unflatten(1, (-1, 4))[on_objects, classes[on_objects]]  # (P, 4)
        losses = {
            "loss_classifier": F.cross_entropy(scores, classes),
            "loss_box_reg": F.l1_loss(chosen, torch.cat(deltas)[on_objects], reduction="sum") / classes.numel(),
        }
        assert targets is not None
        kept = [torch.where(some > 0)[0] for some in labels]
        proposals = [some[index] for some, index in zip(proposals, kept, strict=True)]
        masks = [
            self._masks_in_boxes(target["masks"], some, objects[index])
            for target, some, objects, index in zip(targets, proposals, matched, kept, strict=True)
        ]
        pooled = self.mask_roi_pool(features, proposals, image_shapes)  # (P, 256, 14, 14)
        logits = self.mask_predictor(self.mask_head(pooled))  # (P, 1 + K, 28, 28)
        logits = logits[torch.arange(len(on_objects), device=logits.device), classes[on_objects]]  # (P, 28, 28)
        wanted = torch.cat(masks).to(logits.dtype)
        # A mean over no mask is none; the sum keeps the head in the graph.
        learns = F.binary_cross_entropy_with_logits(logits, wanted) if logits.numel() else logits.sum()
        return [], {**losses, "loss_mask": learns}

    def _masks_in_boxes(self, masks: torch.Tensor, boxes: torch.Tensor, objects: torch.Tensor) -> torch.Tensor:
        """Masks (n, H, W) of an image, cut out by boxes (P, 4) of its objects (P,) -> (P, M, M), true or false."""
        side = 2 * self.mask_roi_pool.output_size[0]
        rois = torch.cat([objects[:, None].to(boxes.dtype), boxes], dim=1)
        return roi_align(masks[:, None].to(boxes.dtype), rois, (side, side), 1.0, 0, aligned=True)[:, 0] >= 0.5
