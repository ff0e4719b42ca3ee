"""Frames of video files, by PyAV (extra `video`), which is imported where it is used.

A file is looked through once without decoding, which gives the time of every frame; then only the frames that are asked
for, and those that they depend on back to a keyframe, are decoded. So a long video costs neither memory nor much time,
and frames are chosen by their number whatever the rate does.
"""

import bisect
import http.client
import io
import os
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from d_emo.common.messages import first_line, shown
from d_emo.common.ranges import checked
from d_emo.video.ranges import FRAMES

# Seconds in which an address has to answer.
PATIENCE = 60
# FFmpeg's formats that draw the letters of any text as pictures.
TEXTS = {"tty", "bin", "xbin", "adf", "idf"}


def pyav() -> Any:
    """The module `av`.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError("reading videos needs PyAV; pip install 'd-emo[video]'.") from error
    return av


@checked({"num_frames": FRAMES})
def read_clip(path: str | os.PathLike, num_frames: int = 4) -> torch.Tensor:
    """The frames that the published evaluation takes: a video in equal parts, and the middle frame of each.

    Args:
        path: a video file of any format that FFmpeg reads, or its address (http, https).
        num_frames: T. Of a video with fewer frames some are there more than once.

    Returns:
        (T, 3, H, W), uint8, RGB, upright as the file's rotation says; the video processor takes it.

    Raises:
        ValueError: there is no such file, it is damaged, or holds no video.
        ImportError: PyAV is not installed.
    """
    with Video(path) as video:
        return video.frames(middles(len(video), num_frames))


def middles(count: int, num_frames: int) -> list[int]:
    """The numbers of `num_frames` frames of `count`, each in the middle of its part of equal parts, from 0 on."""
    return [(2 * part + 1) * count // (2 * num_frames) for part in range(num_frames)]


def spread(count: int, num_frames: int, clips: int = 1) -> list[list[int]]:
    """The numbers of the frames of several clips: each part of `num_frames` equal ones is cut into `clips` of its own.

    Clip k takes the middle of the k-th piece of every part, so that one clip is `middles`.
    """
    numbers = middles(count, num_frames * clips)
    return [numbers[clip::clips] for clip in range(clips)]


def drawn(count: int, num_frames: int, shares: Sequence[float]) -> list[int]:
    """The numbers of `num_frames` frames of `count`, one of each of as many equal parts, from 0 on.

    Args:
        count: frames of the video, as many as parts at least.
        num_frames: parts.
        shares: where in its part each frame lies, in [0, 1).
    """
    bounds = [part * count // num_frames for part in range(num_frames + 1)]
    return [low + int(share * (high - low)) for low, high, share in zip(bounds[:-1], bounds[1:], shares, strict=True)]


class Video:
    """An open video file; a context manager.

    Args:
        source: path, address (http, https), or a file in memory.
        name: what to call a file in memory.

    Attributes:
        fps: frames a second on average; None where the file does not say.
        duration: seconds; None where it does not say.
        height, width: as stored, before rotation.

    Raises:
        ValueError: there is no such file, it is damaged, or holds no video.
        ImportError: PyAV is not installed.
    """

    def __init__(self, source: str | os.PathLike | io.BytesIO, name: str = "the video"):
        av = pyav()
        # PyAV's own, and what it stumbles over in damaged files.
        self._errors = (av.error.FFmpegError, ArithmeticError, EOFError, LookupError, OSError, ValueError)
        self._source: Any
        self.name, self._source = (name, source) if isinstance(source, io.BytesIO) else _opened(source)
        try:
            self._container: Any = av.open(self._source, metadata_errors="replace")
        except self._errors as error:
            raise ValueError(f"{self.name} is no video that FFmpeg reads ({first_line(error)}).") from error
        try:
            self._look_through()
        except BaseException:
            self.close()
            raise

    def _look_through(self) -> None:
        """Every frame's time and the keyframes', without decoding where the file tells them."""
        if self._container.format.name in TEXTS:
            raise ValueError(f"{self.name} is a text; pass a video.")
        # A cover is no video of the sound that it comes with.
        moving = [stream for stream in self._container.streams.video if not _is_cover(stream)]
        if not moving:
            raise ValueError(f"{self.name} holds no video stream; pass a video.")
        best = self._container.streams.best("video")
        self._stream = stream = best if best in moving else moving[0]
        if stream.codec_context is None:
            raise ValueError(f"{self.name} is in a codec that this FFmpeg does not know; convert it.")
        self.fps = float(stream.average_rate) if stream.average_rate else None
        self.duration = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None
        self.height, self.width = stream.height, stream.width
        times, keyframes, torn = [], [], False
        try:
            for packet in self._container.demux(stream):
                torn = torn or packet.is_corrupt
                if packet.size and not packet.is_discard:
                    times.append(packet.pts)
                    if packet.is_keyframe:
                        keyframes.append(packet.pts)
            if None in times or not keyframes:  # formats without times: frames are counted by decoding them
                self._rewind()
                times, keyframes = list(range(sum(1 for _ in self._container.decode(self._stream)))), []
        except self._errors as error:
            raise ValueError(f"{self.name} is damaged ({first_line(error)}).") from error
        if not times:
            raise ValueError(f"{self.name} holds no frame; the file is damaged or empty.")
        # MP4 says beforehand how many frames there are; else the middle of what is left would be taken for the video's.
        if torn and len(times) < stream.frames and "mp4" in self._container.format.name:
            raise ValueError(
                f"{self.name} is cut short: {len(times)} of {stream.frames} frames are there; copy it again."
            )
        # Where there are no keyframes, times are numbers.
        self._times: list[int] = sorted(times)
        self._keyframes: list[int] = sorted(keyframes)

    def __len__(self) -> int:
        return len(self._times)

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def frames(self, numbers: Sequence[int]) -> torch.Tensor:
        """Frames by their numbers from 0 on, in any order and repeated at will.

        Returns:
            (T, 3, H, W), uint8, RGB, upright; all of the first one's size.

        Raises:
            ValueError: a frame cannot be decoded.
        """
        found: dict[int, np.ndarray] = {}
        reading, time, picture = self._from_keyframe(0), None, None
        for number in sorted({int(number) for number in numbers}):
            wanted = self._times[number]
            keyframe = (
                self._keyframes[max(bisect.bisect_right(self._keyframes, wanted) - 1, 0)] if self._keyframes else 0
            )
            if time is None or time < keyframe <= wanted:
                reading, time = self._from_keyframe(keyframe), None
            try:
                while time is None or time < wanted:
                    time, picture = next(reading)
            except StopIteration:  # the last frames of some files are never shown
                pass
            except self._errors as error:
                raise ValueError(
                    f"{self.name} is damaged: frame {number} is unreadable ({first_line(error)})."
                ) from error
            if picture is None:
                raise ValueError(f"{self.name} is damaged: frame {number} is unreadable.")
            found[number] = _pixels(picture, next(iter(found.values()), None))
        stacked = np.stack([found[int(number)] for number in numbers])  # (T, H, W, 3)
        return torch.from_numpy(stacked).permute(0, 3, 1, 2)

    def _rewind(self) -> None:
        """Begin again; some formats cannot be sought in, not even for their beginning."""
        import av

        index = self._stream.index  # gone with the container
        self._container.close()
        if isinstance(self._source, io.BytesIO):
            self._source.seek(0)
        self._container = av.open(self._source, metadata_errors="replace")
        self._stream = self._container.streams[index]

    def _from_keyframe(self, time: int) -> Iterator[tuple[int, Any]]:
        """Times and frames from a keyframe on; from the beginning where a seek comes out behind it, or at no frame."""
        if self._keyframes:
            self._container.seek(time, stream=self._stream, backward=True)
            right = False
            for frame in self._container.decode(self._stream):
                if not right and (frame.pts is None or frame.pts > time):
                    break
                right = True
                if frame.pts is not None:
                    yield frame.pts, frame
            if right:
                return
        self._rewind()
        for number, frame in enumerate(self._container.decode(self._stream)):
            if not self._keyframes:
                yield number, frame
            elif frame.pts is not None:
                yield frame.pts, frame


def _opened(source: Any) -> tuple[str, Any]:
    """What to call a source, and what PyAV opens."""
    if not isinstance(source, str | os.PathLike) or not isinstance(os.fspath(source), str) or not os.fspath(source):
        raise ValueError(f"path={shown(source)} is not the name of a video file.")
    name = os.fspath(source)
    if name.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(name, timeout=PATIENCE) as answer:
                return name, io.BytesIO(answer.read())
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ValueError(f"{name} cannot be fetched ({first_line(error)}).") from error
    if "\0" in name or not os.path.isfile(name):  # noqa: PTH113  # Path would raise on names that are too long
        raise ValueError(f"path={shown(name)} is no file; pass the name of a video file.")
    return name, name


def _is_cover(stream: Any) -> bool:
    return "attached_pic" in str(getattr(stream.disposition, "name", None))


def _pixels(frame: Any, first: np.ndarray | None) -> np.ndarray:
    """A decoded frame, upright: (H, W, 3), uint8; of the size of the first one."""
    mirrored, turned = _turn(frame)
    sides = {}
    if first is not None:
        height, width = first.shape[:2] if turned % 2 == 0 else first.shape[1::-1]
        sides = {"height": height, "width": width}
    pixels = frame.to_ndarray(format="rgb24", **sides)
    return np.rot90(pixels[:, ::-1] if mirrored else pixels, turned)


def _turn(frame: Any) -> tuple[bool, int]:
    """Whether left and right are to be exchanged first, and then how many quarter turns to make against the clock.

    The file says so by a matrix, of which PyAV's `rotation` does not tell a mirrored one (front cameras) from others:
    x is to become a x + c y, and y b x + d y, down the image.
    """
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].astype(float)
            mirrored = a * d < b * c
            if mirrored:
                a, b = -a, -b
            return mirrored, round(-np.degrees(np.arctan2(b, a)) / 90) % 4
    return False, 0
