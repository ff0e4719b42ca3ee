"""A model as a file holds it: a tensor in, tensors out."""

import sys
from typing import Any

import torch
from torch import nn

from d_emo.export.inputs import REMEDY

OUTPUT, BOXES = "logits", "boxes"


class Logits(nn.Module):
    """A classifier or segmenter of transformers, or a plain network, with a tensor in and a tensor out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) or clips (B, T, C, H, W) -> logits (B, K), or (B, K, h, w) of a segmenter.

        Raises:
            ValueError: the model has no logits.
        """
        output = self.model(pixel_values)
        logits = output if isinstance(output, torch.Tensor) else getattr(output, OUTPUT, None)
        if logits is None:
            raise ValueError(f"model is a {type(self.model).__name__}, which gives no logits; {REMEDY}.")
        return logits


class Candidates(nn.Module):
    """A one-stage detector of torchvision's classes without its transform and without what chooses boxes.

    Args:
        model: a RetinaNet or an SSD.
        pixel_values: (B, C, H, W), images of the size that it will be given.
    """

    anchors: torch.Tensor

    def __init__(self, model: Any, pixel_values: torch.Tensor):
        super().__init__()
        from torchvision.models.detection.image_list import ImageList

        self.model = model
        self.size = (pixel_values.shape[-2], pixel_values.shape[-1])
        with torch.no_grad():
            images = ImageList(pixel_values[:1], [self.size])
            anchors = model.anchor_generator(images, list(model.backbone(pixel_values[:1]).values()))[0]
        self.register_buffer("anchors", anchors)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C, H, W), normalised -> logits (B, A, K) and boxes (B, A, 4) of A anchors, (x1, y1, x2, y2) in pixels.

        RetinaNet's logits are for a sigmoid, SSD's for a softmax whose first class is the background.
        """
        from torchvision.ops import clip_boxes_to_image

        found = self.model.head(list(self.model.backbone(pixel_values).values()))
        shifts = found["bbox_regression"]  # (B, A, 4)
        anchors = self.anchors.expand(shifts.shape)
        boxes = self.model.box_coder.decode_single(shifts.reshape(-1, 4), anchors.reshape(-1, 4)).reshape(shifts.shape)
        return found["cls_logits"], clip_boxes_to_image(boxes, self.size)


def as_network(model: nn.Module, pixel_values: torch.Tensor) -> Logits | Candidates:
    """The part of a model that a file holds.

    Args:
        model: a classifier, a segmenter or a detector, in eval mode.
        pixel_values: what it will be given, of the size that stays.

    Raises:
        ValueError: it is a detector of two stages.
    """
    # A model of its classes has imported it.
    detection: Any = sys.modules.get("torchvision.models.detection")
    if detection and isinstance(model, detection.RetinaNet | detection.ssd.SSD):
        return Candidates(model, pixel_values).eval()
    if detection and isinstance(model, detection.generalized_rcnn.GeneralizedRCNN):
        raise ValueError(
            f"model is a {type(model).__name__.lstrip('_')}, whose second stage works on as many boxes as the first "
            "one finds, which torch.export does not take; export RetinaNet or SSDLite, or use "
            "torch.onnx.export(model, ([image],), path, dynamo=False)."
        )
    return Logits(model).eval()
