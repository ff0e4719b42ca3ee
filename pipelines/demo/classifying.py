"""What a classifier says of a picture."""

from pathlib import Path
from typing import Any

from d_emo.images.decode import decode, trim_strip

TOP = 5


def classify(classifier: Any, file: str | Path) -> tuple[tuple[int, int], dict[str, float]]:
    """A picture's width and height, and its most likely classes with their probabilities, the likeliest first.

    Args:
        classifier: transformers' image-classification pipeline.
        file: a picture of any kind that is trained on; of a long strip the middle is looked at.

    Raises:
        ValueError: the file cannot be read as a picture.
    """
    picture = decode(file, Path(file).name)
    classes = len(classifier.model.config.id2label)
    answers = classifier(trim_strip(picture), top_k=min(TOP, classes))
    return picture.size, {answer["label"]: float(answer["score"]) for answer in answers}
