"""Scenes and findings that are written down, and sources of them."""

import numpy as np
import PIL.Image
import torch

from d_emo.images.objects import ObjectSource, Scene

SIDE = 240


def scene(boxes=(), labels=(), crowd=None, areas=None, masks=False, image_id=0, size=(SIDE, SIDE), image=None):
    """A picture's objects; areas are the boxes' unless given, masks ellipses in the boxes, size is (height, width)."""
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return Scene(
        image=PIL.Image.new("RGB", size[::-1]) if image is None else image,
        boxes=boxes,
        labels=np.array(labels, dtype=np.int64),
        masks=ellipses(boxes, size) if masks else None,
        crowd=np.zeros(len(boxes), dtype=bool) if crowd is None else np.array(crowd),
        areas=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) if areas is None else np.array(areas, dtype=np.float32),
        name=f"picture {image_id}",
        image_id=image_id,
    )


def found(boxes=(), labels=(), scores=(), masks=None):
    """What a detector answers."""
    boxes = torch.tensor(np.array(boxes, dtype=np.float32).reshape(-1, 4))
    answer = {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.int64), "scores": torch.tensor(scores)}
    return answer if masks is None else {**answer, "masks": masks}


def ellipses(boxes, size=(SIDE, SIDE)):
    """(N, H, W) bool, an ellipse in each box."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    masks = np.zeros((len(boxes), *size), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        across, down = (2 * columns - x1 - x2) / (x2 - x1), (2 * rows - y1 - y2) / (y2 - y1)
        mask[:] = across**2 + down**2 <= 1
    return masks


def scene_source(scenes, names, name="scenes"):
    """A source of them."""
    return ObjectSource(
        name=name,
        size=len(scenes),
        read=lambda index: scenes[index],
        id2label=dict(enumerate(names)),
        has_masks=all(scene.masks is not None for scene in scenes),
        counts=np.array([int((~scene.crowd).sum()) for scene in scenes]),
        sides=np.array([scene.image.size for scene in scenes]),
        fingerprint="scenes",
        num_workers=0,
    )
