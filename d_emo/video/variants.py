"""The function that builds a video classifier by name; the sizes are in `sizes.py`."""

from typing import Any

from d_emo.classification.transformers_config import number_or_names
from d_emo.video.inflation import inflate
from d_emo.video.ranges import VIDEO
from d_emo.video.transformers_config import KINETICS_CLASSES, VEMOv2Config
from d_emo.video.transformers_models import VEMOv2ForVideoClassification


def create_video_classifier(
    name: str = "V-EMOv2-5M",
    num_classes: int = KINETICS_CLASSES,
    image_classifier: Any = None,
    **overrides: Any,
) -> VEMOv2ForVideoClassification:
    """Build a video classifier with fresh weights, or with those of an image classifier.

    Args:
        name: one of `list_video_classifiers()`.
        num_classes: Kinetics-400 has 400; 0 leaves the head out.
        image_classifier: a trained EMOv2 of the same size, whose weights are inflated: folder, Hub id, network or
            `EMOv2ForImageClassification` (see `d_emo.video.inflation.inflate`). None for fresh weights.
        **overrides: arguments of `VEMOv2Config`, such as `num_frames=8`, `attention_type="remote"`; `id2label=[...]`
            says itself how many classes there are.

    Raises:
        ValueError: unknown name or override, a value out of range, or an image classifier of another size.
    """
    names = overrides.get("id2label")
    classes = number_or_names("create_video_classifier", num_classes, names, KINETICS_CLASSES, VIDEO["num_classes"])
    model = VEMOv2ForVideoClassification(VEMOv2Config.of(name, **{**classes, **overrides}))
    return model if image_classifier is None else inflate(model, image_classifier)
