"""The segmentation trainer as a user starts it: training, exact resume, several processes, bad input."""

import json
import re
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from helpers.masks import NETWORK, TINY, blocks, picture_of, write_masks
from helpers.paths import ROOT
from helpers.processes import Trainer
from helpers.training import losses, run_here, train_to_the_end
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline

from d_emo.eval.segmentation.predict import evaluate_pixels
from d_emo.images.masks import folder_masks
from d_emo.train import train_segmenter

NAMES = ("ground", "red", "green")


def run(capsys, *arguments):
    return run_here(capsys, *arguments, main=train_segmenter.main)


class SegmenterTrainer(Trainer):
    """The segmentation trainer as a process of its own."""

    script = ROOT / "train" / "train_segmenter.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six pictures to train on, two to validate on, and names of their classes."""
    folder = tmp_path_factory.mktemp("data")
    write_masks(folder / "train", [str(number) for number in range(6)])
    write_masks(folder / "val", ["x", "y"], size=(64, 52))
    (folder / "names.txt").write_text("\n".join(NAMES))
    return folder


def base(data):
    return [*TINY, "--train-data-dir", data / "train", "--validation-dir", data / "val", "--class-names",
            data / "names.txt"]  # fmt: skip


def test_it_trains_validates_and_saves_what_pipelines_load(capsys, tmp_path, data):
    code, output = run(capsys, *base(data), "--max-train-steps", "2", "--short-side", "40", "--output-dir", tmp_path)
    assert code == 0, output
    assert "train: 6 images, 3 classes" in output and "val: 2 images" in output and "validation mIoU" in output
    table = (tmp_path / "validation.csv").read_text().splitlines()
    assert table[0] == "step,miou,mdice,aacc,macc" and len(table) == 2
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    assert dict(model.config.id2label) == dict(enumerate(NAMES)) and processor.size["shortest_edge"] == 40
    source = folder_masks(data / "val")
    scores = evaluate_pixels(
        model, processor, source, device=torch.device("cpu"), rank=0, world_size=1, window=None, stride=None,
        mixed_precision=False, num_workers=0, progress=False,
    )  # fmt: skip
    assert [scores.miou, scores.aacc] == pytest.approx([float(table[1].split(",")[i]) for i in (1, 3)], abs=1e-9)
    found = pipeline("image-segmentation", str(tmp_path))(source.read(0).image)
    assert {entry["label"] for entry in found} <= {*NAMES}
    assert found[0]["mask"].size == source.read(0).image.size
    card = (tmp_path / "README.md").read_text()
    assert "ground, red, green" in card and f"| 2 | {scores.miou:.2%} |" in card and "image-segmentation" in card


