"""Folders of another task: what is there and what is wanted, in a line, whoever is given one."""

import json

import PIL.Image
import pytest
from helpers.training import run_here

from d_emo.common.saved_folders import refuse_other_tasks
from d_emo.eval import evaluate_classifier, evaluate_detector, evaluate_segmenter, evaluate_video_classifier
from d_emo.train import train_classifier
from d_emo.train.classification.config import parse_classifier_config
from d_emo.train.classification.plan import start_from
from d_emo.train.detection.config import DetectorOptions, parse_detector_config
from d_emo.train.detection.plan import build_detector
from d_emo.train.diffusion.config import parse_config
from d_emo.train.segmentation.config import SegmenterOptions, parse_segmenter_config
from d_emo.train.segmentation.networks import build_network
from d_emo.train.video.config import VideoModelOptions, parse_video_config
from d_emo.train.video.start import look_up

NAMES = {0: "a", 1: "b"}
# File and content of what each kind of folder is told by.
FOLDERS = {
    "an image classifier": ("config.json", {"model_type": "emov2", "architectures": ["EMOv2ForImageClassification"]}),
    "a semantic segmenter": ("config.json", {"architectures": ["EMOv2ForSemanticSegmentation"]}),
    "a video classifier": ("config.json", {"architectures": ["VEMOv2ForVideoClassification"]}),
    "a detector": ("config.json", {"model_type": "d_emo-detector"}),
    "a pipeline (DEMOPipeline)": ("model_index.json", {"_class_name": "DEMOPipeline"}),
    "a DEMOTransformer2DModel": ("config.json", {"_class_name": "DEMOTransformer2DModel"}),
}
STARTS = {
    "an image classifier": lambda folder: start_from(folder, {"id2label": NAMES}, 64),
    "a semantic segmenter or an image classifier": lambda folder: build_network(
        SegmenterOptions(init_from=folder), NAMES
    ),
    "a detector or an image classifier": lambda folder: build_detector(
        DetectorOptions(init_from=folder), "ssdlite", NAMES
    ),
    "a video classifier or an image classifier": lambda folder: look_up(VideoModelOptions(init_from=folder)),
}
EVALUATORS = {
    "an image classifier": evaluate_classifier,
    "a semantic segmenter": evaluate_segmenter,
    "a video classifier": evaluate_video_classifier,
    "a detector": evaluate_detector,
}
PARSERS = {
    "train_classifier": parse_classifier_config, "train_segmenter": parse_segmenter_config,
    "train_detector": parse_detector_config, "train_video_classifier": parse_video_config, "train_dit": parse_config,
}  # fmt: skip


def folder_of(found, path):
    name, content = FOLDERS[found]
    path.mkdir()
    (path / name).write_text(json.dumps(content))
    return str(path)


@pytest.mark.parametrize("wanted", STARTS)
@pytest.mark.parametrize("found", FOLDERS)
def test_no_trainer_starts_from_another_tasks_folder(tmp_path, found, wanted):
    if found in wanted:
        return
    with pytest.raises(ValueError) as caught:
        STARTS[wanted](folder := folder_of(found, tmp_path / "other"))
    assert str(caught.value) == f"--init-from {folder}: it holds {found}, not {wanted}; name the folder of one."


@pytest.mark.parametrize("wanted", EVALUATORS)
def test_no_evaluator_takes_another_tasks_folder(tmp_path, capsys, wanted):
    for name in NAMES.values():
        (tmp_path / "data" / name).mkdir(parents=True)
        PIL.Image.new("RGB", (32, 32)).save(tmp_path / "data" / name / "picture.png")
    for number, found in enumerate(FOLDERS):
        if found != wanted:
            folder = folder_of(found, tmp_path / str(number))
            code, said = run_here(
                capsys, "--model", folder, "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "out",
                main=EVALUATORS[wanted].main,
            )  # fmt: skip
            expected = f"--model {folder}: it holds {found}, not {wanted}; name the folder of one."
            assert code != 0 and said.splitlines()[-1].endswith(expected), said


def test_what_says_nothing_of_a_task_is_left_to_what_loads_it(tmp_path):
    for content in ("{}", '{"architectures": ["EMOv2Backbone"]}', "damaged"):
        (tmp_path / "config.json").write_text(content)
        refuse_other_tasks(tmp_path, "a detector")
    refuse_other_tasks("owner/name-on-the-hub", "a detector")


@pytest.mark.parametrize("trainer", PARSERS)
def test_no_trainer_goes_on_with_another_ones_run(tmp_path, trainer):
    arguments = ["--output-dir", str(tmp_path), "--resume-from", "latest"]
    for other in PARSERS:
        (tmp_path / "run.json").write_text(json.dumps({"trainer": other, "seed": 7}))
        if other == trainer:
            assert PARSERS[trainer](arguments).run.seed == 7
            continue
        with pytest.raises(ValueError) as caught:
            PARSERS[trainer](arguments)
        assert str(caught.value) == (
            f"{tmp_path} holds a run of '{other}', and this is {trainer}: name another folder, or go on with that "
            "command."
        )


def test_no_trainer_writes_into_another_ones_run(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"trainer": "train_detector"}')
    options = ["--max-train-steps", 1, "--report-to", "none", "--num-workers", 0, "--global-batch-size", 2,
               "--model", "EMOv2-1M", "--output-dir", tmp_path]  # fmt: skip
    code, said = run_here(capsys, *options, main=train_classifier.main)
    assert code != 0 and f"{tmp_path} holds a run of 'train_detector', and this is train_classifier" in said
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
