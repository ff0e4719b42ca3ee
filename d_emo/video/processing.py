"""How clips become the input of V-EMOv2: transformers' video processor, with the published choice of frames.

Source: the published training log's validation: short side 160, centre crop 160, mean 114.75 and deviation 57.375 of
255 in every channel; the video in equal parts, the middle frame of each. Bilinear resizing is inferred.
Needs torchvision; files are read by PyAV (`reading.py`). This module is imported while transformers imports its own
processors (`d_emo.registration`), so that it asks for none of those.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.models.auto.video_processing_auto import AutoVideoProcessor
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from d_emo.common.block_ranges import SIDE
from d_emo.common.ranges import Real, Table, checked, take
from d_emo.video.ranges import FRAMES
from d_emo.video.reading import Video, middles
from d_emo.video.transformers_config import VEMOv2Config

MEAN, DEVIATION = 114.75 / 255, 57.375 / 255
# So far from the mean a value may be, in deviations: what resizing and augmentation add to a frame is nearer.
DEVIATIONS = 10
CHOICE: Table = {"num_frames": FRAMES, "fps": Real(0, 1000, positive=True)}


class VEMOv2VideoProcessor(BaseVideoProcessor):
    """Chooses, resizes, crops and normalises the frames of clips: `processor(videos)["pixel_values"]`, (B, T, C, H, W).

    A video is a path, an address, a tensor or array (N, C, H, W) or (N, H, W, C) of 0 to 255, a list of pictures; or a
    list of those. Of every one `num_frames` frames are taken, the middle ones of as many equal parts, of arrays and
    lists too (of as many pictures: all). `do_sample_frames=False` takes all frames, `fps` that many a second of a file.
    Numbers are 0 to 255, or 0 to 1 with `do_rescale=False`.
    """

    resample = PILImageResampling.BILINEAR
    size = {"shortest_edge": 160}
    default_to_square = False
    crop_size = {"height": 160, "width": 160}
    image_mean = [MEAN] * 3
    image_std = [DEVIATION] * 3
    do_resize = do_center_crop = do_rescale = do_normalize = do_convert_rgb = do_sample_frames = True
    num_frames = 4
    model_input_names = ["pixel_values"]

    def preprocess(self, videos: Any, **options: Any) -> BatchFeature:
        """One video or several -> `pixel_values`, (B, T, C, H, W).

        Raises:
            ValueError: no video, one without frames, values of another range, or options out of range.
        """
        given = {name: options[name] for name in CHOICE if options.get(name) is not None}
        take("video processor", given, CHOICE)
        if len(given) > 1:
            raise ValueError(f"num_frames={given['num_frames']} and fps={given['fps']} are two choices; pass one.")
        batch = super().preprocess(_plain(videos), **options)
        batch["pixel_values"] = batch.pop("pixel_values_videos")
        return batch

    def _preprocess(self, videos: list[torch.Tensor], **options: Any) -> BatchFeature:  # type: ignore[override]
        for number, video in enumerate(videos):
            _check_frames(f"videos[{number}]", video, options)
        return super()._preprocess(videos, **options)

    def sample_frames(
        self, metadata: VideoMetadata, num_frames: int | None = None, fps: float | None = None, **options: Any
    ) -> np.ndarray:
        """The numbers of the frames to take, from 0 on."""
        count = int(metadata.total_num_frames)
        if not count:
            raise ValueError("a video has no frame; pass one frame at least.")
        if fps is not None:
            if not metadata.fps:
                raise ValueError(
                    f"fps={fps:g} needs to know how fast a video is; pass num_frames, or a file that says it."
                )
            num_frames = max(1, round(count / metadata.fps * fps))
        return np.array(middles(count, num_frames or self.num_frames))

    def fetch_videos(
        self, video_url_or_urls: Any, sample_indices_fn: Callable[..., Any] | None = None
    ) -> tuple[torch.Tensor, VideoMetadata] | list[Any]:
        """Frames of a file (T, C, H, W) and what is known of it, or of each file of a list."""
        if isinstance(video_url_or_urls, list):
            return list(zip(*[self.fetch_videos(name, sample_indices_fn) for name in video_url_or_urls], strict=True))
        with Video(video_url_or_urls) as video:
            metadata = VideoMetadata(
                total_num_frames=len(video),
                fps=video.fps,
                duration=video.duration,
                height=video.height,
                width=video.width,
                video_backend="pyav",
            )
            chosen = range(len(video)) if sample_indices_fn is None else sample_indices_fn(metadata=metadata)
            metadata.frames_indices = [int(number) for number in chosen]
            return video.frames(metadata.frames_indices), metadata


def _plain(videos: Any) -> Any:
    """Paths as strings, and pictures in RGB, which transformers then takes."""
    if isinstance(videos, list | tuple):
        if not len(videos):
            raise ValueError("videos are none; pass a video or a list of some.")
        return [_plain(video) for video in videos]
    if isinstance(videos, dict):
        raise ValueError("videos is a dict; pass a video or a list of some.")
    if isinstance(videos, os.PathLike):
        return os.fspath(videos)
    if isinstance(videos, PIL.Image.Image):
        if videos.mode.startswith(("I", "F")):
            raise ValueError(f"a picture is of mode {videos.mode}, whose range is unknown; pass one of 8 bits.")
        return videos.convert("RGB")
    return videos


def _check_frames(name: str, frames: torch.Tensor, options: dict[str, Any]) -> None:
    """Refuse frames (T, C, H, W) without a pixel, and values that mean and deviation are not for."""
    if not frames.numel():
        raise ValueError(f"{name} has the shape {tuple(frames.shape)}: no pixel.")
    if frames.device.type != "cpu" or frames.is_complex() or not options["do_normalize"]:
        return
    whole = 1 / options["rescale_factor"] if options["do_rescale"] else 1.0
    low, high = (float(bound) for bound in frames.as_subclass(torch.Tensor).float().aminmax())
    means, deviations = (np.atleast_1d(options[part]) for part in ("image_mean", "image_std"))
    lowest, highest = (means - DEVIATIONS * deviations).min(), (means + DEVIATIONS * deviations).max()
    fraction = frames.is_floating_point() or frames.dtype == torch.bool
    if options["do_rescale"] and fraction and 0 <= low <= high <= 1 and high > 0:
        raise ValueError(f"{name} has values from {low:g} to {high:g}; pass 0 to {whole:g}, or do_rescale=False.")
    if not lowest <= low / whole <= high / whole <= highest:
        raise ValueError(f"{name} has values from {low:g} to {high:g}; pass 0 to {whole:g}.")


@checked({"image_size": SIDE, "num_frames": FRAMES})
def make_video_processor(image_size: int = 160, num_frames: int = 4) -> VEMOv2VideoProcessor:
    """The published validation's preprocessing.

    Args:
        image_size: side of what the model sees; the short side is resized to it, the middle cut out.
        num_frames: of a clip.

    Raises:
        ValueError: a value out of range.
    """
    return VEMOv2VideoProcessor(num_frames=num_frames, **sizes(image_size))


def sizes(image_size: int) -> dict[str, Any]:
    """What a processor is told of a side in pixels."""
    return {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}


AutoVideoProcessor.register(VEMOv2Config, VEMOv2VideoProcessor, exist_ok=True)  # exist_ok: a reload makes a new class
