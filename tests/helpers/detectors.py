"""Small detectors with random weights, and scenes for them."""

import json

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F

from d_emo import EMOv2Config, EMOv2ForImageClassification
from d_emo.detection import mask_rcnn, retinanet, ssdlite
from d_emo.detection.saved import make_detector
from helpers.models import randomize

BUILDERS = [retinanet, mask_rcnn, ssdlite]
NARROW = {"depths": (1, 1, 2, 2), "widths": (16, 16, 32, 32), "head_dims": (8, 8, 16, 16)}
CLASSES = 3


def trained_folder(folder, **options):
    """The folder of a narrow classifier with random weights; returns its path."""
    config = EMOv2Config.of("EMOv2-1M", **{**NARROW, "image_size": 64, "num_labels": 3, **options})
    classifier = EMOv2ForImageClassification(config)
    randomize(classifier.emov2)
    classifier.save_pretrained(folder)
    return str(folder)


def detector(build, backbone="EMOv2-1M", **options):
    """A detector of few candidates on small images, its backbone's weights random."""
    small = {"image_size": 64} if build is ssdlite else {"min_size": 64, "max_size": 96}
    if build is mask_rcnn:
        small |= {"rpn_post_nms_top_n_train": 8, "rpn_post_nms_top_n_test": 8, "box_batch_size_per_image": 8}
    torch.manual_seed(0)
    model = build(backbone, **{"num_classes": CLASSES, **small, **options})
    randomize(model.backbone.backbone)
    return model


def write_detector(folder, names, system="ssdlite", **options):
    """A narrow detector of small images, saved; its backbone's weights are random. Returns the folder."""
    torch.manual_seed(0)
    sizes = {"image_size": 64} if system == "ssdlite" else {"min_size": 64, "max_size": 64}
    bundle = make_detector(system, "EMOv2-1M", dict(enumerate(names)), network=NARROW, **sizes, **options)
    randomize(bundle.model.backbone.backbone)
    bundle.save_pretrained(folder)
    return folder


def target(image, boxes=1, label=1, box=(4.0, 4.0, 30.0, 30.0)):
    """So many boxes in an image, all the same."""
    height, width = image.shape[1:]
    return {"boxes": torch.tensor([box]).repeat(boxes, 1), "labels": torch.full((boxes,), label),
            "masks": torch.ones(boxes, height, width, dtype=torch.uint8)}  # fmt: skip


def coco_scenes(shared, names, side):
    """Photos of ../shared/data/dense/coco, their longer side so many pixels: images, targets, and how many classes.

    Classes are numbered from 0 in the order in which they occur.
    """
    folder = shared / "data" / "dense" / "coco" / "train"
    listed = json.loads((folder / "panoptic.json").read_text())
    things = {category["id"] for category in listed["categories"] if category["isthing"]}
    numbers, images, targets = {}, [], []
    for entry in listed["annotations"]:
        if entry["file_name"].removesuffix(".png") not in names:
            continue
        photo = np.array(PIL.Image.open(folder / "images" / entry["file_name"].replace(".png", ".jpg")).convert("RGB"))
        ids = np.array(PIL.Image.open(folder / "panoptic" / entry["file_name"])).astype(np.int64) @ [1, 256, 65536]
        parts = [part for part in entry["segments_info"] if part["category_id"] in things]
        scale = side / max(photo.shape[:2])
        size = [round(scale * length) for length in photo.shape[:2]]
        pixels = torch.from_numpy(photo).permute(2, 0, 1)[None] / 255
        images.append(F.interpolate(pixels, size, mode="bilinear", antialias=True)[0])
        masks = torch.stack([torch.from_numpy(ids == part["id"]) for part in parts])
        x, y, width, height = torch.tensor([part["bbox"] for part in parts]).float().unbind(1)
        targets.append(
            {
                "boxes": torch.stack([x, y, x + width, y + height], dim=1) * scale,
                "labels": torch.tensor([numbers.setdefault(part["category_id"], len(numbers)) for part in parts]),
                "masks": F.interpolate(masks[None].float(), size)[0] > 0.5,
            }
        )
    return images, targets, len(numbers)
