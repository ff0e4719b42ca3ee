"""What `make_camera_motion` does after it has read its options."""

import argparse

import numpy as np

from d_emo.common.files import check_apart, check_writable, holds_something, written_folder
from d_emo.common.options import blamed
from d_emo.images.open_source import open_source
from d_emo.images.source import subset
from d_emo.train.video.camera_motion import write_videos
from d_emo.video.reading import pyav


def run(options: argparse.Namespace) -> None:
    """Draw the videos into a new folder, which appears whole or not at all.

    Raises:
        ValueError: there are too few photos, or the folder holds something.
    """
    pyav()
    folder = options.output_dir
    check_apart(folder, "--output-dir", {"--photos": options.photos})
    check_writable(folder, "--output-dir", folder=True)
    if holds_something(folder):
        raise ValueError(f"--output-dir {folder} is not empty; choose a new folder.")
    named = str(options.photos)
    with blamed(f"--photos {named}"):
        folder_of_photos = named if options.photos.is_dir() or not named.endswith(".parquet") else None
        photos = open_source(folder_of_photos, named, unconditional=True)
    chosen = np.random.default_rng(options.seed).permutation(photos.size)[: options.num_photos]
    photos = subset(photos, np.sort(chosen))
    if options.held_out >= photos.size:
        raise ValueError(
            f"--held-out {options.held_out} of {photos.size} photos leaves none to train on; hold fewer out."
        )
    with written_folder(folder) as partial:
        counts = write_videos(
            photos,
            partial,
            held_out=options.held_out,
            frames=options.frames,
            side=options.resolution,
            per_class=options.per_class,
            seed=options.seed,
        )
    print(f"{counts['train']:,} videos to train on and {counts['test']:,} to test on in {folder}")
