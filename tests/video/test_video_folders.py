"""Folders of videos, and `datasets` of videos: what is listed, what is read, what is refused."""

import io
import itertools

import datasets
import numpy as np
import pytest
from helpers.extras import needs
from helpers.videos import numbers_of, write_bars, write_video

from d_emo.images.decode import UnreadableImageError
from d_emo.images.source import held_out, subset
from d_emo.video.folders import VIDEO_SUFFIXES, VideoFile, dataset_videos, folder_videos
from d_emo.video.reading import drawn, middles, spread

pytestmark = needs("video")


def test_a_folder_of_class_folders_is_listed_by_the_house_rules(tmp_path):
    for name in ("10", "9", ".hidden"):
        (tmp_path / name / "deep").mkdir(parents=True)
        write_video(tmp_path / name / "deep" / "b.mp4", 4)
        write_video(tmp_path / name / "A.MKV", 4)
    (tmp_path / "9" / "notes.txt").write_text("mine")
    (tmp_path / "9" / "cover.png").write_bytes(b"")
    (tmp_path / "9" / "gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    source = folder_videos(tmp_path)
    assert source.id2label == {0: "9", 1: "10"} and source.labels.tolist() == [0, 0, 1, 1]
    names = [str(path.relative_to(tmp_path)) for path in source.files]
    assert names == ["9/A.MKV", "9/deep/b.mp4", "10/A.MKV", "10/deep/b.mp4"]
    size = source.describe_size()
    assert size.startswith("4 videos (left out: ") and "1 .txt" in size and "1 .png" in size
    assert "broken links (first 9/gone.mp4)" in size
    assert source.identity()["data_size"] == 4 and source.num_workers == 4


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no class folders with videos"),
        (("a/x.png",), r"no class folders with videos in it \(left out: 1 .png\); expected .*CLASS/VIDEO.mp4"),
        (("a/x.mp4", "b/x.png"), "class folders without videos: b"),
        (("x.mp4",), "beside the class folders"),
        (("train/a/x.mp4", "val/a/x.mp4"), "train and val, which are parts of a data set"),
    ],
)
def test_folders_without_videos_are_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=message):
        folder_videos(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        folder_videos(tmp_path / "missing")


def test_what_is_damaged_or_too_short_is_named(tmp_path):
    write_video(tmp_path / "short.mp4", 3)
    write_video(tmp_path / "strip.mp4", 4, width=2080, height=16)
    whole = write_video(tmp_path / "cut.mkv", 30).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:300])
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("a text, not a video")
    for name, reason in {
        "short.mp4": "too short: it has 3 frames, a clip 4",
        "strip.mp4": "a strip of 2080 x 16 pixels",
        "cut.mp4": "damaged|no frame|no video",
        "empty.mp4": "no video",
        "text.mp4": "no video|text",
        "missing.mp4": "no file",
    }.items():
        video = VideoFile(tmp_path / name, str(tmp_path / name))
        with pytest.raises(UnreadableImageError, match=reason) as raised:
            video.frames(4, lambda count: middles(count, 4))
        assert name in str(raised.value) and not str(raised.value).endswith(".")


def test_a_table_of_videos_reads_bytes_and_paths(tmp_path):
    stored = [
        {"bytes": write_video(tmp_path / "a.mp4", 8).read_bytes(), "path": "a.mp4"},
        {"bytes": write_video(tmp_path / "b.mkv", 12).read_bytes(), "path": None},
        None,
    ]
    features = datasets.Features({
        "clip": datasets.Video(decode=False), "label": datasets.ClassLabel(names=["up", "down"]),
    })  # fmt: skip
    table = datasets.Dataset.from_dict({"clip": stored, "label": [0, 1, 1]}, features=features)
    table.to_parquet(tmp_path / "clips.parquet")
    source = dataset_videos(str(tmp_path / "clips.parquet"))
    assert source.id2label == {0: "up", 1: "down"} and source.labels.tolist() == [0, 1, 1] and source.name == "clips"
    assert numbers_of(source.read(0).frames(4, lambda count: middles(count, 4))) == [1, 3, 5, 7]
    assert numbers_of(source.read(1).frames(1, lambda count: [count - 1])) == [11]
    assert "row 0 (a.mp4)" in source.read(0).name
    with pytest.raises(UnreadableImageError, match="row 2 holds no video"):
        source.read(2)
    with pytest.raises(ValueError, match="no column 'film' among clip, label; set --video-column"):
        dataset_videos(str(tmp_path / "clips.parquet"), video_column="film")


def test_a_column_of_something_else_is_refused(tmp_path):
    datasets.Dataset.from_dict({"video": [1, 2], "label": [0, 1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"column 'video' holds .* not videos .* set --video-column"):
        dataset_videos(str(tmp_path / "a.parquet"))


def test_sources_of_videos_are_split_as_those_of_images(tmp_path):
    source = folder_videos(write_bars(tmp_path / "bars", 4, 4))
    train, held = held_out(source, 0.25)
    assert (train.size, held.size) == (9, 3) and sorted(held.labels.tolist()) == [0, 1, 2]
    assert held.describe_size() == "3 videos" and type(held) is type(source)
    other = subset(source, np.array([11, 0]))
    assert [other.read(index).name for index in (0, 1)] == [source.read(11).name, source.read(0).name]


def test_several_clips_take_other_frames_of_every_part():
    assert spread(20, 4) == [middles(20, 4)]
    assert spread(24, 4, 3) == [[1, 7, 13, 19], [3, 9, 15, 21], [5, 11, 17, 23]]
    assert sorted(itertools.chain(*spread(12, 4, 3))) == list(range(12))


@pytest.mark.parametrize("count", [4, 5, 7, 30])
def test_drawn_frames_lie_in_their_parts_and_come_from_all_of_each(count):
    generator, seen = np.random.default_rng(0), [set() for _ in range(4)]
    for _ in range(300):
        for part, number in enumerate(drawn(count, 4, generator.random(4).tolist())):
            seen[part].add(number)
    assert sorted(number for part in seen for number in part) == list(range(count))  # each frame in one part
    assert all(max(first) < min(second) for first, second in itertools.pairwise(seen))


def test_suffixes_are_as_the_listing_compares_them():
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in VIDEO_SUFFIXES)


def test_a_file_in_memory_is_a_video_too(tmp_path):
    data = write_video(io.BytesIO(), 8, container="matroska").getvalue()
    assert numbers_of(VideoFile(data, "row 3").frames(2, lambda count: middles(count, 2))) == [2, 6]
