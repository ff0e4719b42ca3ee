"""What a video classifier answers over clips and crops, and the evaluator as a user starts it."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.training import run_here
from helpers.video_training import TINY_NETWORK
from helpers.videos import large, write_bars, write_video
from transformers import VideoMAEConfig, VideoMAEForVideoClassification, VideoMAEVideoProcessor

from d_emo import VEMOv2Config, VEMOv2ForVideoClassification
from d_emo.eval import evaluate_video_classifier
from d_emo.eval.video.accuracy import crops_of, in_order, mean_log_probabilities, predict_clips
from d_emo.images.decode import UnreadableImageError
from d_emo.video.folders import folder_videos
from d_emo.video.processing import make_video_processor
from d_emo.video.reading import Video, middles, spread

NAMES = ("left", "right", "stay")


def classifier():
    config = VEMOv2Config(**json.loads(TINY_NETWORK), image_size=32, id2label=list(NAMES))
    torch.manual_seed(0)
    return large(VEMOv2ForVideoClassification(config))


def show(source, model, **options):
    more = {"batch_size": 4, "num_workers": 0, "device": torch.device("cpu"), **options}
    return predict_clips(model, make_video_processor(32, 4), source, **more)


def wide_videos(root):
    """Two videos a class, broader than high, in which frames and places differ."""
    for number, name in enumerate(NAMES):
        (root / name).mkdir(parents=True)
        for index in range(2):
            drawn = np.random.default_rng(10 * number + index)
            frames = drawn.integers(0, 256, (13, 32, 60, 3), dtype=np.uint8)
            write_video(root / name / f"{index}.mkv", 13, 60, 32, codec="ffv1", picture=lambda k, f=frames: f[k])
    return folder_videos(root)


def test_probabilities_are_averaged_over_clips_and_crops(tmp_path):
    """Against a loop of its own over the file's frames, with PyTorch's softmax, in float64: 1e-5."""
    source, model, processor = wide_videos(tmp_path), classifier(), make_video_processor(32, 4)
    kept = {}
    found = show(source, model, clips=2, crops=3, keep=lambda some, logs: kept.update(zip(some, logs, strict=True)))
    for index in range(source.size):
        views = []
        with Video(source.files[index]) as video:
            for numbers in spread(len(video), 4, 2):
                whole = video.frames(numbers).double() / 255  # (4, 3, 32, 60)
                whole = (whole - processor.image_mean[0]) / processor.image_std[0]
                views += [whole[..., left : left + 32] for left in (0, 14, 28)]
        with torch.no_grad():
            shares = model(torch.stack(views).float()).logits.double().softmax(-1).mean(0)
        assert torch.allclose(kept[index].double().exp(), shares, atol=1e-5)
        assert found.losses[index] == pytest.approx(-float(shares[source.labels[index]].log()), abs=1e-4)
        assert found.ranked[index].tolist() == shares.argsort(descending=True).tolist()
    assert len(kept) == 6


def test_one_clip_and_crop_is_what_the_processor_does(tmp_path):
    source, model, processor = wide_videos(tmp_path), classifier(), make_video_processor(32, 4)
    found = show(source, model)
    with torch.no_grad():
        for index in range(source.size):
            logits = model(**processor(str(source.files[index]), return_tensors="pt")).logits
            loss = F.cross_entropy(logits, torch.tensor([int(source.labels[index])]))
            assert found.losses[index] == pytest.approx(float(loss), abs=1e-5)


def test_the_mean_is_of_probabilities_not_of_logits():
    logits = torch.tensor([[[4.0, 0.0], [0.0, 1.0]]])
    expected = (torch.tensor([4.0, 0.0]).softmax(0) + torch.tensor([0.0, 1.0]).softmax(0)) / 2
    assert torch.allclose(mean_log_probabilities(logits)[0].exp(), expected, atol=1e-6)


def test_crops_lie_along_the_longer_side_from_end_to_end():
    wide = torch.arange(50.0).expand(1, 1, 20, 50)
    assert [float(crop[0, 0, 0, 0]) for crop in crops_of(wide, 20, 3)] == [0, 15, 30]
    assert float(crops_of(wide, 20, 1)[0, 0, 0, 0, 0]) == 15
    high = wide.transpose(-1, -2)
    assert [float(crop[0, 0, 0, 0]) for crop in crops_of(high, 20, 3)] == [0, 15, 30]
    assert crops_of(high, 20, 3).shape == (3, 1, 1, 20, 20)


def test_frames_backwards_and_the_first_one_repeated(tmp_path):
    frames = torch.arange(4.0)
    assert in_order(frames, "reversed").tolist() == [3, 2, 1, 0]
    assert in_order(frames, "repeated").tolist() == [0, 0, 0, 0] and in_order(frames, "forward") is frames
    source, model, processor = wide_videos(tmp_path), classifier(), make_video_processor(32, 4)
    orders = {order: show(source, model, order=order).losses for order in ("forward", "reversed", "repeated")}
    for order, numbers in (("reversed", [3, 2, 1, 0]), ("repeated", [0, 0, 0, 0])):
        with Video(source.files[5]) as video, torch.no_grad():
            clip = video.frames([middles(len(video), 4)[number] for number in numbers])
            logits = model(**processor(clip, do_sample_frames=False, return_tensors="pt")).logits
        loss = F.cross_entropy(logits, torch.tensor([2]))
        assert orders[order][5] == pytest.approx(float(loss), abs=1e-5)
        assert (orders[order] - orders["forward"]).abs().max() > 1e-2


def test_processes_share_the_videos_and_workers_change_nothing(tmp_path):
    source, model = folder_videos(write_bars(tmp_path, 2, 4)), classifier()
    whole = show(source, model, num_workers=1)
    parts = [show(source, model, rank=rank, world_size=4) for rank in range(4)]
    assert [len(part.labels) for part in parts] == [2, 2, 1, 1]
    losses = torch.empty(6)
    for rank, part in enumerate(parts):
        losses[rank::4] = part.losses
    assert torch.allclose(losses, whole.losses, atol=1e-5)


def test_a_bad_video_stops_it_or_is_skipped_aloud(tmp_path, capsys):
    write_bars(tmp_path, 2, 4)
    (tmp_path / "left" / "0.mp4").write_bytes(b"no video")
    write_video(tmp_path / "stay" / "1.mp4", 3)
    source = folder_videos(tmp_path)
    with pytest.raises(UnreadableImageError, match=r"left/0.mp4.* leave it out: --on-bad-image skip"):
        show(source, classifier())
    found = show(source, classifier(), skip_bad=True)
    assert found.labels.tolist() == [0, 1, 1, 2]
    said = capsys.readouterr()
    assert "skipped: " in said.out + said.err and "1.mp4 is too short: it has 3 frames, a clip 4" in said.out + said.err


@pytest.fixture
def saved(tmp_path):
    classifier().save_pretrained(tmp_path / "model")
    write_bars(tmp_path / "videos", 2, 6)
    return ["--model", tmp_path / "model", "--data-dir", tmp_path / "videos"]


def run(capsys, *arguments):
    return run_here(capsys, *arguments, main=evaluate_video_classifier.main)


def test_the_evaluator_writes_scores_classes_and_a_page_with_the_worst_first(capsys, tmp_path, saved):
    code, output = run(capsys, *saved, "--clips", "2", "--pictures", "4", "--output-dir", tmp_path / "out")
    assert code == 0 and "6 videos, 3 classes" in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    source = folder_videos(tmp_path / "videos")
    logs = {}
    expected = show(source, classifier(), clips=2, keep=lambda some, found: logs.update(zip(some, found, strict=True)))
    assert report["videos"] == 6 and report["top1"] == pytest.approx(expected.accuracy(1))
    assert report["loss"] == pytest.approx(expected.loss, abs=1e-5) and report["options"]["clips"] == 2
    rows = list(csv.DictReader((tmp_path / "out" / "classes.csv").open()))
    assert [row["name"] for row in rows] == list(NAMES) and (tmp_path / "out" / "confusion.png").is_file()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<img ") == 4 and "<script" not in page
    shares = [float(part.split("<")[0]) for part in page.split("&middot; probability of the true class ")[1:]]
    every = sorted(float(logs[index][source.labels[index]].exp()) for index in range(6))
    assert shares == pytest.approx(every[:4], abs=1e-3)


def test_backwards_the_truth_is_the_opposite(capsys, tmp_path, saved):
    code, _ = run(capsys, *saved, "--order", "reversed", "--opposites", "left=right", "--output-dir", tmp_path / "out")
    assert code == 0
    found = show(folder_videos(tmp_path / "videos"), classifier(), order="reversed")
    truth = torch.tensor([1, 1, 0, 0, 2, 2])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["top1"] == pytest.approx(float((found.ranked[:, 0] == truth).float().mean()))
    rows = list(csv.DictReader((tmp_path / "out" / "classes.csv").open()))
    assert [row["images"] for row in rows] == ["2", "2", "2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "--model nowhere does not load as a video classifier"),
        (["--data-dir", "missing"], "--data-dir missing: there is no such folder"),
        (["--data-dir", ""], "--data-dir is empty"),
        (["--opposites", "left=right"], "--opposites belongs to --order reversed"),
        (["--order", "reversed", "--opposites", "left"], "'left' is no pair of classes"),
        (["--order", "reversed", "--opposites", "left=up"], "label 'up' is unknown"),
        (["--clips", "0"], "--clips"),
        (["--order", "sideways"], "--order"),
        (["--dataset", "x.parquet"], "choose one"),
    ],
)
def test_bad_input_ends_with_one_line(capsys, tmp_path, offline, saved, arguments, message):
    code, output = run(capsys, *saved, "--output-dir", tmp_path / "out", *arguments)
    assert code != 0 and message in output
    assert not (tmp_path / "out" / "report.json").exists()


def test_data_have_to_be_named_and_classes_to_be_the_models(capsys, tmp_path, saved):
    code, output = run(capsys, *saved[:2], "--output-dir", tmp_path / "out")
    assert code and "no data was named: --data-dir" in output
    other = write_bars(tmp_path / "other", 1, 4, classes=("left", "sideways"))
    code, _ = run(capsys, *saved[:2], "--data-dir", other, "--output-dir", tmp_path / "out")
    assert "not among the model's names: sideways" in str(code)


def test_a_classifier_of_transformers_says_itself_how_long_its_clips_are(capsys, tmp_path):
    """Its video processor leaves that open."""
    write_bars(tmp_path / "videos", 1, 6)
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = VideoMAEConfig(num_frames=4, intermediate_size=32, id2label=dict(enumerate(NAMES)), **sizes)
    model = VideoMAEForVideoClassification(config).eval()
    processor = VideoMAEVideoProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    videos = ("--data-dir", tmp_path / "videos", "--crops", "3", "--output-dir", tmp_path / "out")
    code, output = run(capsys, "--model", tmp_path / "model", *videos)
    assert code == 0, output
    losses = []
    source = folder_videos(tmp_path / "videos")
    for index, file in enumerate(source.files):
        with Video(file) as video, torch.no_grad():
            clip = video.frames(middles(len(video), 4))
            logits = model(**processor(clip, do_sample_frames=False, return_tensors="pt")).logits
        losses.append(F.cross_entropy(logits, torch.tensor([int(source.labels[index])])))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)  # square: three equal crops


def test_a_folder_whose_processor_is_for_other_clips_is_refused(capsys, tmp_path, saved):
    make_video_processor(32, 8).save_pretrained(tmp_path / "model")
    code, _ = run(capsys, *saved, "--output-dir", tmp_path / "out")
    assert "is for clips of 4 frames, its video processor for 8; restore" in str(code)


def test_nothing_readable_is_no_score(capsys, tmp_path, saved):
    for path in (tmp_path / "videos").rglob("*.mp4"):
        path.write_bytes(b"no video")
    code, _ = run(capsys, *saved, "--on-bad-image", "skip", "--output-dir", tmp_path / "out")
    assert "none of the 6 videos of videos can be read" in str(code)
    assert not (tmp_path / "out" / "report.html").exists()
