"""evaluate_classifier: scores against scikit-learn's, classes matched by name, bad input."""

import csv
import json
import os
import signal
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.data import source
from helpers.models import randomize
from helpers.processes import Script
from helpers.training import run_here
from sklearn.metrics import top_k_accuracy_score

from d_emo import EMOv2Config, EMOv2ForImageClassification
from d_emo.classification.transformers_models import make_image_processor
from d_emo.common.locks import FolderLock
from d_emo.eval import evaluate_classifier
from d_emo.eval.classification.accuracy import Predictions, PreparedImages, predict
from d_emo.eval.classification.command import align_labels, open_classifier
from d_emo.images.open_source import open_source

NAMES = ["oak", "elm", "fir, fir tree", "yew", "ash", "box"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny network of six classes with random weights, saved with its processor."""
    path = tmp_path_factory.mktemp("classifier")
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: number for number, name in enumerate(NAMES)}}
    config = EMOv2Config(depths=(1, 1, 1, 1), widths=(8, 8, 16, 16), head_dims=(8, 8, 8, 8), **labels)
    model = EMOv2ForImageClassification(config)
    randomize(model)
    model.save_pretrained(path)
    make_image_processor(32).save_pretrained(path)
    return path


def write_photos(root, names, count=5):
    random = np.random.RandomState(0)
    for name in names:
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.randint(0, 256, (40, 44, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


def run(capsys, *arguments):
    return run_here(capsys, *arguments, main=evaluate_classifier.main)


def test_scores_equal_scikit_learns_and_those_computed_by_hand(capsys, tmp_path, folder):
    photos = write_photos(tmp_path / "trees", ["yew", "oak", "fir tree"])
    code, output = run(capsys, "--model", folder, "--data-dir", photos, "--output-dir", tmp_path / "out")
    assert code == 0 and "15 images, 3 classes" in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    model, processor = open_classifier(str(folder))
    truth, logits = [], []
    for path in sorted(photos.rglob("*.png")):
        truth.append({"yew": 3, "oak": 0, "fir tree": 2}[path.parent.name])
        with torch.no_grad():
            logits.append(model(**processor(images=PIL.Image.open(path), return_tensors="pt")).logits[0].numpy())
    for top in (1, 5):
        expected = top_k_accuracy_score(truth, np.array(logits), k=top, labels=range(6))
        assert report[f"top{top}"] == pytest.approx(expected, abs=1e-6)
    expected = torch.nn.functional.cross_entropy(torch.tensor(np.array(logits)), torch.tensor(truth))
    assert report["loss"] == pytest.approx(float(expected), abs=1e-5)
    rows = list(csv.DictReader((tmp_path / "out" / "classes.csv").open()))
    assert [(row["name"], row["images"]) for row in rows] == [("oak", "5"), ("fir, fir tree", "5"), ("yew", "5")]
    found = np.argmax(logits, axis=1)[np.array(truth) == 0] == 0
    assert float(rows[0]["recall"]) == pytest.approx(found.mean())
    assert PIL.Image.open(tmp_path / "out" / "confusion.png").size[0] > 500


def test_shares_of_processes_make_the_whole():
    whole = source(NAMES, [0, 1, 2, 3, 4, 5, 0])
    config = EMOv2Config(depths=(1, 1, 1, 1), widths=(8, 8, 16, 16), head_dims=(8, 8, 8, 8), num_labels=6)
    model = randomize(EMOv2ForImageClassification(config)).eval()
    options = {"batch_size": 2, "num_workers": 0, "device": torch.device("cpu")}
    alone = predict(model, whole, make_image_processor(32), **options)
    parts = [predict(model, whole, make_image_processor(32), rank=rank, world_size=9, **options) for rank in range(9)]
    joined = Predictions.joined(parts)
    assert len(joined.labels) == 7 and joined.accuracy() == alone.accuracy()
    assert joined.loss == pytest.approx(alone.loss, abs=1e-6)


def test_classes_are_matched_by_name_or_by_number_and_never_by_half():
    model = dict(enumerate(NAMES))
    aligned, note = align_labels(source(["fir", "oak"], [0, 1, 0]), model)
    assert aligned.labels.tolist() == [2, 0, 2] and not note
    by_number, note = align_labels(source(list("012345"), [5, 0]), model)
    assert by_number.labels.tolist() == [5, 0] and "by number" in note
    with pytest.raises(ValueError, match="not among the model's names: palm"):
        align_labels(source(["oak", "palm"], [0, 1]), model)
    with pytest.raises(ValueError, match="has 2 classes, the model 6"):
        align_labels(source(["0", "1"], [0, 1]), model)


TWELVE = [f"kind {letter}" for letter in "abcdefghijkl"]


@pytest.mark.parametrize("names", [TWELVE, [f"LABEL_{i}" for i in range(12)], [str(i) for i in range(12)]])
@pytest.mark.parametrize("zeros", [1, 2, 4])
def test_numbered_folders_are_compared_with_the_models_classes_by_their_numbers(tmp_path, names, zeros):
    photos = write_photos(tmp_path, [str(number).zfill(zeros) for number in range(12)], count=1)
    aligned, _ = align_labels(open_source(str(photos), None), dict(enumerate(names)))
    folders = [int(path.parent.name) for path in aligned.files]
    assert aligned.labels.tolist() == folders == list(range(12))


@pytest.mark.parametrize("names", [[f"LABEL_{i}" for i in range(12)], [str(i) for i in range(12)]])
def test_some_numbers_are_enough_for_a_model_without_names_of_its_own(names):
    aligned, _ = align_labels(source(["3", "10"], [0, 1, 0]), dict(enumerate(names)))
    assert aligned.labels.tolist() == [3, 10, 3]
    with pytest.raises(ValueError, match="not among the model's names: 12"):
        align_labels(source(["12", "3"], [0, 1]), dict(enumerate(names)))


@pytest.mark.parametrize("numbers", [["1", "2", "3", "4", "5", "6"], ["0", "1", "2", "3", "4", "9"]])
def test_numbers_that_are_no_ids_of_the_model_are_refused(numbers):
    with pytest.raises(ValueError, match="the model 6, and these are not among"):
        align_labels(source(numbers, [0]), dict(enumerate(NAMES)))


def test_names_match_in_any_form_of_unicode():
    aligned, note = align_labels(source(["Ahorn", "Ka\u0308fer"], [1, 0]), {0: "K\u00e4fer", 1: "Ahorn"})
    assert aligned.labels.tolist() == [0, 1] and not note


def test_a_strip_is_scored_in_little_memory():
    strips = replace(source(["a"], [0, 0]), read=lambda index: PIL.Image.new("RGB", [(3, 60000), (60000, 3)][index]))
    images = PreparedImages(strips, make_image_processor(224))
    assert images(0)[0].shape == images(1)[0].shape == (3, 224, 224)


def test_an_unreadable_image_ends_with_its_name(capsys, tmp_path, folder):
    photos = write_photos(tmp_path / "trees", ["yew"])
    (photos / "yew" / "3.png").write_bytes(b"no image")
    code, _ = run(capsys, "--model", folder, "--data-dir", photos, "--output-dir", tmp_path / "out")
    assert "3.png cannot be read" in code and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "nowhere"], "--data-dir nowhere: there is no such folder"),
        (["--dataset", "nowhere.parquet"], "--dataset nowhere.parquet"),
        (["--data-dir", ""], "--data-dir is empty"),
        (["--dataset", ""], "--dataset is empty"),
    ],
)
def test_missing_images_are_named(capsys, folder, offline, arguments, message):
    code, output = run(capsys, "--model", folder, *arguments)
    assert code != 0 and message in output


def test_a_missing_model_is_named(capsys, offline):
    code, _ = run(capsys, "--model", "nowhere")
    assert "--model nowhere does not load as an image classifier" in code


def test_cifar_files_are_scored(shared, tmp_path, capsys, folder):
    """A file whose classes are not the model's is refused before anything runs."""
    code, _ = run(capsys, "--model", folder, "--dataset", shared / "data" / "cifar10-test.parquet")
    assert "has 10 classes, the model 6" in code


def test_every_image_counts_once():
    whole = replace(source(["a", "b"], [0, 1, 1]), name="three")
    config = EMOv2Config(depths=(1, 1, 1, 1), widths=(8, 8, 16, 16), head_dims=(8, 8, 8, 8), num_labels=2)
    predictions = predict(EMOv2ForImageClassification(config).eval(), whole, make_image_processor(32), batch_size=2,
                          num_workers=0, device=torch.device("cpu"))  # fmt: skip
    assert predictions.labels.tolist() == [0, 1, 1] and predictions.accuracy(5) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "{tmp}/none"], "--data-dir {tmp}/none: there is no such folder"),
        (["--dataset", "{tmp}/none.tar"], "--dataset {tmp}/none.tar: 1 of 1 shards are missing"),
        (["--output-dir", "{tmp}/file"], "--output-dir {tmp}/file is no folder"),
        (["--output-dir", "{tmp}/file/out"], "{tmp}/file is no folder; name another place"),
        (["--dataset", "{tmp}/none.tar", "--class-names", "{tmp}/file"], "--class-names {tmp}/file: empty"),
    ],
)
def test_what_can_be_found_at_once_is_found_before_the_model_is_loaded(
    capsys, tmp_path, monkeypatch, arguments, message
):
    from d_emo.eval.classification import command

    monkeypatch.setattr(command, "open_classifier", lambda _: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    filled = [text.format(tmp=tmp_path) for text in arguments]
    code, printed = run(capsys, "--model", "some/model", "--output-dir", tmp_path / "out", *filled)
    assert code != 0 and message.format(tmp=tmp_path) in printed and not (tmp_path / "out").exists()


def test_two_that_write_one_report_are_kept_apart_and_links_are_not_followed(capsys, tmp_path, folder):
    photos = write_photos(tmp_path / "trees", ["yew"], count=2)
    arguments = ("--model", folder, "--data-dir", photos, "--output-dir", tmp_path / "out")
    with FolderLock(tmp_path / "out"):
        code, printed = run(capsys, *arguments)
    assert code != 0 and "out is in use by" in printed and "or name another" in printed
    (tmp_path / "target").write_text("precious")
    for name in ("report.json", "classes.csv", "confusion.png"):
        (tmp_path / "out" / name).symlink_to(tmp_path / "target")
    code, printed = run(capsys, *arguments)
    assert code == 0 and (tmp_path / "target").read_text() == "precious", printed


INTERRUPTED = """
import time
from pathlib import Path
from torch.utils.data import get_worker_info
from d_emo.images import folders
original = folders.decode
def slow(*arguments):
    if get_worker_info() is not None:
        Path({marker!r}).touch()
        time.sleep(0.3)
    return original(*arguments)
folders.decode = slow
from d_emo.{module} import {name}
{name}.main({arguments!r})
"""


@pytest.mark.parametrize(
    ("module", "name", "arguments", "kept"),
    [
        ("eval", "evaluate_classifier", ["--model", "{model}", "--data-dir", "{photos}"], "nothing is written before"),
        pytest.param(
            "eval", "evaluate_fid",
            ["--samples", "{photos}", "--reference", "{photos}", "--features", "pixels", "--cache-dir", "{tmp}/cache"],
            "the same command goes on from here", marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
def test_ctrl_c_ends_readers_and_their_processes_with_one_line(tmp_path, folder, module, name, arguments, kept):
    photos = write_photos(tmp_path / "trees", ["yew"], count=40)
    filled = [text.format(model=folder, photos=photos, tmp=tmp_path) for text in arguments]
    filled += ["--num-workers", "2", "--output-dir", str(tmp_path / "out")]
    marker = tmp_path / "reading"
    code = INTERRUPTED.format(module=module, name=name, arguments=filled, marker=str(marker))
    with Script(tmp_path / "log", "-c", code) as running:
        running.wait_until(marker.exists)
        os.killpg(running.process.pid, signal.SIGINT)
        assert running.finish() == 130
        assert running.output.splitlines()[-1].startswith(f"{name}: interrupted; {kept}")
        assert "Traceback" not in running.output and "KeyboardInterrupt" not in running.output


def test_packaged_classifiers_are_known_by_their_names_and_names_of_nobody_are_not_asked_of_the_hub(monkeypatch):
    model, processor = open_classifier("digits-classifier")
    assert model.config.id2label[7] == "seven" and processor.crop_size["height"] == 32
    monkeypatch.setattr("transformers.AutoModelForImageClassification.from_pretrained", lambda _: pytest.fail("asked"))
    with pytest.raises(ValueError, match=r"digits-clasifier .* no packaged model but digits, digits-"):
        open_classifier("digits-clasifier")
