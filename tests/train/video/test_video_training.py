"""The video trainer as a user starts it: folders of videos, exact resume, processes, bad input, what is learned."""

import json

import datasets
import pytest
import torch
from helpers.training import losses, run_here, train_to_the_end
from helpers.video_training import TINY, TINY_NETWORK, VideoTrainer
from helpers.videos import write_bars, write_video
from safetensors.torch import load_file
from transformers import pipeline

from d_emo import EMOv2Config, EMOv2ForImageClassification
from d_emo.train import train_video_classifier
from d_emo.video.folders import folder_videos


def run(capsys, *arguments):
    return run_here(capsys, *arguments, main=train_video_classifier.main)


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    return write_bars(tmp_path_factory.mktemp("bars") / "bars")


def test_a_folder_of_videos_is_trained_on_and_the_saved_folder_answers_as_it_was_validated(capsys, tmp_path, bars):
    out = tmp_path / "out"
    code, output = run(capsys, *TINY, "--train-data-dir", bars, "--validation-dir", bars, "--max-train-steps", "3",
                       "--output-dir", out)  # fmt: skip
    assert code == 0, output
    assert "bars: 9 videos, 3 classes" in output and "4 frames of 32 x 32, mirrored at random" in output
    _, top1, _, loss = (out / "validation.csv").read_text().splitlines()[-1].split(",")
    source = folder_videos(bars)
    classify = pipeline("video-classification", str(out))
    answers = [classify(str(path), top_k=3) for path in source.files]
    shares = [
        next(answer["score"] for answer in of_video if answer["label"] == source.id2label[label])
        for of_video, label in zip(answers, source.labels.tolist(), strict=True)
    ]
    assert -torch.tensor(shares).log().mean() == pytest.approx(float(loss), abs=1e-4)
    found = [
        of_video[0]["label"] == source.id2label[label] for of_video, label in zip(answers, source.labels, strict=True)
    ]
    assert sum(found) / 9 == pytest.approx(float(top1), abs=1e-6)
    card = (out / "README.md").read_text()
    assert "pipeline_tag: video-classification" in card and f"| 3 | {float(top1):.2%} |" in card
    assert "d_emo.train.train_video_classifier" in card and "4 frames of 32 x 32" in card
    assert (out / "curves.png").is_file()


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(capsys, tmp_path, bars):
    """With every kind of randomness on: frames, policy, crop, mirroring, dropout, stochastic depth; and validation."""
    more = [*TINY, "--train-data-dir", bars, "--validation-share", "0.34", "--checkpoint-every", "2",
            "--max-train-steps", "4", "--validate-every", "1", "--ema-decay", "0.9", "--output-dir"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        code, output = run(capsys, *more, folder)
        assert code == 0, output
    for path in (parts / "checkpoint-0000004").rglob("*"):
        if path.is_file():
            path.unlink()  # as if it had been killed
    code, output = run(capsys, *more, parts, "--resume-from", "latest")
    assert code == 0 and "resuming from" in output and "checkpoint-0000002" in output
    assert_same_runs(whole, parts, "checkpoint-0000004", 5)


def assert_same_runs(whole, parts, checkpoint, lines):
    assert losses(parts) == losses(whole) and len(losses(whole)) == lines
    assert (parts / "validation.csv").read_text() == (whole / "validation.csv").read_text()
    for name in ("model.safetensors", "training_state/model.safetensors", "training_state/optimizer.safetensors"):
        a, b = (load_file(folder / checkpoint / name) for folder in (whole, parts))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, bars):
    more = [*TINY, "--kernels", "reference", "--train-data-dir", bars, "--validation-dir", bars, "--num-workers", "2",
            "--validate-every", "3", "--checkpoint-every", "2", "--max-train-steps", "12", "--output-dir"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with VideoTrainer(tmp_path / "a.log", *more, whole) as trainer:
        assert trainer.finish() == 0, trainer.output
    with VideoTrainer(tmp_path / "b.log", *more, parts) as trainer:
        trainer.wait_until(lambda: (parts / "checkpoint-0000004").is_dir())
    with VideoTrainer(tmp_path / "c.log", *more, parts, "--resume-from", "latest") as trainer:
        assert trainer.finish() == 0, trainer.output
        assert "resuming from" in trainer.output
    assert_same_runs(whole, parts, "checkpoint-0000012", 13)


@pytest.mark.slow
def test_two_processes_train_and_validate_as_one_does(capsys, tmp_path, bars):
    """Two micro batches on one process or one on each of two: losses to 1e-5 (sums round differently).

    Blocks and channels are dropped alike.
    """
    assert '"drop_path": 0.1, "dropout": 0.2' in TINY_NETWORK
    options = [*TINY, "--micro-batch-size", "2", "--max-train-steps", "3", "--train-data-dir", bars,
               "--validation-dir", bars, "--output-dir"]  # fmt: skip
    tables = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        train_to_the_end(capsys, tmp_path / "log", *options, folder, processes=processes,
                         main=train_video_classifier.main, kind=VideoTrainer)  # fmt: skip
        training = [float(line.split(",")[1]) for line in losses(folder)[1:]]
        validation = [float(value) for value in (folder / "validation.csv").read_text().splitlines()[-1].split(",")]
        tables.append([*training, *validation])
    assert len(tables[0]) == 7 and tables[1] == pytest.approx(tables[0], rel=1e-5)


@pytest.mark.slow
def test_a_handful_of_videos_is_learned_by_heart_and_a_still_picture_tells_nothing(capsys, tmp_path):
    """Bars that move left, right or not over the same noise: all 9 are told apart, but not by their first frames."""
    from d_emo.eval import evaluate_video_classifier

    bars = write_bars(tmp_path / "bars")
    network = TINY_NETWORK.replace('"drop_path": 0.1, "dropout": 0.2', '"drop_path": 0.0, "dropout": 0.0')
    code, output = run(
        capsys, *TINY, "--model-config", network, "--train-data-dir", bars, "--global-batch-size", "9",
        "--max-train-steps", "150", "--learning-rate", "3e-3", "--rand-augment", "0", "--crop", "center",
        "--random-flip", "false", "--lr-decay-start", "0.5", "--lr-decay-end", "1", "--validation-dir", bars,
        "--validate-every", "150", "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, output
    scores = {}
    for order in ("forward", "repeated"):
        run_here(capsys, "--model", tmp_path / "out", "--data-dir", bars, "--order", order, "--output-dir",
                 tmp_path / order, main=evaluate_video_classifier.main)  # fmt: skip
        scores[order] = json.loads((tmp_path / order / "report.json").read_text())["top1"]
    assert scores["forward"] == 1 and scores["repeated"] < 0.7


def test_an_image_classifier_is_fine_tuned(capsys, tmp_path, bars):
    names = {"depths": (1, 1, 1, 2), "widths": (8, 8, 8, 16), "head_dims": (8, 8, 8, 8)}
    EMOv2ForImageClassification(EMOv2Config(**names, num_labels=5)).save_pretrained(tmp_path / "images")
    before = load_file(tmp_path / "images" / "model.safetensors")
    code, output = run(
        capsys, "--init-from", tmp_path / "images", "--train-data-dir", bars, "--resolution", "32", "--frames", "2",
        "--global-batch-size", "4", "--learning-rate", "1e-9", "--max-train-steps", "1", "--num-workers", "0",
        "--report-to", "none", "--cpu-threads", "1", "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, output
    assert "images, kernels inflated in time" in output and "2 frames of 32 x 32" in output
    after = load_file(tmp_path / "out" / "model.safetensors")
    name = "stages.3.blocks.1.i2rmb.conv.weight"
    assert torch.allclose(after[f"v_emov2.{name}"][:, :, 2], before[f"emov2.{name}"], atol=1e-6)
    assert after["v_emov2.head.weight"].shape == (3, 16)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_frames"] == 2 and config["id2label"] == {"0": "left", "1": "right", "2": "stay"}
    # And further from there, with the number of frames of that.
    code, output = run(capsys, "--init-from", tmp_path / "out", "--train-data-dir", bars, "--dry-run", "--report-to",
                       "none")  # fmt: skip
    assert code == 0 and "out, trained further" in output and "2 frames of 32 x 32" in output


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_video_stops_the_run_or_is_skipped_aloud(capsys, tmp_path, workers):
    videos = write_bars(tmp_path / "videos", 2)
    (videos / "left" / "1.mp4").write_bytes((videos / "left" / "1.mp4").read_bytes()[:200])
    write_video(videos / "stay" / "0.mp4", 3)
    more = [*TINY, "--train-data-dir", videos, "--validation-dir", videos, "--max-train-steps", "2",
            "--num-workers", workers, "--output-dir", tmp_path / "out"]  # fmt: skip
    code, output = run(capsys, *more)
    assert code != 0 and "go on without it: --on-bad-image skip" in output
    assert not (tmp_path / "out" / "config.json").exists()
    code, output = run(capsys, *more, "--on-bad-image", "skip", "--resume-from", "latest")
    assert code == 0, output
    assert "skipped: " in output and "0.mp4 is too short: it has 3 frames, a clip 4" in output
    assert "(4 videos, averaged weights)" in output


def test_nothing_readable_ends_with_a_line(capsys, tmp_path):
    videos = write_bars(tmp_path / "videos", 1, 3)
    code, output = run(capsys, *TINY, "--train-data-dir", videos, "--max-train-steps", "1", "--on-bad-image", "skip",
                       "--output-dir", tmp_path / "out")  # fmt: skip
    assert code != 0 and "none of the 3 videos of videos can be read; the first: " in output


def test_a_table_of_videos_is_trained_on(capsys, tmp_path, bars):
    paths = folder_videos(bars).files
    features = datasets.Features({"video": datasets.Video(decode=False), "label": datasets.Value("string")})
    stored = [{"bytes": path.read_bytes(), "path": None} for path in paths]
    names = [path.parent.name for path in paths]
    datasets.Dataset.from_dict({"video": stored, "label": names}, features=features).to_parquet(tmp_path / "a.parquet")
    code, output = run(capsys, *TINY, "--dataset", tmp_path / "a.parquet", "--validation-dataset",
                       tmp_path / "a.parquet", "--max-train-steps", "1", "--output-dir", tmp_path / "out")  # fmt: skip
    assert code == 0 and "a: 9 videos, 3 classes" in output, output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-data-dir", "missing"], "--train-data-dir missing: there is no such folder"),
        (["--dataset", "x.parquet"], "choose one"),
        (["--validation-dir", "missing"], "--validation-dir missing: there is no such folder"),
        (["--validation-split", "test"], "it goes with --dataset"),
        (["--validation-share", "0.99"], "--validation-share 0.99: "),
        (["--model", "V-EMOv2-3M"], "--model V-EMOv2-3M: video classifier 'V-EMOv2-3M' is unknown"),
        (["--model-config", "{depth}"], "expected JSON"),
        (["--model-config", '{"depth": 3}'], "--model-config has ['depth']; choose from depths"),
        (["--init-from", "nowhere"], "--init-from nowhere: there is no such folder or file"),
        (["--frames", "0"], "--frames 0: must be positive"),
        (["--resolution", "16"], "must be 32 or more"),
        (["--rand-augment-magnitude", "11"], "must be in [0, 10]"),
        (["--crop-scale-min", "0"], "must be in (0, 1]"),
        (["--label-smoothing", "1"], "must be in [0, 1)"),
        (["--lr-decay-end", "0.1"], "must be above --lr-decay-start"),
        (["--lr-multipliers", "stem.=2"], "no parameter that learns begins with 'stem.'"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(capsys, tmp_path, offline, bars, arguments, message):
    code, _ = run(capsys, *TINY, "--train-data-dir", bars, "--max-train-steps", "1", "--output-dir", tmp_path / "out",
                  *arguments)  # fmt: skip
    assert isinstance(code, str) and message in code and "\n" not in code
    assert not (tmp_path / "out" / "config.json").exists()


def test_videos_have_to_be_named_and_validation_to_have_the_same_classes(capsys, tmp_path, bars):
    code, _ = run(capsys, *TINY, "--max-train-steps", "1")
    assert "no data was named: --train-data-dir FOLDER" in code
    other = write_bars(tmp_path / "other", 1, 4, classes=("left", "up"))
    code, _ = run(capsys, *TINY, "--train-data-dir", bars, "--validation-dir", other, "--max-train-steps", "1",
                  "--output-dir", tmp_path / "out")  # fmt: skip
    assert "which is trained on, does not have: up" in code
    one = write_bars(tmp_path / "one", 1, 4, classes=("left",))
    code, _ = run(capsys, *TINY, "--train-data-dir", one, "--max-train-steps", "1", "--output-dir", tmp_path / "out")
    assert "are of 1 class; a classifier needs two or more" in code


@pytest.mark.parametrize("command", ["train_video_classifier", "evaluate_video_classifier", "make_camera_motion"])
def test_a_missing_pyav_is_named_with_its_extra(command, capsys, monkeypatch, tmp_path, bars):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    arguments = {
        "train_video_classifier": [*TINY, "--train-data-dir", bars],
        "evaluate_video_classifier": ["--model", tmp_path, "--data-dir", bars],
        "make_camera_motion": ["--photos", bars],
    }[command]
    package = "eval" if command.startswith("eval") else "train"
    main = importlib.import_module(f"d_emo.{package}.{command}").main
    code, _ = run_here(capsys, *arguments, "--output-dir", tmp_path / "out", main=main)
    assert "PyAV; pip install 'd-emo[video]'" in str(code) and "\n" not in str(code)
