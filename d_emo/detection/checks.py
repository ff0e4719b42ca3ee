"""What the detectors refuse: options, images and targets that they cannot work on, in one line each.

Values on a GPU are not looked at, which would wait for it; shapes and types are.
"""

import difflib
import inspect
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from d_emo.common.block_ranges import SIDE
from d_emo.common.messages import shown
from d_emo.common.ranges import Each, Real, Rule, Table, Whole, take

# A box may reach so many pixels beyond its image: annotations are rounded.
SLACK = 1.0
# Values may be so many of the model's deviations from its mean: -1.8 to 2.7 with ImageNet's, for what resizing and
# augmentation add to [0, 1]; numbers to 255, and images that are normalised already, are beyond.
DEVIATIONS = 10
SHARE, COUNT = Real(0, 1), Whole(1, 10_000_000)
# torchvision's options that are numbers; `min_size` may be several, of which training draws one.
OPTIONS: Table = {
    **dict.fromkeys(("score_thresh", "nms_thresh", "fg_iou_thresh", "bg_iou_thresh", "iou_thresh"), SHARE),
    **dict.fromkeys(("positive_fraction", "box_positive_fraction", "rpn_positive_fraction"), Real(0, 1, positive=True)),
    **dict.fromkeys(("box_score_thresh", "box_nms_thresh", "box_fg_iou_thresh", "box_bg_iou_thresh"), SHARE),
    **dict.fromkeys(("rpn_score_thresh", "rpn_nms_thresh", "rpn_fg_iou_thresh", "rpn_bg_iou_thresh"), SHARE),
    **dict.fromkeys(("detections_per_img", "topk_candidates", "box_detections_per_img"), COUNT),
    **dict.fromkeys(("box_batch_size_per_image", "rpn_batch_size_per_image"), COUNT),
    **dict.fromkeys(("rpn_pre_nms_top_n_train", "rpn_pre_nms_top_n_test"), COUNT),
    **dict.fromkeys(("rpn_post_nms_top_n_train", "rpn_post_nms_top_n_test"), COUNT),
    **dict.fromkeys(("max_size", "size_divisible"), SIDE),
}
SEVERAL = Each(SIDE, 1, 100)
# None stands for the published one.
MAY_BE_NONE: Table = {
    "image_mean": Each(Real(), 1, 4096),
    "image_std": Each(Real(0, positive=True), 1, 4096),
    "fixed_size": Each(SIDE, 2, 2),
    "bbox_reg_weights": Each(Real(0, positive=True), 4, 4),
}
OBJECTS = {
    "anchor_generator": AnchorGenerator,
    "rpn_anchor_generator": AnchorGenerator,
    "head": nn.Module,
    "proposal_matcher": Matcher,
}


def check_options(name: str, kind: type[nn.Module], options: dict[str, Any], ours: Collection[str]) -> dict[str, Any]:
    """torchvision's options of a detector, checked.

    Args:
        name: of the function that they were passed to.
        kind: torchvision's class, which would drop what it does not know.
        options: by name.
        ours: of torchvision's, those that the function sets itself.

    Returns:
        The options without those that are None for the published one; numbers are Python's own.

    Raises:
        ValueError: it has no such option, or a number is out of range.
    """
    known = {*inspect.signature(kind).parameters, *inspect.signature(GeneralizedRCNNTransform).parameters}
    known -= {"self", "kwargs", "backbone", "num_classes", *ours}
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, sorted(known), n=3)
            meant = f"; did you mean {', '.join(close)}?" if close else f"; it has {', '.join(sorted(known))}."
            raise ValueError(f"{name} has no option {option}{meant}")
    nothing = {option for option in options if options[option] is None and option in (*MAY_BE_NONE, *OBJECTS)}
    options = {option: value for option, value in options.items() if option not in nothing}
    for option, wanted in OBJECTS.items():
        if option in options and not isinstance(options[option], wanted):
            raise ValueError(f"{name}: {option}={shown(options[option])} is no {wanted.__name__}.")
    sides: Rule = SEVERAL if isinstance(options.get("min_size"), list | tuple) else SIDE
    return take(name, options, {**OPTIONS, **MAY_BE_NONE, "min_size": sides})


