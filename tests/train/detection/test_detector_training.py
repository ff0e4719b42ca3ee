"""The detection trainer as a user starts it: exact resume, processes, fine-tuning, learning, bad input."""

import json
import shutil

import pytest
import torch
from helpers.object_files import NARROW, TINY, write_instances, write_panoptic
from helpers.paths import ROOT, SHARED
from helpers.processes import Trainer
from helpers.training import losses, run_here, train_to_the_end
from safetensors.torch import load_file

from d_emo import create_classifier
from d_emo.detection.saved import load_detector
from d_emo.images.coco import coco_objects
from d_emo.train import train_detector

COCO = SHARED / "data" / "dense" / "coco" / "train"
SYSTEMS = ("ssdlite", "retinanet", "mask_rcnn")


class DetectorTrainer(Trainer):
    """The detection trainer as a process of its own."""

    script = ROOT / "train" / "train_detector.py"


def run(capsys, *arguments):
    return run_here(capsys, *arguments, main=train_detector.main)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory):
    return write_instances(tmp_path_factory.mktemp("objects") / "boxes", 8)


def assert_same_end(first, second, step):
    assert losses(first) == losses(second)
    assert (first / "validation.csv").read_text() == (second / "validation.csv").read_text()
    for name in ("model.safetensors", "training_state/model.safetensors", "training_state/optimizer.safetensors"):
        a, b = (load_file(folder / f"checkpoint-{step:07d}" / name) for folder in (first, second))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


