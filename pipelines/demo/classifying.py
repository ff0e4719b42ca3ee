"""What a classifier says of a picture."""

from typing import Any

import PIL.Image

from d_emo.common.messages import shown

TOP = 5


def classify(classifier: Any, picture: PIL.Image.Image | None) -> dict[str, float]:
    """The most likely classes of a picture and their probabilities, the likeliest first.

    Args:
        classifier: transformers' image-classification pipeline.
        picture: of any mode and size.

    Raises:
        ValueError: there is no picture.
    """
    if not isinstance(picture, PIL.Image.Image):
        raise ValueError(f"picture={shown(picture)} is none; drop one in, or choose a file.")
    classes = len(classifier.model.config.id2label)
    answers = classifier(picture.convert("RGB"), top_k=min(TOP, classes))
    return {answer["label"]: float(answer["score"]) for answer in answers}
