"""What the papers and libraries print of how well a network does, to stand beside how fast it is.

Sources: arXiv 2412.06674, tables IV and VIII to XIII; for torchvision's networks the metadata of its weights; for
SegFormer-B0 arXiv 2105.15203 (mmsegmentation 1.2.2 lists 37.41). A score belongs to trained weights, which this
benchmark does not load, and to the data and image side beside it.
"""

from typing import Any

SIZES = ("1M", "2M", "5M", "20M", "50M")
ADE20K, COCO, IMAGENET = "mIoU, ADE20K, 512", "mAP, COCO, 800", "top-1, ImageNet, 224"
# Kind of score, and the scores of EMOv2 by size; None where the paper has none.
OF_EMOV2: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "": (IMAGENET, (72.3, 75.8, 79.4, 83.3, 84.1)),
    "deeplabv3": (ADE20K, (34.6, 36.8, 39.8, 43.3)),
    "semantic_fpn": (ADE20K, (37.1, 39.9, 42.3, 46.8)),
    "segformer": (ADE20K, (37.0, 40.2, 43.0, 47.3)),
    "pspnet": (ADE20K, (33.6, 35.7, 39.1, 43.4)),
    "retinanet": (COCO, (36.9, 39.3, 41.5, 43.8)),
    "mask_rcnn": (COCO, (37.1, 39.5, 42.3, 44.2)),
}
SSDLITE = {320: (22.3, 26.0, 29.6, 33.1), 512: (26.6, 30.7, 34.8, 38.3)}
OTHERS = {
    **{f"EMOv1-{size}": f"{top1} {IMAGENET}" for size, top1 in zip(SIZES, (71.5, 75.1, 78.4, 82.0), strict=False)},
    "U-EMOv2-5M": "89.5 mDice, HRF, 256",
    "UNet-S5-D16": "88.9 mDice, HRF, 256",
    "V-EMOv2-5M": "65.2 top-1, Kinetics-400, 160",
    "transformers:segformer-b0": f"37.4 {ADE20K}",
}
VOC_LABELS = "mIoU, COCO with VOC's 20 classes, 520"
# By torchvision's name: where its weights are found, what is in their metadata and what that is called.
TORCHVISION = {
    "deeplabv3_mobilenet_v3_large": ("DeepLabV3_MobileNet_V3_Large_Weights", "miou", VOC_LABELS),
    "lraspp_mobilenet_v3_large": ("LRASPP_MobileNet_V3_Large_Weights", "miou", VOC_LABELS),
    "ssdlite320_mobilenet_v3_large": ("SSDLite320_MobileNet_V3_Large_Weights", "box_map", "mAP, COCO, 320"),
}


def published_score(name: str, side: int) -> str:
    """The published score of a network, for people; "-" where there is none.

    Args:
        name: as `throughput` takes it, without variants.
        side: of its images in pixels.
    """
    if name in OTHERS:
        return OTHERS[name]
    library, _, rest = name.rpartition(":")
    if library == "torchvision":
        return _of_torchvision(*TORCHVISION[rest])
    backbone, _, head = name.partition("/")
    version, _, size = backbone.partition("-")
    if version != "EMOv2" or size not in SIZES:
        return "-"
    kind, scores = OF_EMOV2.get(head, (f"mAP, COCO, {side}", SSDLITE.get(side, ())))
    place = SIZES.index(size)
    return f"{scores[place]} {kind}" if place < len(scores) else "-"


def _of_torchvision(weights: str, metric: str, kind: str) -> str:
    import torchvision

    chosen: Any = torchvision.models.get_weight(f"{weights}.DEFAULT")
    (scores,) = chosen.meta["_metrics"].values()
    return f"{scores[metric]} {kind}"