def check_scene(images: Any, channels: int, transform: GeneralizedRCNNTransform) -> None:
    """Refuse images that a detector cannot work on.

    Args:
        images: tensors (C, H, W) in [0, 1], as a list or as one (B, C, H, W); C is 1 (greys) or `channels`.
        channels: of the backbone's images.
        transform: resizes them.

    Raises:
        ValueError: something does not fit, values included where they are on the CPU; the message says which image.
    """
    rule = f"({channels}, H, W)"
    if not isinstance(images, list | tuple | torch.Tensor) or (isinstance(images, torch.Tensor) and not images.dim()):
        raise ValueError(f"images is a {type(images).__name__}; pass a list of tensors {rule} in [0, 1].")
    if not len(images):
        raise ValueError(f"images are none; pass a list of at least one tensor {rule} in [0, 1].")
    for number, image in enumerate(images):
        fits = isinstance(image, torch.Tensor) and image.dim() == 3 and image.shape[0] in (1, channels)
        if not fits or not image.numel():
            given = tuple(image.shape) if isinstance(image, torch.Tensor) else type(image).__name__
            raise ValueError(f"images[{number}] is {given}; pass a tensor {rule}, or (1, H, W) of greys.")
        if not image.is_floating_point():
            most = 1 if image.dtype == torch.bool or image.is_complex() else torch.iinfo(image.dtype).max
            remedy = f" (image / {most})" if most > 1 else ""
            raise ValueError(f"images[{number}] is {image.dtype}; pass numbers in [0, 1]{remedy}.")
        short, long = sorted(image.shape[1:])
        if transform.fixed_size is None and short * transform.max_size < long:
            height, width = image.shape[1:]
            raise ValueError(
                f"images[{number}] has {height} x {width} pixels, and no height or no width is left where the longer "
                f"side is {transform.max_size} (max_size); crop it."
            )
        _check_values(f"images[{number}]", image, transform)


def _check_values(name: str, image: torch.Tensor, transform: GeneralizedRCNNTransform) -> None:
    """Refuse values that the model's mean and deviation are not for."""
    if image.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return
    means, deviations = transform.image_mean, transform.image_std
    lowest = min(mean - DEVIATIONS * deviation for mean, deviation in zip(means, deviations, strict=True))
    highest = max(mean + DEVIATIONS * deviation for mean, deviation in zip(means, deviations, strict=True))
    low, high = (float(bound) for bound in image.detach().as_subclass(torch.Tensor).aminmax())
    if not lowest <= low <= high <= highest:
        remedy = "pass numbers in [0, 1]"
        if max(means) > 1:
            remedy = f"image_mean={means} and image_std={deviations} are not for them"
        elif highest < high and low >= 0:
            remedy += f" (image / {255 if high <= 255 else 65535})" if high <= 65535 else ""
        elif low < 0:
            remedy += ", which the model normalises itself"
        raise ValueError(f"{name} has values from {low:g} to {high:g}; {remedy}.")


