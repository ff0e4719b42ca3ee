"""A video classifier's videos: those to train on and those to validate on, with one table of classes."""

from d_emo.common.options import blamed
from d_emo.images.labels import read_class_names
from d_emo.train.data.sources import with_validation
from d_emo.train.video.config import VideoDataOptions
from d_emo.video.folders import ClipSource, open_videos


def load_sources(data: VideoDataOptions) -> tuple[ClipSource, ClipSource | None]:
    """The videos to train on and those to validate on, with the same class ids.

    Raises:
        ValueError: none were named, either does not open, or their classes differ.
        ImportError: PyAV is not installed.
    """
    if data.train_data_dir:
        named = f"--train-data-dir {data.train_data_dir}"
    elif data.dataset:
        named = f"--dataset {data.dataset}"
    else:
        raise ValueError("no data was named: --train-data-dir FOLDER (one sub-folder of videos a class), or --dataset.")
    return with_validation(data, _load(data, named), _load, data.validation_share)


def _load(data: VideoDataOptions, named: str) -> ClipSource:
    with blamed(named):
        return open_videos(
            data.train_data_dir,
            data.dataset,
            config=data.dataset_config,
            split=data.dataset_split,
            video_column=data.video_column,
            label_column=data.label_column,
            class_names=read_class_names(data.class_names) if data.class_names else None,
        )