@pytest.mark.slow
def test_a_resumed_run_equals_an_undisturbed_one_and_its_folder_answers_as_validated(capsys, tmp_path, boxes):
    """With every kind of randomness on: zoom out, crops, colours, stochastic depth."""
    more = [*TINY, "--train-data-dir", boxes, "--validation-dir", boxes, "--max-train-steps", "4", "--ema-decay", "0.5",
            "--checkpoint-every", "2", "--validate-every", "4", "--output-dir"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, output = run(capsys, *more, whole)
    assert code == 0, output
    assert "bbox_regression " in output and "classification " in output and "validation mAP " in output
    shutil.copytree(whole, parts)
    for path in (parts / "checkpoint-0000004").rglob("*"):
        if path.is_file():
            path.unlink()  # as if it had been killed
    code, output = run(capsys, *more, parts, "--resume-from", "latest")
    assert code == 0 and "resuming from" in output and "checkpoint-0000002" in output, output
    assert_same_end(whole, parts, 4)
    assert len(losses(whole)) == 5
    bundle = load_detector(whole)
    assert bundle.system == "ssdlite" and bundle.id2label == {0: "red", 1: "blue"}
    assert all(torch.equal(tensor, load_file(whole / "model.safetensors")[name])
               for name, tensor in bundle.model.state_dict().items())  # fmt: skip
    from d_emo.eval.detection.predict import evaluate_objects

    source = coco_objects(boxes, boxes / "annotations.json")
    found = evaluate_objects(bundle.model.eval(), source, device=torch.device("cpu")).compute()
    step, mean, half, _ = (whole / "validation.csv").read_text().splitlines()[-1].split(",")
    assert step == "4" and float(mean) == pytest.approx(found["mAP"]) and float(half) == pytest.approx(found["mAP50"])
    card = (whole / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card and f"| 4 | {found['mAP']:.1%} |" in card and "red, blue" in card
    assert (whole / "curves.png").is_file() and json.loads((whole / "run.json").read_text())["data"] == "boxes"


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_train_and_validate_as_one_does(capsys, tmp_path, boxes, system):
    """Two micro batches on one process or one on each of two: losses to 1e-5, weights to 1e-6 (sums round differently).

    A fresh Mask R-CNN is so unsure that rounding decides which of its boxes comes first: with weights that are changed
    by one part in ten million, scores change by a tenth. What two processes score is held to what one does with the
    same weights.
    """
    learned, scored = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        arguments = [*TINY, "--system", system, "--micro-batch-size", "2", "--train-data-dir", boxes,
                     "--validation-dir", boxes, "--max-train-steps", "3", "--output-dir", folder]  # fmt: skip
        train_to_the_end(capsys, tmp_path / "log", *arguments, processes=processes, main=train_detector.main,
                         kind=DetectorTrainer)  # fmt: skip
        training = [float(line.split(",")[1]) for line in losses(folder)[1:]]
        validation = [float(value) for value in (folder / "validation.csv").read_text().splitlines()[-1].split(",")]
        learned.append(training)
        scored.append(validation)
    assert len(learned[0]) == 3 and learned[1] == pytest.approx(learned[0], rel=1e-5)
    assert len(scored[0]) == (7 if system == "mask_rcnn" else 4)
    one, two = (load_detector(tmp_path / str(processes)).model for processes in (1, 2))
    for (name, parameter), (_, other) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(parameter, other, atol=1e-6, rtol=1e-5, msg=name)
    if system != "mask_rcnn":
        assert scored[1] == pytest.approx(scored[0], abs=1e-6)
    from d_emo.eval.detection.predict import evaluate_objects

    source = coco_objects(boxes, boxes / "annotations.json", masks=system == "mask_rcnn")
    again = evaluate_objects(two.to(memory_format=torch.channels_last).eval(), source, device=torch.device("cpu"))
    assert [again.compute()[name] for name in ("mAP", "mAP50", "mAP75")] == pytest.approx(scored[1][1:4], abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_kill_9_while_a_checkpoint_is_written_costs_no_bit(capsys, tmp_path, boxes, system):
    arguments = [*TINY, "--system", system, "--train-data-dir", boxes, "--validation-dir", boxes, "--max-train-steps",
                 "4", "--checkpoint-every", "2", "--num-workers", "2", "--output-dir"]  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with DetectorTrainer(tmp_path / "log", *arguments, whole) as trainer:
        assert trainer.finish(600) == 0, trainer.output
    with DetectorTrainer(tmp_path / "log", *arguments, killed) as trainer:
        trainer.wait_until((killed / ".partial-checkpoint-0000004").exists, 600)
        trainer.kill()
    assert not (killed / "checkpoint-0000004").exists()
    with DetectorTrainer(tmp_path / "log", *arguments, killed, "--resume-from", "latest") as trainer:
        assert trainer.finish(600) == 0 and "checkpoint-0000002" in trainer.output, trainer.output
    assert_same_end(whole, killed, 4)


def test_mask_rcnn_learns_from_a_panoptic_list_frozen_as_published(capsys, tmp_path):
    """On a published checkpoint: the stem, stage 1 and all statistics of the backbone stay as they were."""
    folder = write_panoptic(tmp_path / "panoptic-boxes")
    classifier = create_classifier("EMOv2-1M", num_classes=1000)
    torch.save(classifier.state_dict(), tmp_path / "net.pth")
    code, output = run(
        capsys, *TINY[4:], "--model-config", "{}", "--system", "mask_rcnn", "--init-from", tmp_path / "net.pth",
        "--train-data-dir", folder, "--global-batch-size", "1", "--max-train-steps", "1", "--lr-warmup-steps", "0",
        "--detector-config", '{"rpn_post_nms_top_n_train": 8, "box_batch_size_per_image": 8}', "--output-dir",
        tmp_path / "out",
    )  # fmt: skip
    assert code == 0 and "loss_mask" in output and "frozen     the stem and 1 stage;" in output, output
    before, after = classifier.state_dict(), load_detector(tmp_path / "out").model.backbone.backbone.emov2.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert "stages.1.blocks.0.i2rmb.conv_norm.bias" in changed and len(changed) > 80
    assert not {name for name in changed if name.startswith(("stem.", "stages.0.")) or "running" in name}


def test_fine_tuning_a_detector_renews_its_last_layers_alone(capsys, tmp_path, boxes):
    first, other = tmp_path / "first", write_instances(tmp_path / "other", 4)
    text = (other / "annotations.json").read_text()
    (other / "annotations.json").write_text(text.replace('"blue"', '"green"'))
    steps = ["--max-train-steps", "1", "--learning-rate", "1e-9", "--lr-warmup-steps", "0"]
    assert run(capsys, *TINY, "--train-data-dir", boxes, *steps, "--output-dir", first)[0] == 0
    code, output = run(capsys, "--init-from", first, "--train-data-dir", other, *steps, "--global-batch-size", "4",
                       "--report-to", "none", "--num-workers", "0", "--cpu-threads", "1", "--output-dir",
                       tmp_path / "out")  # fmt: skip
    assert code == 0, output
    before, after = (load_file(folder / "model.safetensors") for folder in (first, tmp_path / "out"))
    changed = {name for name in before if not torch.allclose(before[name], after[name], atol=1e-6)}
    new = {f"head.classification_head.module_list.{level}.1.weight" for level in range(6)}
    assert new <= changed and not {name for name in changed - new if "running" not in name and "tracked" not in name}
    assert load_detector(tmp_path / "out").id2label == {0: "red", 1: "green"}
    assert "fine-tuned from first" in (tmp_path / "out" / "README.md").read_text()


# Few regions an image are enough for a handful of pictures, and a step takes a tenth of the time.
FEW_REGIONS = {"mask_rcnn": ["--detector-config", '{"box_batch_size_per_image": 16}']}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("system", "steps", "least"), [("ssdlite", 500, 0.7), ("retinanet", 300, 0.7),
                                                        ("mask_rcnn", 200, 0.7)])  # fmt: skip
def test_eight_pictures_are_learned_by_heart(capsys, tmp_path, boxes, system, steps, least):
    code, output = run(
        capsys, *TINY, "--system", system, "--train-data-dir", boxes, "--validation-dir", boxes, "--resolution", "96",
        "--model-config", NARROW.replace("0.2}", '0.0, "layer_scale": 1.0}'), "--global-batch-size", "8",
        "--max-train-steps", steps,
        "--validate-every", steps, "--learning-rate", "2e-3", "--max-grad-norm", "5", "--lr-warmup-steps", "20",
        "--zoom-out", "1", "--iou-crop", "false", "--photometric", "false", "--log-every", "20", "--lr-decay-unit",
        "step", *FEW_REGIONS.get(system, []), "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, output
    scores = [float(value) for value in (tmp_path / "out" / "validation.csv").read_text().splitlines()[-1].split(",")]
    assert scores[1] > least and scores[2] > 0.9, output[-2000:]
    assert len(scores) == (7 if system == "mask_rcnn" else 4) and scores[-3] > least


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.skipif(not COCO.is_dir(), reason="needs shared/data/dense/coco")
@pytest.mark.parametrize("system", SYSTEMS)
def test_eight_photos_of_coco_are_learned_by_heart(capsys, tmp_path, system):
    """Photos, their real objects at 160 pixels: those of eight pictures are found again (mAP50 above a half)."""
    listed = json.loads((COCO / "panoptic.json").read_text(encoding="utf-8"))
    listed["images"] = listed["images"][:8]
    eight = {image["id"] for image in listed["images"]}
    listed["annotations"] = [one for one in listed["annotations"] if one["image_id"] in eight]
    (tmp_path / "panoptic.json").write_text(json.dumps(listed), encoding="utf-8")
    (tmp_path / "panoptic").symlink_to(COCO / "panoptic")
    square = [] if system == "ssdlite" else ["--max-size", "160"]  # SSDLite's images are square
    code, output = run(
        capsys, "--system", system, "--model", "EMOv2-1M", "--model-config", '{"drop_path": 0.0}', "--train-data-dir",
        COCO / "images", "--annotations", tmp_path / "panoptic.json", "--validation-dir", COCO / "images",
        "--validation-annotations", tmp_path / "panoptic.json", "--resolution", "160", *square,
        "--global-batch-size", "8", "--max-train-steps", "400", "--validate-every", "400", "--learning-rate", "5e-4",
        "--max-grad-norm", "5", "--lr-warmup-steps", "20", "--zoom-out", "1", "--iou-crop", "false", "--photometric",
        "false", "--lr-decay-unit", "step", "--report-to", "none", "--num-workers", "0",
        *FEW_REGIONS.get(system, []), "--output-dir", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, output
    assert "(8 images, averaged weights)" in output
    scores = [float(value) for value in (tmp_path / "out" / "validation.csv").read_text().splitlines()[-1].split(",")]
    print(system, scores)
    assert scores[2] > 0.5, output[-2000:]


BAD = [
    (["--system", "yolo"], "--system"),
    (["--model", "EMOv2-3M"], "--model EMOv2-3M: backbone 'EMOv2-3M' is unknown; did you mean"),
    (["--model-config", "{depth}"], "expected JSON"),
    (["--model-config", '{"depth": 3}'], "depth"),
    (["--detector-config", "[1]"], "--detector-config [1]: expected JSON"),
    (["--detector-config", '{"score_tresh": 1}'], "ssdlite has no option score_tresh; did you mean score_thresh"),
    (["--resolution", "16"], "must be from 32 to 16384"),
    (["--max-size", "800"], "ssdlite's images are square"),
    (["--frozen-stages", "5"], "must be from 0 to 4"),
    (["--zoom-out", "0.5"], "must be from 1 to 16"),
    (["--micro-batch-size", "1"], "use a --micro-batch-size of 2 or more"),
    (["--init-from", "nowhere"], "--init-from nowhere: backbone 'nowhere' is unknown"),
    (["--init-from", "nothing.pth"], "--init-from nothing.pth: nothing.pth: there is no such file"),
    (["--init-from", "EMOv2-1M"], "--init-from EMOv2-1M: that is a size, whose weights are fresh"),
    (["--init-from", "somebody/net"], "--init-from somebody/net"),
    (["--train-data-dir", "nowhere"], "--train-data-dir nowhere: there is no such folder"),
    (["--annotations", "nothing.json"], "nothing.json: there is no such file of annotations"),
    (["--validation-dir", "nowhere"], "--validation-dir nowhere: there is no such folder"),
    (["--validation-share", "1.5"], "must be in [0, 1)"),
    (["--validation-share", "0.1", "--validation-dir", "x"], "choose one"),
    (["--validation-annotations", "x"], "it goes with --validation-dir"),
    (["--dataset", "x"], "choose one"),
    (["--max-images", "0"], "must be positive"),
    (["--lr-multipliers", "neck=2"], "no parameter that learns begins with 'neck'"),
    (["--objects-column", "boxes", "--dataset", "nowhere", "--train-data-dir", ""], "--train-data-dir"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments)[:40] for arguments, _ in BAD])
def test_bad_input_ends_with_one_line_and_writes_nothing(capsys, tmp_path, boxes, offline, arguments, message):
    code, output = run(capsys, *TINY, "--train-data-dir", boxes, "--max-train-steps", "1", "--output-dir",
                       tmp_path / "out", *arguments)  # fmt: skip
    assert (isinstance(code, str) or code == 2) and message in output, output
    assert not (tmp_path / "out" / "config.json").exists()


def bad_folder(tmp_path, boxes, change):
    content = json.loads((boxes / "annotations.json").read_text())
    change(content)
    (tmp_path / "list.json").write_text(json.dumps(content))
    return ["--train-data-dir", boxes, "--annotations", tmp_path / "list.json"]


@pytest.mark.parametrize(
    ("system", "change", "message"),
    [
        ("ssdlite", lambda c: c["images"][2].update(file_name="x.png"), "it names x.png, which is not in"),
        ("ssdlite", lambda c: c["images"][1].update(width=50), "has 80 x 64 pixels, and its annotations say 50 x 64"),
        ("mask_rcnn", lambda c: [e.pop("segmentation") for e in c["annotations"]], "mask_rcnn learns masks, and there"),
        ("ssdlite", lambda c: [e.update(iscrowd=1) for e in c["annotations"]], "no image is left to train on"),
    ],
)
def test_pictures_and_lists_that_do_not_fit_are_named(capsys, tmp_path, boxes, system, change, message):
    code, output = run(capsys, *TINY, "--system", system, *bad_folder(tmp_path, boxes, change), "--max-train-steps",
                       "4", "--output-dir", tmp_path / "out")  # fmt: skip
    assert isinstance(code, str) and message in code and "\n" not in code, output
    assert not (tmp_path / "out").exists()  # before any work


def test_a_bad_picture_is_skipped_aloud(capsys, tmp_path, boxes):
    arguments = bad_folder(tmp_path, boxes, lambda content: content["images"][1].update(width=79))
    code, output = run(capsys, *TINY, *arguments, "--max-train-steps", "2", "--on-bad-image", "skip", "--output-dir",
                       tmp_path / "out")  # fmt: skip
    assert code == 0 and "skipped: " in output and "1.png has 80 x 64 pixels" in output


def test_no_data_and_several_lists_are_told(capsys, tmp_path, boxes):
    code, _ = run(capsys, *TINY, "--output-dir", tmp_path / "out")
    assert "no data was named: --train-data-dir FOLDER --annotations FILE.json" in code
    folder = write_instances(tmp_path / "boxes", 2)
    (folder / "more.json").write_text("{}")
    code, _ = run(capsys, *TINY, "--train-data-dir", folder, "--output-dir", tmp_path / "out")
    assert "there is 2 JSON files (annotations.json, more.json) in it; name the list (--annotations) of objects" in code
