"""evaluate_detector: scores as computed by hand, files, classes matched by name, bad input."""

import csv
import json
import math

import datasets
import PIL.Image
import pytest
import torch
from helpers.data import source as photos
from helpers.detectors import write_detector
from helpers.pasted_digits import write_pasted_digits
from helpers.training import run_here

from d_emo.common.locks import FolderLock
from d_emo.detection.saved import load_detector
from d_emo.eval import evaluate_detector
from d_emo.eval.detection.predict import evaluate_objects
from d_emo.images.coco import coco_objects
from d_emo.images.digits import DIGIT_NAMES

FILES = ["classes.csv", "report.html", "report.json"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_detector(tmp_path_factory.mktemp("model") / "detector", DIGIT_NAMES)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four pictures of 64 pixels with `instances.json` among them."""
    folder = tmp_path_factory.mktemp("digits")
    return write_pasted_digits(folder, photos(["photo"], [0] * 5), {"test": 4}, side=64)["test"]


def run(capsys, *arguments):
    return run_here(capsys, *arguments, main=evaluate_detector.main)


def test_scores_are_those_computed_by_hand(capsys, tmp_path, model, pictures):
    out = tmp_path / "out"
    code, output = run(capsys, "--model", model, "--data-dir", pictures, "--output-dir", out, "--pictures", "2",
                       "--score-threshold", "0.05")  # fmt: skip
    assert code == 0 and "4 images with" in output and "mAP50" in output, output
    assert sorted(path.name for path in out.iterdir() if path.name[0] != ".") == FILES
    source = coco_objects(pictures, pictures / "instances.json", masks=False)
    expected = evaluate_objects(load_detector(str(model)).model.eval(), source, device=torch.device("cpu"))
    report = json.loads((out / "report.json").read_text())
    for name, value in expected.compute().items():
        assert report[name] == (None if math.isnan(value) else pytest.approx(value, abs=1e-6))
    assert report["images"] == 4 and report["objects"] == source.counts.sum() > 4 and report["mAP"] > 0
    rows = list(csv.DictReader((out / "classes.csv").open()))
    assert sum(int(row["objects"]) for row in rows) == report["objects"]
    for row in rows:
        assert int(row["objects"]) == int(row["right"]) + int(row["other_class"]) + int(row["missed"])
        precision = expected.by_class()["AP"][int(row["label"])]
        assert row["name"] == DIGIT_NAMES[int(row["label"])]
        assert float(row["ap"]) == pytest.approx(precision, nan_ok=True)
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 2 and "<script" not in page
    assert page.index("F1 0.000") and "the lowest F1 first" in page and "Most frequent mistakes" in page


def test_masks_are_scored_where_the_detector_finds_them(capsys, tmp_path, pictures):
    few = {"rpn_post_nms_top_n_test": 8, "box_detections_per_img": 4, "box_score_thresh": 0.0}
    folder = write_detector(tmp_path / "detector", DIGIT_NAMES, "mask_rcnn", **few)
    code, output = run(capsys, "--model", folder, "--data-dir", pictures, "--max-images", "2", "--score-threshold", "0")
    assert code == 0 and "masks: mAP" in output, output
    report = json.loads((folder / "evaluation" / "report.json").read_text())
    assert report["images"] == 2 and "mask_mAP" in report
    assert "mask AP" in (folder / "evaluation" / "report.html").read_text()


def test_data_sets_in_the_hubs_layout_are_scored(capsys, tmp_path, model, pictures):
    listed = json.loads((pictures / "instances.json").read_text())
    rows = []
    for image in listed["images"]:
        objects = [one for one in listed["annotations"] if one["image_id"] == image["id"]]
        rows.append({
            "image": {"bytes": (pictures / image["file_name"]).read_bytes(), "path": None},
            "objects": {"bbox": [[float(side) for side in one["bbox"]] for one in objects],
                        "category": [one["category_id"] for one in objects]},
        })  # fmt: skip
    names = datasets.Sequence(datasets.ClassLabel(names=list(DIGIT_NAMES)))
    boxes = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
    features = datasets.Features({"image": datasets.Image(), "objects": {"bbox": boxes, "category": names}})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "digits.parquet")
    for place in (["--dataset", tmp_path / "digits.parquet"], ["--data-dir", pictures]):
        code, output = run(capsys, "--model", model, *place, "--output-dir", tmp_path / place[0][2:])
        assert code == 0, output
    reports = [json.loads((tmp_path / name / "report.json").read_text()) for name in ("dataset", "data-dir")]
    for name in ("mAP", "mAP50", "images", "objects", "mean_f1"):
        assert reports[0][name] == reports[1][name]


def test_classes_are_the_models_by_name_whatever_their_order(capsys, tmp_path, model, pictures):
    for name, names in (("same", DIGIT_NAMES), ("turned", DIGIT_NAMES[::-1])):
        listed = json.loads((pictures / "instances.json").read_text())
        listed["categories"] = [{"id": 7 + label, "name": name} for label, name in enumerate(names)]
        for one in listed["annotations"]:
            one["category_id"] = 7 + names.index(DIGIT_NAMES[one["category_id"]])
        (tmp_path / f"{name}.json").write_text(json.dumps(listed))
        code, output = run(capsys, "--model", model, "--data-dir", pictures, "--annotations", tmp_path / f"{name}.json",
                           "--output-dir", tmp_path / name)  # fmt: skip
        assert code == 0, output
    first, second = (list(csv.DictReader((tmp_path / name / "classes.csv").open())) for name in ("same", "turned"))
    assert first == second
    listed["categories"][0]["name"] = "ten"
    (tmp_path / "ten.json").write_text(json.dumps(listed))
    code, _ = run(capsys, "--model", model, "--data-dir", pictures, "--annotations", tmp_path / "ten.json")
    assert "not among the model's names: ten" in code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no data was named: --data-dir FOLDER"),
        (["--data-dir", "{pictures}", "--dataset", "x"], "--data-dir and --dataset are both given"),
        (["--dataset", "x", "--annotations", "y.json"], "--annotations y.json: it goes with --data-dir"),
        (["--data-dir", "{pictures}", "--class-names", "x"], "--class-names x: it goes with --dataset"),
        (["--data-dir", "{tmp}/none"], "--data-dir {tmp}/none: there is no such folder"),
        (["--data-dir", "{tmp}/empty"], "there is no JSON file in it; name the list (--annotations)"),
        (["--data-dir", "{pictures}", "--annotations", "{tmp}/none.json"], "none.json: there is no such file"),
        (
            ["--data-dir", "{tmp}/empty", "--annotations", "{pictures}/instances.json"],
            "names 000000.png, which is not in",
        ),
        (["--dataset", "{tmp}/none.parquet"], "--dataset {tmp}/none.parquet"),
        (["--data-dir", "{pictures}", "--score-threshold", "1.5"], "--score-threshold: 1.5 is not"),
        (["--data-dir", "{pictures}", "--output-dir", "{pictures}/out"], "among the pictures; choose a folder outside"),
        (["--data-dir", "{pictures}", "--model", "{tmp}/none"], "--model {tmp}/none: there is no such folder"),
        (["--data-dir", "{pictures}", "--model", "{tmp}"], "--model {tmp} holds nothing that a library saved"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(capsys, tmp_path, offline, model, pictures, arguments, message):
    (tmp_path / "empty").mkdir()
    filled = [text.format(tmp=tmp_path, pictures=pictures) for text in arguments]
    code, output = run(capsys, "--model", model, "--output-dir", tmp_path / "out", *filled)
    assert code != 0 and message.format(tmp=tmp_path) in output
    assert not (tmp_path / "out").exists() and not (pictures / "out").exists()
    assert output.strip().count("\n") <= 1


def test_an_unreadable_picture_ends_with_its_name_and_without_a_report(capsys, tmp_path, model, pictures):
    for path in pictures.iterdir():
        (tmp_path / path.name).write_bytes(b"no picture" if path.name == "000002.png" else path.read_bytes())
    code, _ = run(capsys, "--model", model, "--data-dir", tmp_path, "--output-dir", tmp_path.parent / "unwritten")
    assert "000002.png cannot be read" in code and not (tmp_path.parent / "unwritten").exists()
    PIL.Image.new("RGB", (20, 20)).save(tmp_path / "000002.png")
    code, _ = run(capsys, "--model", model, "--data-dir", tmp_path, "--output-dir", tmp_path.parent / "unwritten")
    assert "has 20 x 20 pixels, and its annotations say 64 x 64" in code


def test_two_that_write_one_report_are_kept_apart(capsys, tmp_path, model, pictures):
    with FolderLock(tmp_path / "out"):
        code, _ = run(capsys, "--model", model, "--data-dir", pictures, "--output-dir", tmp_path / "out")
    assert "out is in use by" in code
