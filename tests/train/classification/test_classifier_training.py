"""The classification trainer as a user starts it: digits, exact resume, fine-tuning, distillation, bad input."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.classifiers import TINY, TINY_NETWORK
from helpers.paths import ROOT
from helpers.processes import Trainer
from helpers.training import losses, run_here, train_to_the_end
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from d_emo.images.digits import digits_source
from d_emo.images.source import held_out
from d_emo.train import train_classifier


def run(capsys, *arguments):
    return run_here(capsys, *arguments, main=train_classifier.main)


class ClassifierTrainer(Trainer):
    """The classification trainer as a process of its own."""

    script = ROOT / "train" / "train_classifier.py"


@pytest.mark.slow
def test_digits_are_learned_and_the_saved_folder_answers_as_it_was_validated(capsys, tmp_path):
    config = ROOT / "train" / "configs" / "classifier" / "digits.yaml"
    code, output = run(capsys, "--config", config, "--output-dir", tmp_path, "--epochs", "9", "--report-to", "none")
    assert code == 0 and "No data was named" in output
    steps, top1, top5, _ = (tmp_path / "validation.csv").read_text().splitlines()[-1].split(",")
    assert steps == "203" and float(top1) > 0.97 and float(top5) > 0.99
    classify = pipeline("image-classification", str(tmp_path))
    _, held = held_out(digits_source(), 0.2)
    answers = classify([held.read(index).convert("RGB") for index in range(held.size)], top_k=1)
    names = [held.id2label[label] for label in held.labels]
    right = np.mean([answer[0]["label"] == name for answer, name in zip(answers, names, strict=True)])
    assert right == pytest.approx(float(top1), abs=1e-6)
    card = (tmp_path / "README.md").read_text()
    assert f"| 203 | {float(top1):.2%} |" in card and "zero, one" in card
    assert PIL.Image.open(tmp_path / "curves.png").size[0] > 500


@pytest.mark.slow
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(capsys, tmp_path):
    """With every kind of randomness on: policy, erasing, mixup, stochastic depth; and validation in between."""
    more = ["--mixup", "0.8", "--cutmix", "1", "--random-erasing", "0.5", "--checkpoint-every", "3", "--output-dir"]
    length = ["--max-train-steps", "6", "--validate-every", "2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(capsys, *TINY, *length, *more, whole)[0] == 0
    assert run(capsys, *TINY, *length, *more, parts)[0] == 0
    for path in (parts / "checkpoint-0000006").rglob("*"):
        if path.is_file():
            path.unlink()  # as if it had been killed
    code, output = run(capsys, *TINY, *length, *more, parts, "--resume-from", "latest")
    assert code == 0 and "resuming from" in output and "checkpoint-0000003" in output
    assert losses(parts) == losses(whole) and len(losses(whole)) == 7
    assert (parts / "validation.csv").read_text() == (whole / "validation.csv").read_text()
    for name in ("model.safetensors", "training_state/model.safetensors"):
        a, b = (load_file(folder / "checkpoint-0000006" / name) for folder in (whole, parts))
        assert all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.slow
def test_two_processes_train_and_validate_as_one_does(capsys, tmp_path):
    """Two micro batches on one process or one on each of two: losses to 1e-5 (sums round differently).

    Blocks are dropped alike.
    """
    assert '"drop_path": 0.2' in TINY_NETWORK
    options = [*TINY, "--micro-batch-size", "8", "--max-train-steps", "3", "--output-dir"]
    tables = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        train_to_the_end(capsys, tmp_path / "log", *options, folder, processes=processes, main=train_classifier.main,
                         kind=ClassifierTrainer)  # fmt: skip
        training = [float(line.split(",")[1]) for line in losses(folder)[1:]]
        validation = [float(value) for value in (folder / "validation.csv").read_text().splitlines()[-1].split(",")]
        tables.append([*training, *validation])
    assert len(tables[0]) == 7 and tables[1] == pytest.approx(tables[0], rel=1e-5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained network of ten classes."""
    folder = tmp_path_factory.mktemp("trained")
    train_classifier.main([*TINY, "--max-train-steps", "2", "--validation-share", "0", "--output-dir", str(folder)])
    return folder


def write_photos(root, names=("oak", "elm", "fir"), count=6):
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for index in range(count):
            PIL.Image.new("RGB", (40, 36), (number * 100, index * 30, 7)).save(root / name / f"{index}.png")
    return root


def test_fine_tuning_on_a_folder_keeps_the_body_and_renews_the_head(capsys, tmp_path, trained):
    photos = write_photos(tmp_path / "trees")
    config = ROOT / "train" / "configs" / "classifier" / "finetune.yaml"
    code, output = run(
        capsys, "--config", config, "--init-from", trained, "--train-data-dir", photos, "--validation-share", "0.34",
        "--resolution", "32", "--global-batch-size", "4", "--max-train-steps", "1", "--warmup-epochs", "0",
        "--learning-rate", "1e-9", "--output-dir", tmp_path / "out", "--report-to", "none",
    )  # fmt: skip
    assert code == 0, output
    before, after = (load_file(folder / "model.safetensors") for folder in (trained, tmp_path / "out"))
    assert after["emov2.head.weight"].shape == (3, 16)
    body = [key for key in before if not key.startswith("emov2.head") and "running" not in key and "tracked" not in key]
    # A step of 1e-9 changes nothing that float32 shows at 1e-6.
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in body) and len(body) > 50
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").config.id2label == {
        0: "elm",
        1: "fir",
        2: "oak",
    }
    assert "validation trees, held out: 7 images" in output
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size["shortest_edge"] == round(32 / 0.875)


