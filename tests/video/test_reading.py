"""Frames of files: which ones, of any rate, format and size, upright; and files that are none."""

import functools
import http.server
import itertools
import struct
import sys
import threading
import wave

import numpy as np
import pytest
import torch
from helpers.extras import needs
from helpers.videos import numbers_of, write_video

from d_emo import read_clip
from d_emo.video.reading import Video, middles

pytestmark = needs("video")


def test_the_middle_of_each_part_is_taken():
    assert middles(20, 4) == [2, 7, 12, 17]
    assert middles(325, 4) == [40, 121, 203, 284]
    assert middles(4, 4) == [0, 1, 2, 3] and middles(1, 3) == [0, 0, 0]
    assert middles(2, 4) == [0, 0, 1, 1] and middles(3, 4) == [0, 1, 1, 2]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.mov", "a.ts", "a.webm", "a.h264", "a.mpg"])
@pytest.mark.parametrize("gop", [1, 6])
def test_these_frames_come_out_of_every_format(tmp_path, name, gop):
    codec = {"a.webm": "libvpx-vp9", "a.ts": "mpeg2video", "a.mpg": "mpeg2video", "a.h264": "libx264"}.get(
        name, "mpeg4"
    )
    path = write_video(tmp_path / name, 20, gop=gop, codec=codec)
    clip = read_clip(path)
    assert clip.shape == (4, 3, 32, 48) and clip.dtype == torch.uint8
    assert numbers_of(clip) == [2, 7, 12, 17]
    with Video(path) as video:
        assert len(video) == 20
        assert numbers_of(video.frames([19, 0, 19, 8])) == [19, 0, 19, 8]
        assert numbers_of(video.frames(range(20))) == list(range(20))


def test_frames_that_are_stored_out_of_order_are_counted_as_they_are_shown(tmp_path):
    for codec in ("libx264", "mpeg2video"):  # both with frames that depend on later ones
        path = write_video(tmp_path / f"{codec}.mkv", 24, codec=codec, gop=8)
        assert numbers_of(read_clip(path, 6)) == [2, 6, 10, 14, 18, 22]


def test_an_uneven_rate_changes_nothing(tmp_path):
    times = [*range(0, 100, 10), *range(100, 2100, 200)]
    path = write_video(tmp_path / "a.mkv", 20, times=times)
    assert numbers_of(read_clip(path)) == [2, 7, 12, 17]


def test_a_video_of_few_frames_repeats_them(tmp_path):
    assert numbers_of(read_clip(write_video(tmp_path / "a.mp4", 2))) == [0, 0, 1, 1]
    assert numbers_of(read_clip(write_video(tmp_path / "b.mp4", 1), 3)) == [0, 0, 0]


def test_a_long_video_is_decoded_in_a_few_places(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 400, gop=10)
    decoded = []
    from_keyframe = Video._from_keyframe

    def counting(self, time):
        for pair in from_keyframe(self, time):
            decoded.append(pair[0])
            yield pair

    monkeypatch.setattr(Video, "_from_keyframe", counting)
    assert read_clip(path).shape[0] == 4
    assert len(decoded) <= 4 * 11


@pytest.mark.parametrize("size", [(47, 31), (64, 128)])
def test_odd_and_upright_sizes_keep_rows_and_columns(tmp_path, size):
    width, height = (side - side % 2 for side in size)  # what encoders take

    def corner(_):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[: height // 2, : width // 2] = (250, 20, 20)
        return pixels

    clip = read_clip(write_video(tmp_path / "a.mp4", 4, width, height, picture=corner))
    assert clip.shape == (4, 3, height, width)
    red, green, _ = clip[0, :, : height // 2, : width // 2].float().mean((1, 2))
    assert red > 200 and green < 60 and clip[0, :, height // 2 + 4 :].float().mean() < 20


# What a player does to (x, y): ISO 14496-12's matrix (a, b, c, d); and the grey levels that the quarters of a picture
# then have, from the top left clockwise on, which are stored as 0, 1, 2, 3.
TURNS = {
    (1, 0, 0, 1): [0, 1, 2, 3],
    (0, 1, -1, 0): [3, 0, 1, 2],  # clockwise
    (-1, 0, 0, -1): [2, 3, 0, 1],
    (0, -1, 1, 0): [1, 2, 3, 0],
    (-1, 0, 0, 1): [1, 0, 3, 2],  # left and right exchanged
    (1, 0, 0, -1): [3, 2, 1, 0],
    (0, 1, 1, 0): [0, 3, 2, 1],  # rows and columns exchanged
    (0, -1, -1, 0): [2, 1, 0, 3],
}


@pytest.mark.parametrize("matrix", TURNS)
def test_pictures_are_turned_and_mirrored_as_the_file_says(tmp_path, matrix):
    def marked(_):
        pixels = np.zeros((32, 48, 3), np.uint8)
        pixels[:16, 24:], pixels[16:, 24:], pixels[16:, :24] = 80, 160, 240
        return pixels

    path = write_video(tmp_path / "a.mp4", 4, picture=marked)
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 2 * 4  # version 0: times, number, duration; layer, volume
    a, b, c, d = matrix
    data[place : place + 36] = struct.pack(
        ">9i", *(n << 16 for n in (a, b)), 0, *(n << 16 for n in (c, d)), 0, 0, 0, 1 << 30
    )
    path.write_bytes(data)
    clip = read_clip(path)[0].float().mean(0)
    assert clip.shape == ((32, 48) if a else (48, 32))
    rows, columns = clip.shape[0] // 2, clip.shape[1] // 2
    quarters = [clip[:rows, :columns], clip[:rows, columns:], clip[rows:, columns:], clip[rows:, :columns]]
    assert [round(float(quarter.mean()) / 80) for quarter in quarters] == TURNS[matrix]


def test_the_shared_clips_frames_are_those_of_decoding_it_all(shared):
    import av

    path = shared / "data" / "dense" / "video" / "nasa_13013.mp4"
    clip = read_clip(path, 5)
    with av.open(str(path)) as container:  # the first stream is a smaller copy
        stream = container.streams.best("video")
        count = sum(1 for _ in container.decode(stream))
        wanted, expected = middles(count, 5), {}
        container.seek(0)
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                expected[number] = frame.to_ndarray(format="rgb24")
    assert clip.shape == (5, 3, 270, 480) and count == 390
    for frame, number in zip(clip, wanted, strict=True):
        assert np.array_equal(frame.permute(1, 2, 0).numpy(), expected[number])


@pytest.fixture
def address(tmp_path):
    """Of a server of this folder."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Says nothing."""

    def log_message(self, *_):
        pass


def test_an_address_is_fetched(tmp_path, address):
    for name, codec in (("a.mp4", "mpeg4"), ("a.h264", "libx264")):
        write_video(tmp_path / name, 20, codec=codec)
        assert numbers_of(read_clip(f"{address}/{name}")) == [2, 7, 12, 17]
    for wrong in (f"{address}/missing.mp4", "http://127.0.0.1:1/a.mp4", "https://", "http://[::1"):
        with pytest.raises(ValueError, match=r"cannot be fetched \(") as caught:
            read_clip(wrong)
        assert "\n" not in str(caught.value)


# ---- files that are none ---------------------------------------------------------------------------------------------


def song_with_cover(path):
    import av

    with av.open(str(path), "w") as file:
        sound, cover = file.add_stream("mp3", rate=44100), file.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8))
        for packet in [*cover.encode(picture), *cover.encode()]:
            file.mux(packet)
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), format="fltp", layout="mono")
        samples.rate = 44100
        for packet in [*sound.encode(samples), *sound.encode()]:
            file.mux(packet)
    return path