def test_windows_on_pictures_as_they_are(capsys, tmp_path, data):
    """A UNet takes no side of 52 or 40 pixels by itself."""
    network = ["--model", "UNet-S5-D16", "--model-config", '{"base_channels": 8}']
    more = ["--max-train-steps", "1", "--output-dir", tmp_path]
    code, output = run(capsys, *base(data), *network, *more, "--dry-run")
    assert code != 0 and "--validation-window is missing" in output
    code, output = run(capsys, *base(data), *network, *more, "--validation-window", "32")
    assert code == 0 and "windows of 32 every 21 pixels" in output, output
    assert AutoImageProcessor.from_pretrained(tmp_path).do_resize is False
    assert "predict_in_windows(model, pixels, 32, 21)" in (tmp_path / "README.md").read_text()


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(capsys, tmp_path, data):
    """With every kind of randomness on: scale, crop, colours, mirror, dropout, stochastic depth; and validation."""
    more = ["--max-train-steps", "4", "--validate-every", "2", "--checkpoint-every", "2", "--ema-decay", "0.9"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, output = run(capsys, *base(data), *more, "--output-dir", whole)
    assert code == 0, output
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoint-0000004")  # as if it had been killed
    code, output = run(capsys, *base(data), *more, "--output-dir", parts, "--resume-from", "latest")
    assert code == 0 and "resuming from" in output and "checkpoint-0000002" in output, output
    same_runs(whole, parts, "checkpoint-0000004")


@pytest.mark.slow
def test_scores_that_a_killed_run_owes_are_made_up_for(capsys, tmp_path, data):
    """It ended after the checkpoint of a step and before its scores: in the middle of a run, and at its end."""
    arguments = [*base(data), "--validate-every", "1", "--checkpoint-every", "1", "--output-dir", tmp_path]
    code, output = run(capsys, *arguments, "--max-train-steps", "2")
    assert code == 0, output
    table = tmp_path / "validation.csv"
    whole = table.read_text()
    for kept, last in ((1, 1), (2, 2)):
        table.write_text("".join(whole.splitlines(keepends=True)[:kept]))
        code, output = run(capsys, *arguments, "--max-train-steps", "2", "--resume-from",
                           tmp_path / f"checkpoint-{last:07d}")  # fmt: skip
        assert code == 0 and table.read_text() == whole, output
        assert output.count("validation mIoU") == 3 - kept, output  # no step is scored twice


def same_runs(whole, parts, checkpoint):
    assert losses(parts) == losses(whole) and len(losses(whole)) == 5
    assert (parts / "validation.csv").read_text() == (whole / "validation.csv").read_text()
    for name in ("model.safetensors", "training_state/model.safetensors", "training_state/optimizer.safetensors"):
        a, b = (load_file(folder / checkpoint / name) for folder in (whole, parts))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_bit_for_bit(tmp_path, data):
    more = ["--max-train-steps", "4", "--validate-every", "2", "--checkpoint-every", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    with SegmenterTrainer(tmp_path / "log", *base(data), *more, "--output-dir", whole) as trainer:
        assert trainer.finish(600) == 0, trainer.output
    with SegmenterTrainer(tmp_path / "killed", *base(data), *more, "--output-dir", parts) as trainer:
        trainer.wait_until(lambda: (parts / "checkpoint-0000001").is_dir(), 600)
        trainer.kill()
    assert not (parts / "model.safetensors").exists()
    arguments = [*base(data), *more, "--output-dir", parts, "--resume-from", "latest"]
    with SegmenterTrainer(tmp_path / "resumed", *arguments) as trainer:
        assert trainer.finish(600) == 0 and "resuming from" in trainer.output, trainer.output
    same_runs(whole, parts, "checkpoint-0000004")


@pytest.mark.slow
def test_two_processes_train_and_validate_as_one_does(capsys, tmp_path, data):
    """Two micro batches on one process or one on each of two: losses to 1e-5 (sums round differently).

    Blocks and the head's channels are dropped alike.
    """
    assert '"drop_path": 0.2' in NETWORK
    options = [*base(data), "--micro-batch-size", "2", "--max-train-steps", "3"]
    tables = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        train_to_the_end(capsys, tmp_path / "log", *options, "--output-dir", folder, processes=processes,
                         main=train_segmenter.main, kind=SegmenterTrainer)  # fmt: skip
        training = [float(line.split(",")[1]) for line in losses(folder)[1:]]
        validation = [float(value) for value in (folder / "validation.csv").read_text().splitlines()[-1].split(",")]
        tables.append([*training, *validation])
    assert len(tables[0]) == 8 and tables[1] == pytest.approx(tables[0], rel=1e-5)


def test_a_share_of_the_pictures_is_held_out(capsys, tmp_path, data):
    code, output = run(
        capsys, *TINY, "--train-data-dir", data / "train", "--validation-share", "0.34", "--dry-run", "--head",
        "segformer", "--output-dir", tmp_path,
    )  # fmt: skip
    assert code == 0 and "train: 4 images" in output and "train, held out: 2 images" in output, output


def test_fine_tuning_a_trained_segmenter_for_other_classes(capsys, tmp_path, data):
    plain = [*TINY[2:], "--train-data-dir", data / "train", "--max-train-steps", "1", "--learning-rate", "1e-9"]
    code, output = run(capsys, *TINY[:2], *plain, "--output-dir", tmp_path / "first")
    assert code == 0, output
    code, output = run(
        capsys, *plain, "--class-names", data / "names.txt", "--init-from", tmp_path / "first", "--output-dir",
        tmp_path / "second",
    )  # fmt: skip
    assert code == 0, output
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    kept = [key for key in before if "classifier" not in key and "running" not in key and "tracked" not in key]
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in kept) and len(kept) > 50
    assert not torch.allclose(before["decode_head.classifier.weight"], after["decode_head.classifier.weight"])
    card = (tmp_path / "second" / "README.md").read_text()
    assert "fine-tuned from first" in card and "--init-from first" in card


BAD = {
    "nothing named": ([], "no data was named: --train-data-dir"),
    "no such folder": (["--train-data-dir", "none"], "--train-data-dir none: none: there is no such folder"),
    "an empty folder": (["--train-data-dir", "{empty}"], "no folder of masks"),
    "one class": (["--train-data-dir", "{one}"], "have one class, '0'; a segmenter needs two or more"),
    "two sources": (["--train-data-dir", "a", "--dataset", "b"], "are both given"),
    "masks of nothing": (["--mask-dir", "a"], "it goes with --train-data-dir"),
    "another size": (["--train-data-dir", "{size}"], "has 20 x 20 pixels, and its picture"),
    "an id too many": (["--train-data-dir", "{train}", "--class-names", "{two}"], "holds 2, which is no class"),
    "a missing mask": (["--train-data-dir", "{missing}"], "1 file is without a mask"),
    "a damaged picture": (["--train-data-dir", "{damaged}"], "cannot be read"),
    "classes to validate on": (
        ["--train-data-dir", "{train}", "--validation-dir", "{more}"], "--validation-dir .*holds 3, which is no class"
    ),
    "damage to validate on": (
        ["--train-data-dir", "{train}", "--validation-dir", "{damaged}", "--on-bad-image", "skip"],
        "b.png cannot be read.*every image to validate on counts",
    ),
    "nothing to hold out": (["--train-data-dir", "{train}", "--validation-share", "0.01"], "leave nothing"),
    "an odd crop": (
        ["--train-data-dir", "{train}", "--model", "UNet-S5-D16", "--model-config", '{{"base_channels": 8}}',
         "--crop-size", "40"], "--crop-size 40: this network takes multiples of 16; use 32"
    ),
    "one crop at once": (
        ["--train-data-dir", "{train}", "--global-batch-size", "1"], "--global-batch-size 1 = .*BatchNorm"
    ),
    "no network": (["--train-data-dir", "{train}", "--model-config", '{{"widths": 3}}'], "widths=3"),
    "panoptic alone": (["--train-data-dir", "{train}", "--panoptic-json", "{two}"], "two.txt is damaged"),
    "a gap": (["--validation-window", "32", "--validation-stride", "40"], "--validation-stride 40: leaves gaps"),
    "scales": (["--scale-min", "2", "--scale-max", "1"], "--scale-max 1"),
    "a stream of nothing": (["--ignore-index", "-1"], "--ignore-index -1: must be in"),
    "an output among the pictures": (
        ["--train-data-dir", "{train}", "--output-dir", "{train}/masks/run"], "--output-dir"
    ),
    "a name of no parameter": (
        ["--train-data-dir", "{train}", "--lr-multipliers", "decoder.=10"], "--lr-multipliers: no parameter"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory, data):
    """Sets of pictures, each with something wrong, by name."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "empty").mkdir()
    (folder / "two.txt").write_text("a\nb\n")
    found = {"train": data / "train", "empty": folder / "empty", "two": folder / "two.txt"}
    for name in ("one", "size", "missing", "damaged", "more"):
        found[name] = write_masks(folder / name, ["a", "b"])
    for path in (found["one"] / "masks").iterdir():
        PIL.Image.new("L", (48, 40)).save(path)
    PIL.Image.new("L", (20, 20)).save(found["size"] / "masks" / "b.png")
    (found["missing"] / "masks" / "b.png").unlink()
    (found["damaged"] / "images" / "b.png").write_bytes(b"no picture")
    labels = blocks(classes=4)
    PIL.Image.fromarray(labels).save(found["more"] / "masks" / "a.png")
    picture_of(labels).save(found["more"] / "images" / "a.png")
    return found


@pytest.mark.parametrize("case", BAD)
def test_mistakes_end_with_one_line(case, capsys, tmp_path, places):
    arguments, message = BAD[case]
    filled = [part.format(**places) for part in arguments]
    output_dir = [] if "--output-dir" in filled else ["--output-dir", tmp_path / "out"]
    code, output = run(capsys, *TINY, "--max-train-steps", "1", *output_dir, *filled)
    assert code not in (0, None) and "Traceback" not in output
    line = output.strip().splitlines()[-1]
    assert re.search(message, line), output
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_bad_pictures_are_skipped_aloud_where_that_is_asked_for(capsys, tmp_path, places):
    code, output = run(
        capsys, *TINY, "--train-data-dir", places["damaged"], "--on-bad-image", "skip", "--max-train-steps", "1",
        "--output-dir", tmp_path,
    )  # fmt: skip
    assert code == 0 and "b.png cannot be read" in output, output


@pytest.mark.slow
def test_a_tiny_network_learns_colours_by_heart(capsys, tmp_path, data):
    """Every class has a colour of its own, so that a network of 10,000 parameters tells them, in a minute."""
    still = NETWORK.replace('"drop_path": 0.2', '"drop_path": 0.0, "dropout": 0.0')
    code, output = run(
        capsys, *base(data), "--model-config", still, "--head", "semantic_fpn", "--max-train-steps", "300",
        "--learning-rate", "1e-2", "--max-grad-norm", "1", "--validate-every", "300", "--ema-decay", "0.9",
        "--scale-min", "1", "--scale-max", "1", "--no-photometric", "--cpu-threads", "1", "--validation-dir",
        data / "train", "--output-dir", tmp_path,
    )  # fmt: skip
    assert code == 0, output
    _, miou, *_ = (tmp_path / "validation.csv").read_text().splitlines()[-1].split(",")
    print(f"mIoU {miou}")
    assert float(miou) > 0.75


@pytest.mark.slow
@pytest.mark.parametrize("head", ["deeplabv3", "pspnet", "segformer", "semantic_fpn"])
def test_eight_photos_are_learned_by_heart_by_every_head(head, capsys, tmp_path, shared):
    """The recipe of `overfit.yaml` on things against stuff: minutes on a CPU; mIoU above 0.9."""
    coco = shared / "data" / "dense" / "coco" / "train"
    names = ["--train-data-dir", coco, "--panoptic-json", coco / "panoptic.json", "--validation-dir", coco,
             "--validation-json", coco / "panoptic.json"]  # fmt: skip
    config = ROOT / "train" / "configs" / "segmenter" / "overfit.yaml"
    code, output = run(capsys, "--config", config, *names, "--head", head, "--report-to", "none", "--output-dir",
                       tmp_path)  # fmt: skip
    assert code == 0, output
    _, miou, *_ = (tmp_path / "validation.csv").read_text().splitlines()[-1].split(",")
    print(f"{head}: mIoU {miou}")
    assert float(miou) > 0.9
    assert json.loads((tmp_path / "config.json").read_text())["head"] == head
    assert np.isfinite([float(line.split(",")[1]) for line in losses(tmp_path)[1:]]).all()
