"""Our networks of images and clips by the names that commands take, with fresh weights.

`EMOv2-5M` is a classifier, `EMOv2-5M/segformer` a segmenter, `EMOv2-5M/retinanet` a detector, `U-EMOv2-5M` a segmenter
as a whole and `V-EMOv2-5M` a video classifier.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from d_emo import create_classifier, create_segmenter, list_classifiers, list_segmenters
from d_emo.segmentation.ranges import HEADS

DETECTORS = ("ssdlite", "retinanet", "mask_rcnn")


@dataclass(frozen=True)
class Kind:
    """A kind of network.

    Attributes:
        title: what it is, for people.
        names: those of its networks.
        build: name and image side in pixels -> the network.
        side: of the published input, in pixels.
        frames: of a clip; 0 for images.
    """

    title: str
    names: Callable[[], list[str]]
    build: Callable[[str, int], Any]
    side: int
    frames: int = 0


def _of_backbones(heads: tuple[str, ...]) -> Callable[[], list[str]]:
    return lambda: [f"{backbone}/{head}" for backbone in list_classifiers() for head in heads]


def _whole() -> list[str]:
    return [name for name in list_segmenters() if name not in list_classifiers()]


def _videos() -> list[str]:
    from d_emo import list_video_classifiers

    return list_video_classifiers()


def _segmenter(name: str, side: int) -> Any:
    """Of any size of image."""
    backbone, _, head = name.partition("/")
    return create_segmenter(backbone, head)


def _detector(name: str, side: int) -> Any:
    from d_emo import detection  # needs torchvision

    backbone, _, head = name.partition("/")
    if head == "ssdlite":
        return detection.ssdlite(backbone, image_size=side)
    return getattr(detection, head)(backbone, min_size=side, max_size=max(side, round(side * 1333 / 800)))


def _video(name: str, side: int) -> Any:
    from d_emo import create_video_classifier

    return create_video_classifier(name, image_size=side)


KINDS = (
    Kind("classifier", list_classifiers, lambda name, side: create_classifier(name, side), 224),
    Kind("segmenter", _of_backbones(HEADS), _segmenter, 512),
    Kind("segmenter", _whole, lambda name, _: create_segmenter(name, num_classes=2), 256),
    Kind("detector", _of_backbones(("ssdlite",)), _detector, 320),
    Kind("detector", _of_backbones(("retinanet", "mask_rcnn")), _detector, 800),
    Kind("video classifier", _videos, _video, 160, frames=4),
)


def kind_of(name: str) -> Kind | None:
    """The kind of a network of ours, None for other names."""
    return next((kind for kind in KINDS if name in kind.names()), None)


def names_in_words() -> str:
    """The names, for a message."""
    whole = [name for kind in KINDS for name in kind.names() if "/" not in name]
    return f"{', '.join(whole)}; a classifier's name with /{', /'.join((*HEADS, *DETECTORS))}"