def test_what_is_no_video_is_named_in_one_line(tmp_path):
    (tmp_path / "empty.mp4").touch()
    for name in ("text.mp4", "list.txt"):
        (tmp_path / name).write_text("no video\n" * 50)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(8000), sound.writeframes(bytes(16000))
    for path, reason in [
        (tmp_path / "empty.mp4", "is no video that FFmpeg reads"),
        (tmp_path / "text.mp4", "is no video that FFmpeg reads"),
        (tmp_path / "list.txt", "is a text; pass a video"),  # FFmpeg draws its letters
        (song_with_cover(tmp_path / "song.mp3"), "holds no video stream; pass a video"),
        (tmp_path / "sound.wav", "holds no video stream; pass a video"),
        (tmp_path / "missing.mp4", "is no file; pass the name of a video file"),
        (tmp_path, "is no file; pass the name"),
        ("", "is not the name of a video file"),
        (None, "is not the name of a video file"),
        ("a\0b", "is no file"),
    ]:
        with pytest.raises(ValueError, match=reason) as caught:
            read_clip(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"num_frames=0 is not a whole number from 1"):
        read_clip(tmp_path / "text.mp4", 0)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264", "libvpx-vp9"])
def test_damaged_files_give_frames_or_one_line(tmp_path, codec):
    whole = write_video(tmp_path / "a.mkv", 20, codec=codec).read_bytes()
    random = np.random.RandomState(0)
    refused = 0
    for case in range(12):
        data = bytearray(whole)
        if case < 4:
            data = data[: len(data) * (case + 1) // 6]
        else:
            for place in random.randint(0, len(data), 40 * (case - 3)):
                data[place] = random.randint(256)
        (tmp_path / "b.mkv").write_bytes(data)
        try:
            assert read_clip(tmp_path / "b.mkv").shape[0] == 4
        except ValueError as error:
            refused += 1
            assert "b.mkv" in str(error) and "\n" not in str(error)
    assert refused


def test_a_cut_video_is_a_shorter_one(tmp_path):
    whole = write_video(tmp_path / "a.ts", 20, codec="mpeg2video").read_bytes()
    (tmp_path / "b.ts").write_bytes(whole[: len(whole) // 2 // 188 * 188])
    numbers = numbers_of(read_clip(tmp_path / "b.ts"))
    assert 0 < numbers[-1] < 12 and all(a <= b for a, b in itertools.pairwise(numbers))


def test_a_file_that_tells_what_it_lacks_is_not_taken_for_a_shorter_one(tmp_path):
    """Its middle would be that of the part."""
    import av

    with av.open(str(tmp_path / "a.mp4"), "w", options={"movflags": "faststart"}) as file:  # frames come last
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        noise = np.random.RandomState(0)
        for _ in range(20):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(noise.randint(0, 255, (32, 48, 3), dtype=np.uint8))))
        file.mux(stream.encode())
    whole = (tmp_path / "a.mp4").read_bytes()
    assert len(read_clip(tmp_path / "a.mp4")) == 4
    (tmp_path / "b.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"b.mp4 is cut short: \d+ of 20 frames are there; copy it again"):
        read_clip(tmp_path / "b.mp4")


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 4)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"^reading videos needs PyAV; pip install 'd-emo\[video\]'\.$"):
        read_clip(path)
