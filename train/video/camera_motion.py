"""Videos of a camera that moves over photos: classes that no single frame tells, with the photos' own terms.

A square window moves left, right, up, down, in (it shrinks), out, or stays. Where it begins, how large it is and how
far it goes are drawn, and in the same way for a motion and for its opposite, so that a network that ignores time stays
at one in seven, and a video played backwards is one of the opposite class. Photos of the test are none of those that
are trained on.
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL.Image

from d_emo.common.output import Progress
from d_emo.images.source import ImageSource
from d_emo.video.reading import pyav

# Direction along x and y, and of the window's growth; the opposite of each class has the opposite signs.
MOTIONS = {
    "down": (0, 1, 0),
    "in": (0, 0, -1),
    "left": (-1, 0, 0),
    "out": (0, 0, 1),
    "right": (1, 0, 0),
    "stay": (0, 0, 0),
    "up": (0, -1, 0),
}
# As shares of the photo's shorter side: the window's, and how far it moves or by how much it grows in all.
WINDOW, WAY = (0.45, 0.6), (0.15, 0.35)
# Photos are enlarged so many times at most.
ENLARGED = 4
RATE = 8


def windows(
    motion: str, width: int, height: int, frames: int, generator: np.random.Generator
) -> list[tuple[float, float, float, float]]:
    """The window at each frame: left, top, right, bottom in pixels of the photo.

    Args:
        motion: one of MOTIONS.
        width, height: of the photo.
        frames: of the video.
        generator: of all that is drawn.
    """
    along_x, along_y, growth = MOTIONS[motion]
    short = min(width, height)
    side, way = short * generator.uniform(*WINDOW), short * generator.uniform(*WAY)
    # The middle of the way lies anywhere where all of it stays within the photo, whatever the motion.
    room = (side + way) / 2
    middle = [generator.uniform(room, size - room) for size in (width, height)]
    found = []
    for share in np.linspace(-0.5, 0.5, frames):
        half = (side + growth * way * share) / 2
        x, y = middle[0] + along_x * way * share, middle[1] + along_y * way * share
        found.append((x - half, y - half, x + half, y + half))
    return found


def pictures(
    photo: PIL.Image.Image, motion: str, frames: int, side: int, seed: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """The frames of a video, each (side, side, 3) uint8."""
    photo = photo.convert("RGB")
    for box in windows(motion, *photo.size, frames, np.random.default_rng(seed)):
        yield np.asarray(photo.resize((side, side), PIL.Image.Resampling.BILINEAR, box=box))


def write_video(path: Path, frames: Iterator[np.ndarray], side: int) -> None:
    """A video file, MPEG-4, at RATE frames a second."""
    av = pyav()
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=RATE)
        stream.width = stream.height = side
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        stream.options = {"qmin": "2", "qmax": "4"}  # still photos show what a coarser one leaves out
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def write_videos(
    photos: ImageSource, folder: Path, *, held_out: int, frames: int, side: int, per_class: int, seed: int
) -> dict[str, int]:
    """A folder of videos: train/CLASS and test/CLASS, of other photos.

    Args:
        photos: to move over.
        folder: that is written into.
        held_out: photos, the last of a random order, for the test.
        frames, side: of the videos, in pixels.
        per_class: videos of each class and photo.
        seed: of all that is drawn.

    Returns:
        How many videos each part has.

    Raises:
        ValueError: a photo is smaller than a video's frame, or unreadable.
    """
    order = np.random.default_rng(seed).permutation(photos.size)
    parts = {"train": order[: photos.size - held_out], "test": order[photos.size - held_out :]}
    total = photos.size * len(MOTIONS) * per_class
    with Progress(total, "video", "writing", leave=False) as bar:
        for part, indices in parts.items():
            for motion in MOTIONS:
                (folder / part / motion).mkdir(parents=True)
            for index in indices.tolist():
                photo = photos.read(index)
                if min(photo.size) * WINDOW[0] < side / ENLARGED:
                    raise ValueError(
                        f"photo {index} of {photos.name} has {photo.width} x {photo.height} pixels, too few for videos "
                        f"of {side}; choose a smaller --resolution, or larger photos."
                    )
                for number, motion in enumerate(MOTIONS):
                    for turn in range(per_class):
                        path = folder / part / motion / f"{index:05}-{turn}.mp4"
                        drawn = (seed, index, number, turn)
                        write_video(path, pictures(photo, motion, frames, side, drawn), side)
                        bar.update()
    return {part: len(indices) * len(MOTIONS) * per_class for part, indices in parts.items()}
