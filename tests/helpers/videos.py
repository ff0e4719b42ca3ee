"""Small videos, made up: frame i is one grey that tells i, or a bar moves. And weights so large that motion shows."""

import io

import numpy as np
import pytest
import torch

from helpers.models import randomize

STEP = 8


def grey(number):
    """The value that fills a frame."""
    return 16 + STEP * (number % 28)


def write_video(path, count=20, width=48, height=32, codec="mpeg4", gop=5, times=None, picture=None, container=None):
    """A video file of `count` frames at 10 a second, or at `times` in milliseconds.

    Args:
        picture: number -> (H, W, 3) uint8; None for plain greys.
        container: format where the name does not tell it.
    """
    av = pytest.importorskip("av", reason="needs the extra video")
    with av.open(str(path) if not isinstance(path, io.BytesIO) else path, "w", format=container) as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        stream.options = {"sc_threshold": "1000000000"}  # no keyframes but those
        if times is not None:
            from fractions import Fraction

            stream.codec_context.time_base = Fraction(1, 1000)
        for number in range(count):
            pixels = np.full((height, width, 3), grey(number), np.uint8) if picture is None else picture(number)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number if times is None else times[number]
            if times is not None:
                frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def bar(direction, seed, side=32):
    """Frame number -> a picture of a bright bar that moves left or right (-1, 1), or stays (0), over noise."""
    drawn = np.random.default_rng(seed)
    start, height = drawn.integers(side), drawn.integers(side // 2)
    ground = drawn.integers(0, 60, (side, side, 3))

    def picture(number):
        pixels = ground.copy()
        pixels[height : height + side // 2, (start + np.arange(side // 4) + direction * 3 * number) % side] = 230
        return pixels.astype(np.uint8)

    return picture


def write_bars(root, count=3, frames=8, side=32, classes=("left", "right", "stay"), first=0):
    """A folder of class folders of videos of moving bars, those of each class over the same pictures."""
    for name in classes:
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture = bar({"left": -1, "right": 1}.get(name, 0), index + first, side)
            write_video(root / name / f"{index}.mp4", frames, side, side, picture=picture)
    return root


def numbers_of(clip):
    """Which frames these are, of (T, 3, H, W) uint8 of a video of fewer than 28."""
    return [round((float(frame.float().mean()) - 16) / STEP) for frame in clip]


@torch.no_grad()
def large(model):
    """Random weights so large that logits depend on the pixels more than on the biases; in eval mode."""
    randomize(model)
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1:
            tensor.mul_(4)
        elif name.endswith("layer_scale"):
            tensor.fill_(1.0)
        elif name.endswith(("bias", "running_mean")):
            tensor.mul_(0.1)
    return model.eval()
