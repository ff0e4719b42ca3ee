"""The function that builds a video classifier by name; the sizes are in `sizes.py`."""

from typing import Any

from d_emo.common.messages import shown
from d_emo.video.inflation import inflate
from d_emo.video.transformers_config import VEMOv2Config
from d_emo.video.transformers_models import VEMOv2ForVideoClassification

KINETICS = 400


def create_video_classifier(
    name: str = "V-EMOv2-5M", num_classes: int = KINETICS, image_classifier: Any = None, **overrides: Any
) -> VEMOv2ForVideoClassification:
    """Build a video classifier with fresh weights, or with those of an image classifier.

    Args:
        name: one of `list_video_classifiers()`.
        num_classes: Kinetics-400 has 400; 0 leaves the head out. `id2label` says itself how many there are.
        image_classifier: a trained EMOv2 of the same size, whose weights are inflated: folder, Hub id, network or
            `EMOv2ForImageClassification` (see `d_emo.video.inflation.inflate`). None for fresh weights.
        **overrides: arguments of `VEMOv2Config`, such as `num_frames=8`, `attention_type="remote"`, `id2label=[...]`.

    Raises:
        ValueError: unknown name or override, a value out of range, or an image classifier of another size.
    """
    names: Any = overrides.get("id2label")
    if hasattr(names, "__len__") and num_classes not in (len(names), KINETICS):  # what it is unless given
        raise ValueError(
            f"num_classes={shown(num_classes)}, and id2label has {len(names)} names; leave num_classes out."
        )
    classes = {} if names is not None else {"num_labels": num_classes}
    model = VEMOv2ForVideoClassification(VEMOv2Config.of(name, **{**classes, **overrides}))
    return model if image_classifier is None else inflate(model, image_classifier)
