"""A classifier's images: those to train on and those to validate on, with one table of classes."""

from d_emo.images.source import HELD_OUT_SHARE, ImageSource
from d_emo.train.classification.config import ClassifierDataOptions
from d_emo.train.data.sources import load_source, with_validation


def load_sources(data: ClassifierDataOptions) -> tuple[ImageSource, ImageSource | None]:
    """The images to train on and those to validate on, with the same class ids.

    Raises:
        ValueError: either does not open, or their classes differ.
    """
    share = data.validation_share
    if share is None:
        share = HELD_OUT_SHARE if not (data.dataset or data.train_data_dir) else 0.0
    return with_validation(data, load_source(data), load_source, share)