def in_image_type(boxes: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    """Boxes in the type of their image, float32 at least.

    In another type ties between anchors, and so what is learned, would come out otherwise.
    """
    return boxes.as_subclass(torch.Tensor).to(torch.promote_types(image.dtype, torch.float32))


def check_targets(targets: Any, images: Any, num_classes: int, masks: bool) -> None:
    """Refuse what a detector cannot learn from.

    Args:
        targets: one dictionary an image: boxes (N, 4) as (x1, y1, x2, y2) in pixels, labels (N,) from 0 to
            `num_classes` - 1, and masks (N, H, W) of 0 and 1 if `masks`; N may be 0.
        images: see `check_scene`, which they passed.
        num_classes: classes of objects.
        masks: whether masks are learned.

    Raises:
        ValueError: something does not fit; the message says which image's.
    """
    if not isinstance(targets, list | tuple) or len(targets) != len(images):
        given = f"{len(targets)} for {len(images)} images" if isinstance(targets, list | tuple) else "missing"
        raise ValueError(f"targets are {given}; in training pass one dictionary an image, else call eval().")
    for number, (image, target) in enumerate(zip(images, targets, strict=True)):
        name = f"targets[{number}]"
        _check_shapes(name, target, image, masks)
        if target["boxes"].device.type == "cpu":
            _check_boxes(name, in_image_type(target["boxes"], image), *image.shape[1:])
        if target["labels"].device.type == "cpu":
            _check_labels(name, target["labels"], num_classes)
        if masks and target["masks"].device.type == "cpu":
            _check_masks(name, target["masks"])


def _check_shapes(name: str, target: Any, image: torch.Tensor, masks: bool) -> None:
    wanted = ["boxes", "labels", *(["masks"] if masks else [])]
    absent = [part for part in wanted if not isinstance(target, dict) or not isinstance(target.get(part), torch.Tensor)]
    if absent:
        remedy = "; without objects boxes are torch.zeros(0, 4)" if len(absent) == len(wanted) else ""
        raise ValueError(f"{name} has no tensor {' and '.join(absent)}; pass {', '.join(wanted)}{remedy}.")
    boxes, labels = target["boxes"], target["labels"]
    objects = len(boxes) if boxes.dim() else 0
    shapes = {"boxes": (objects, 4), "labels": (objects,), "masks": (objects, *image.shape[1:])}
    for part in wanted:
        if tuple(target[part].shape) != shapes[part]:
            remedy = "; without objects pass torch.zeros(0, 4)" if part == "boxes" and not boxes.numel() else ""
            raise ValueError(f"{name}: {part} have the shape {tuple(target[part].shape)}, not {shapes[part]}{remedy}.")
    if boxes.dtype == torch.bool or boxes.is_complex():
        raise ValueError(f"{name}: boxes are {boxes.dtype}; pass numbers (x1, y1, x2, y2) in pixels.")
    written = getattr(getattr(boxes, "format", None), "value", "XYXY")  # of torchvision's tv_tensors
    if written != "XYXY":
        raise ValueError(f"{name}: boxes are {written}; pass (x1, y1, x2, y2): ConvertBoundingBoxFormat('XYXY').")
    if labels.dtype != torch.int64:
        raise ValueError(f"{name}: labels are {labels.dtype}; pass labels.long().")


def _check_boxes(name: str, boxes: torch.Tensor, height: int, width: int) -> None:
    """Corners in pixels of the image, the first one above and left of the second."""
    boxes = boxes.detach().double()
    corners = "; boxes are (x1, y1, x2, y2), corners in pixels"
    sides = boxes[:, 2:] - boxes[:, :2]  # (N, 2), width and height
    end = boxes.new_tensor([width, height])
    outside = (boxes[:, :2] < -SLACK) | (boxes[:, 2:] > end + SLACK)
    for wrong, what, remedy in (
        (~boxes.isfinite(), "is not finite", corners),
        (sides == 0, "has no width or no height", "; leave it out"),
        (sides < 0, "ends before it begins", f"{corners}, not (x, y, width, height)"),
        (outside, f"is outside of the image of {height} x {width} pixels", f"{corners}; clip them, or leave it out"),
    ):
        if wrong.any():
            number = int(torch.where(wrong.any(dim=1))[0][0])
            values = ", ".join(f"{value:g}" for value in boxes[number].tolist())
            raise ValueError(f"{name}: boxes[{number}] = ({values}) {what}{remedy}.")


def _check_labels(name: str, labels: torch.Tensor, num_classes: int) -> None:
    if not labels.numel() or 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        return
    wrong = next(label for label in labels.tolist() if not 0 <= label < num_classes)
    raise ValueError(
        f"{name}: labels have {wrong}; they are 0 to {num_classes - 1}, the background has none: subtract 1 if they "
        "begin with 1, as torchvision's do, and number ids that have gaps, as COCO's 1 to 90, in their order."
    )


def _check_masks(name: str, masks: torch.Tensor) -> None:
    if masks.dtype == torch.bool or not masks.numel():
        return
    low, high = (float(bound) for bound in masks.aminmax())
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{name}: masks have values from {low:g} to {high:g}; pass 0 and 1 (masks > 0).")
    if masks.is_floating_point() and not bool(((masks == 0) | (masks == 1)).all()):
        raise ValueError(f"{name}: masks have values between 0 and 1; pass 0 and 1 (masks > 0.5).")
