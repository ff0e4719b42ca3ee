"""Every trainer with the options of a tiny run, and who writes its data."""

from d_emo.train import train_classifier, train_detector, train_dit, train_segmenter, train_video_classifier
from helpers import classifiers, masks, object_files, training, video_training
from helpers.masks import write_masks
from helpers.object_files import write_instances
from helpers.videos import write_bars

# By name: its module, options, and a function that writes data into a folder (the others have the digits).
TRAINERS = {
    "diffusion": (train_dit, training.TINY, None),
    "classifier": (train_classifier, classifiers.TINY, None),
    "segmenter": (train_segmenter, masks.TINY, write_masks),
    "detector": (train_detector, object_files.TINY, write_instances),
    "video": (train_video_classifier, video_training.TINY, write_bars),
}
