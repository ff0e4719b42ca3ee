"""scikit-learn's handwritten digits: the set of pictures that comes with the package."""

import numpy as np
import PIL.Image

from d_emo.images.source import ImageSource

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def digits_source() -> ImageSource:
    """1,797 real scans of 8 x 8 pixels, ten classes."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError(
            "the digits come with scikit-learn; pip install 'd-emo[train]', or name a data set."
        ) from error
    digits = load_digits()
    scans = (digits.images * (255 / 16)).round().astype(np.uint8)
    return ImageSource(
        name="digits",
        size=len(scans),
        read=lambda index: PIL.Image.fromarray(scans[index]),
        labels=digits.target,
        id2label=dict(enumerate(DIGIT_NAMES)),
        channels=1,
        flip=False,
        resolution=16,
        num_workers=0,
    )
