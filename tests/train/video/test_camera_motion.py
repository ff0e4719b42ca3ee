"""Videos of a camera that moves over photos: the windows' ways, what is written, and what is learned of them."""

import json

import numpy as np
import PIL.Image
import pytest
from helpers.extras import needs
from helpers.paths import ROOT, SHARED
from helpers.training import run_here

from d_emo.eval import evaluate_video_classifier
from d_emo.train import make_camera_motion, train_video_classifier
from d_emo.train.video.camera_motion import MOTIONS, windows
from d_emo.video.folders import folder_videos
from d_emo.video.reading import middles

OPPOSITES = "left=right,up=down,in=out"
PHOTOS = SHARED / "data" / "imagenet-one-per-class-256.parquet"


def path_of(motion, seed=0, size=(80, 60), frames=9):
    boxes = np.array(windows(motion, *size, frames, np.random.default_rng(seed)))  # left, top, right, bottom
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return boxes, centres, boxes[:, 2] - boxes[:, 0]


def test_windows_move_as_their_class_says_and_stay_within_the_photo():
    moved = {
        "left": (-1, 0),
        "right": (1, 0),
        "up": (0, -1),
        "down": (0, 1),
        "in": (0, 0),
        "out": (0, 0),
        "stay": (0, 0),
    }
    assert moved.keys() == MOTIONS.keys()
    for seed in range(40):
        for motion, direction in moved.items():
            boxes, centres, sides = path_of(motion, seed)
            assert boxes.min() >= 0 and boxes[:, [0, 2]].max() <= 80 and boxes[:, [1, 3]].max() <= 60
            assert np.allclose(sides, boxes[:, 3] - boxes[:, 1])
            way = centres[-1] - centres[0]
            assert np.allclose(np.sign(np.round(way, 6)), direction)
            grown = {"in": -1, "out": 1}.get(motion, 0)
            assert np.sign(np.round(sides[-1] - sides[0], 6)) == grown
            if motion != "stay":
                assert 0.15 * 60 <= np.abs(way).sum() + abs(sides[-1] - sides[0]) <= 0.35 * 60


def test_backwards_a_motion_is_its_opposite():
    for pair in OPPOSITES.split(","):
        first, second = (path_of(motion)[0] for motion in pair.split("="))
        assert np.allclose(first, second[::-1])


def photos_in(folder, count=6):
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (12, 14, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).resize((56, 48), PIL.Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def make(capsys, *arguments):
    return run_here(capsys, *arguments, main=make_camera_motion.main)


@needs("video")
def test_videos_are_written_of_other_photos_for_the_test(capsys, tmp_path):
    photos = photos_in(tmp_path / "photos")
    options = ["--photos", photos, "--held-out", "2", "--frames", "6", "--resolution", "32"]
    code, output = make(capsys, *options, "--output-dir", tmp_path / "out")
    assert code == 0 and "28 videos to train on and 14 to test on" in output
    sources = {part: folder_videos(tmp_path / "out" / part) for part in ("train", "test")}
    assert list(sources["train"].id2label.values()) == sorted(MOTIONS) and sources["train"].size == 28
    photos_of = {part: {path.stem.split("-")[0] for path in source.files} for part, source in sources.items()}
    assert not photos_of["train"] & photos_of["test"] and len(photos_of["train"] | photos_of["test"]) == 6
    clip = sources["test"].read(0).frames(6, range)
    assert clip.shape == (6, 3, 32, 32)
    stay = list(sources["test"].id2label.values()).index("stay")
    still = sources["test"].read(int(np.flatnonzero(sources["test"].labels == stay)[0])).frames(6, range).float()
    assert (still - still[:1]).abs().mean() < 3 < (clip.float() - clip[:1].float()).abs().mean()
    # The same command makes the same pixels, another seed others.
    make(capsys, *options, "--output-dir", tmp_path / "again")
    make(capsys, *options, "--output-dir", tmp_path / "other", "--seed", "1")
    again, other = (folder_videos(tmp_path / name / "train") for name in ("again", "other"))
    frames = sources["train"].read(3).frames(4, lambda count: middles(count, 4))
    assert (again.read(3).frames(4, lambda count: middles(count, 4)) == frames).all()
    assert not (other.read(3).frames(4, lambda count: middles(count, 4)) == frames).all()


@needs("video")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--photos", "missing"], "--photos missing: there is no such folder"),
        (["--held-out", "6"], "--held-out 6 of 6 photos leaves none to train on"),
        (["--resolution", "33"], "--resolution 33 is odd"),
        (["--resolution", "128"], "too few for videos of 128"),
        (["--output-dir", "photos"], "is not empty"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(capsys, tmp_path, monkeypatch, arguments, message):
    photos_in(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    base = ["--photos", tmp_path / "photos", "--held-out", "2", "--output-dir", tmp_path / "out"]
    if arguments[0] == "--output-dir":
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.txt").write_text("mine")
        arguments = ["--output-dir", "other"]
    code, output = make(capsys, *base, *arguments)
    assert code != 0 and message in output
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".partial*"))


@pytest.mark.slow
@needs("video")
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not PHOTOS.is_file(), reason="needs the photos of the shared folder")
def test_motion_is_learned_and_read_backwards_as_its_opposite_but_not_of_one_frame(capsys, tmp_path):
    """The recipe: 200 steps of a narrow network; chance is 14.3%. Two minutes on two cores."""
    code, output = make(capsys, "--photos", PHOTOS, "--output-dir", tmp_path / "motion")
    assert code == 0, output
    config = ROOT / "train" / "configs" / "video" / "camera_motion.yaml"
    code, output = run_here(
        capsys, "--config", config, "--train-data-dir", tmp_path / "motion" / "train", "--num-workers", "0",
        "--report-to", "none", "--output-dir", tmp_path / "run", main=train_video_classifier.main,
    )  # fmt: skip
    assert code == 0, output
    scores = {}
    for order in ("forward", "reversed", "repeated"):
        more = ["--opposites", OPPOSITES] if order == "reversed" else []
        code, output = run_here(
            capsys, "--model", tmp_path / "run", "--data-dir", tmp_path / "motion" / "test", "--order", order, *more,
            "--output-dir", tmp_path / order, main=evaluate_video_classifier.main,
        )  # fmt: skip
        assert code == 0, output
        scores[order] = json.loads((tmp_path / order / "report.json").read_text())["top1"]
    assert scores["forward"] >= 0.4 and scores["reversed"] >= 0.35 and scores["repeated"] <= 0.25, scores
