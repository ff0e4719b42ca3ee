"""What the trainers of tasks have in common: options that take each other's place, and what a run starts from."""

from types import SimpleNamespace

import pytest
import torch
from helpers.detectors import trained_folder
from helpers.paths import ROOT

from d_emo import EMOv2ForImageClassification
from d_emo.classification.emov2 import DropPath
from d_emo.common.options import blamed
from d_emo.train.classification.config import parse_classifier_config
from d_emo.train.classification.plan import start_from
from d_emo.train.data.batches import Batch
from d_emo.train.detection.config import DetectorOptions, parse_detector_config
from d_emo.train.detection.plan import model_name as detector_name
from d_emo.train.engine.cards import Circumstances
from d_emo.train.engine.checkpoints import CheckpointError
from d_emo.train.engine.resume import check_same_run
from d_emo.train.engine.score_cards import Score, model_index, validation_lines
from d_emo.train.engine.task import TaskRun
from d_emo.train.engine.task_plan import start_name
from d_emo.train.segmentation.config import parse_segmenter_config
from d_emo.train.segmentation.plan import model_name as segmenter_name
from d_emo.train.video.config import VideoModelOptions, parse_video_config
from d_emo.train.video.start import look_up
from d_emo.video.transformers_config import VEMOv2Config
from d_emo.video.transformers_models import VEMOv2ForVideoClassification

SMALL = {"depths": (1, 1, 1, 1), "widths": (8, 8, 8, 16), "head_dims": (8, 8, 8, 8)}
RECIPES = ROOT / "train" / "configs"
PARSERS = {
    "classifier": parse_classifier_config,
    "segmenter": parse_segmenter_config,
    "detector": parse_detector_config,
    "video": parse_video_config,
}


@pytest.mark.parametrize("task", PARSERS)
def test_what_is_validated_on_takes_the_place_of_a_recipes_share(task):
    recipe = ["--config", str(RECIPES / task / "finetune.yaml"), "--train-data-dir", "mine"]
    assert PARSERS[task](recipe).data.validation_share == 0.1
    data = PARSERS[task]([*recipe, "--validation-dir", "theirs"]).data
    assert data.validation_share is None and data.validation_dir == "theirs"


def test_steps_of_warm_up_take_the_place_of_a_recipes_epochs():
    recipe = ["--config", str(RECIPES / "video" / "v_emov2.yaml")]
    options = parse_video_config([*recipe, "--lr-warmup-steps", "7"]).optimization
    assert options.lr_warmup_epochs is None and options.lr_warmup_steps == 7


def test_what_a_network_draws_depends_on_the_seed_and_the_batchs_place_alone():
    network = DropPath(0.5).train()

    def drawn(seed, first, process):
        torch.manual_seed(process)  # whatever was drawn before
        run = SimpleNamespace(
            plan=SimpleNamespace(config=SimpleNamespace(run=SimpleNamespace(seed=seed))),
            batch_loss=lambda batch: network(batch.images),
        )
        batch = Batch(torch.ones(64, 1, 1, 1), torch.zeros(64), list(range(first, first + 64)), [])
        return TaskRun.drawn_loss(run, batch)

    assert torch.equal(drawn(3, 128, process=0), drawn(3, 128, process=1))
    for other in (drawn(3, 192, process=0), drawn(4, 128, process=0)):
        assert not torch.equal(drawn(3, 128, process=0), other)


def test_weights_that_were_saved_in_half_precision_are_trained_in_float32(tmp_path):
    images = EMOv2ForImageClassification.from_pretrained(trained_folder(tmp_path / "images"))
    images.to(torch.bfloat16).save_pretrained(tmp_path / "images")
    labels = {"id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}
    video = VEMOv2ForVideoClassification(VEMOv2Config(**SMALL, num_labels=2))
    video.to(torch.bfloat16).save_pretrained(tmp_path / "video")
    assert VEMOv2ForVideoClassification.from_pretrained(tmp_path / "video").dtype == torch.bfloat16
    options = VideoModelOptions(init_from=str(tmp_path / "video"))
    for model in (start_from(str(tmp_path / "images"), labels, 64), look_up(options).build({0: "a", 1: "b"})):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_run_is_named_after_what_it_starts_from(tmp_path):
    (tmp_path / "net.v2").mkdir()
    (tmp_path / "EMOv2_5M.pth").touch()
    for name, shown in (("net.v2", "net.v2"), ("EMOv2_5M.pth", "EMOv2_5M")):
        arguments = ["--init-from", str(tmp_path / name)]
        assert start_name(parse_video_config(arguments).model) == shown
        assert detector_name(parse_detector_config(arguments).model, "ssdlite") == f"{shown}-ssdlite"
        config = parse_segmenter_config([*arguments, "--head", "pspnet"])
        assert segmenter_name(config) == f"{shown}-pspnet"
    assert segmenter_name(parse_segmenter_config([])) == "EMOv2-5M-deeplabv3"
    assert segmenter_name(parse_segmenter_config(["--model", "UNet-S5-D16"])) == "UNet-S5-D16"


def test_a_longest_side_is_refused_for_square_images_whoever_says_that_they_are():
    with pytest.raises(ValueError, match="--max-size 900: ssdlite's images are square"):
        DetectorOptions(max_size=900).sizes("ssdlite")


def test_a_continued_run_may_find_its_annotations_elsewhere_but_no_other_network(tmp_path):
    stored = {"annotations": "a.json", "validation_json": None, "head": "pspnet", "data": "coco"}
    moved = {**stored, "annotations": "b.json", "validation_json": "c.json"}
    assert check_same_run("X", stored, moved, None, tmp_path) == []
    with pytest.raises(CheckpointError, match=r"head 'pspnet' -> 'segformer'. Either"):
        check_same_run("X", stored, {**stored, "head": "segformer"}, "head", tmp_path)


def test_the_users_word_stands_before_what_went_wrong():
    with pytest.raises(ValueError, match=r"^--model x: no such\.$"), blamed("--model x"):
        raise ValueError("no such.")
    with pytest.raises(ValueError, match=r"^--model x: it is not there$"), blamed("--model x", RuntimeError):
        raise RuntimeError("it is not there.\nSee the documentation.")
    with pytest.raises(KeyError), blamed("--model x"):
        raise KeyError("a fault of ours")


def test_cards_say_why_nothing_was_scored_and_leave_out_what_is_no_number(tmp_path):
    class Data:
        name = "photos"

        def describe_size(self):
            return "3 images"

    class Plan:
        output_dir = tmp_path
        validation = None

    plan, column = Plan(), Score("mAP", "mAP", ("mAP", "mAP"), ".1%")
    at = Circumstances("run", 4, 1.0, "a CPU", None)
    assert "was named" in validation_lines(plan, at, [column])[0]
    plan.validation = Data()
    assert validation_lines(plan, at, [column]) == ["Nothing was scored up to step 4."]
    (tmp_path / "validation.csv").write_text("step,mAP\n2,0.5\n4,nan\n6,0.7\n")
    assert validation_lines(plan, at, [column])[-2:] == ["| 2 | 50.0% |", "| 4 | - |"]
    assert model_index(plan, at, "object-detection", [column])["model-index"][0]["results"][0]["metrics"] == []