def test_a_timm_network_is_trained_and_saved_for_transformers(capsys, tmp_path):
    code, output = run(capsys, *TINY, "--model", "timm:mobilenetv3_small_050", "--model-config", "{}",
                       "--max-train-steps", "1", "--validation-share", "0", "--output-dir", tmp_path)  # fmt: skip
    assert code == 0, output
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.id2label[3] == "three" and model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 10)
    assert AutoImageProcessor.from_pretrained(tmp_path).crop_size["height"] == 32


@pytest.mark.slow
def test_a_teacher_changes_what_is_learned_and_is_named_in_the_card(capsys, tmp_path, trained):
    teacher, first = tmp_path / "teacher", {}
    decided = AutoModelForImageClassification.from_pretrained(trained)
    decided.emov2.head.bias.data[3] = 5  # sure of "three", where the student knows nothing yet
    decided.save_pretrained(teacher)
    AutoImageProcessor.from_pretrained(trained).save_pretrained(teacher)
    for weight in ("0", "5"):
        code, output = run(capsys, *TINY, "--teacher", teacher, "--teacher-weight", weight, "--max-train-steps", "1",
                           "--output-dir", tmp_path / weight)  # fmt: skip
        assert code == 0 and f"{teacher}, weight {weight}" in output
        first[weight] = float(losses(tmp_path / weight)[1].split(",")[1])
    sure = torch.tensor([0.0] * 3 + [5.0] + [0.0] * 6).log_softmax(0)
    divergence = (sure.exp() * (sure - torch.tensor(0.1).log())).sum()  # from the student's even answer
    assert first["5"] - first["0"] == pytest.approx(5 * float(divergence), abs=0.05)
    assert "| teacher_weight | 5.0 |" in (tmp_path / "5" / "README.md").read_text()
    code, output = run(capsys, *TINY, "--teacher", teacher, "--train-data-dir", write_photos(tmp_path / "trees"),
                       "--max-train-steps", "1", "--output-dir", tmp_path / "refused")  # fmt: skip
    assert "has 10 classes, the data 3" in code


@pytest.mark.slow
def test_a_stream_is_trained_on(capsys, tmp_path):
    import datasets

    photos = [PIL.Image.new("RGB", (32, 32), (index * 7, 0, 0)) for index in range(24)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "light"])})
    table = datasets.Dataset.from_dict({"image": photos, "label": [int(i > 11) for i in range(24)]}, features=features)
    table.to_parquet(tmp_path / "stream.parquet")
    arguments = [*TINY, "--dataset", tmp_path / "stream.parquet", "--streaming", "--output-dir", tmp_path / "out"]
    code, output = run(capsys, *arguments, "--max-train-steps", "2", "--checkpoint-every", "1")
    assert code == 0, output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == {"0": "dark", "1": "light"}
    assert len(losses(tmp_path / "out")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "EMOv2-3M"], "classifier 'EMOv2-3M' is unknown; did you mean"),
        (["--model", "timm:resnet1"], "--model timm:resnet1: "),
        (["--model-config", "{depth}"], "expected JSON"),
        (["--model-config", '{"depth": 3}'], "--model-config has ['depth']; choose from version, depths"),
        (["--validation-share", "1.5"], "must be in [0, 1)"),
        (["--validation-share", "0.1", "--validation-dir", "x"], "choose one"),
        (["--validation-split", "test"], "it goes with --dataset"),
        (["--latents", "x"], "classifiers are trained on images"),
        (["--unconditional", "true"], "classifiers need classes"),
        (["--resolution", "16"], "must be 32 or more"),
        (["--auto-augment", "rend-m9"], "timm does not know it"),
        (["--optimizer", "adamx"], "--optimizer adamx"),
        (["--init-from", "nowhere", "--model-config", "{}"], "--init-from nowhere"),
        (["--init-from", "nowhere"], "the network of --init-from is what it is"),
        (["--teacher", "nowhere"], "--teacher nowhere does not load"),
        (["--mixup", "0.8", "--global-batch-size", "15"], "use an even number"),
        (["--label-smoothing", "1"], "must be in [0, 1)"),
        (["--max-grad-norm", "-1"], "must be 0 or more"),
    ],
)
def test_bad_input_ends_with_one_line_and_writes_nothing(capsys, tmp_path, offline, arguments, message):
    code, _ = run(capsys, *TINY, "--max-train-steps", "1", "--output-dir", tmp_path / "out", *arguments)
    assert isinstance(code, str) and message in code and "\n" not in code
    assert not (tmp_path / "out" / "config.json").exists()


def test_validation_images_of_unknown_classes_are_refused(capsys, tmp_path):
    train = write_photos(tmp_path / "train")
    other = write_photos(tmp_path / "val", ("oak", "yew"), 2)
    code, _ = run(capsys, *TINY, "--train-data-dir", train, "--validation-dir", other, "--max-train-steps", "1",
                  "--output-dir", tmp_path / "out")  # fmt: skip
    assert "which is trained on, does not have: yew" in code


def test_a_loss_that_is_not_finite_stops_the_run(capsys, tmp_path):
    code, _ = run(capsys, *TINY, "--learning-rate", "1e30", "--max-grad-norm", "0", "--warmup-lr-ratio", "1",
                  "--max-train-steps", "9", "--output-dir", tmp_path / "out")  # fmt: skip
    assert "The weights were not changed" in code
