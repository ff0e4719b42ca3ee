"""Detectors as folders: the same answers when they are loaded, other classes, damaged files, published weights."""

import json
import shutil

import pytest
import torch
from helpers.detectors import NARROW, target, trained_folder
from helpers.models import randomize
from safetensors.torch import load_file, save_file

from d_emo import create_classifier
from d_emo.detection import retinanet
from d_emo.detection.saved import SYSTEMS, is_detector, load_detector, make_detector

NAMES = {0: "cat", 1: "dog", 2: "cow"}
SMALL = {"ssdlite": {"image_size": 64}, "retinanet": {"min_size": 64, "max_size": 96},
         "mask_rcnn": {"min_size": 64, "max_size": 96, "rpn_post_nms_top_n_test": 8, "rpn_post_nms_top_n_train": 8,
                       "box_batch_size_per_image": 8}}  # fmt: skip


def made(system, backbone="EMOv2-1M", names=NAMES, **options):
    torch.manual_seed(0)
    network = {"network": NARROW} if backbone == "EMOv2-1M" else {}
    bundle = make_detector(system, backbone, names, **network, **SMALL[system], **options)
    randomize(bundle.model.backbone.backbone)
    return bundle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved RetinaNet."""
    path = tmp_path_factory.mktemp("detector")
    made("retinanet", score_thresh=0.011).save_pretrained(path)
    return path


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_saved_detector_answers_as_before(tmp_path, system):
    sure = {"score_thresh": 0.001} if system == "retinanet" else {}  # a fresh one is sure of nothing
    bundle = made(system, frozen_stages=2, fixed_statistics=True, **sure)
    bundle.save_pretrained(tmp_path)
    loaded = load_detector(str(tmp_path))
    assert loaded.id2label == NAMES and loaded.system == system
    assert (
        loaded.settings == json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(bundle.settings))
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    images = [torch.rand(3, 64, 80), torch.rand(3, 70, 60)]
    for one, other in zip(bundle.model.eval()(images), loaded.model.eval()(images), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert len(one["boxes"])
    for model in (bundle.model, loaded.model):
        assert model.backbone.backbone.emov2.frozen_stages == 2 and model.backbone.backbone.emov2.fixed_statistics
    torch.manual_seed(0)
    losses = bundle.model.train()(images, [target(image) for image in images])
    torch.manual_seed(0)
    again = loaded.model.train()(images, [target(image) for image in images])
    assert all(torch.equal(losses[name], again[name]) for name in losses)


@pytest.mark.parametrize("system", SYSTEMS)
def test_other_classes_renew_the_layers_of_classes_alone(system):
    bundle = made(system)
    own = bundle.model.state_dict()
    for names in (["x", "y"], ["x", "y", "z"]):
        other = bundle.with_classes(dict(enumerate(names)))
        state = other.model.state_dict()
        changed = {name for name in own if own[name].shape != state[name].shape or not own[name].equal(state[name])}
        assert changed and all("class" in name or "predictor" in name for name in changed), changed
        assert other.id2label == dict(enumerate(names)) and other.model.label_count == len(names)
    same = bundle.with_classes(NAMES, **({} if system == "ssdlite" else {"min_size": 48}))
    assert all(own[name].equal(tensor) for name, tensor in same.model.state_dict().items())
    assert system == "ssdlite" or same.settings["options"]["min_size"] == 48


def test_a_trained_backbone_is_frozen_as_published_and_a_fresh_one_is_not(tmp_path):
    trained = trained_folder(tmp_path)
    for system, stages in (("ssdlite", 0), ("retinanet", 1), ("mask_rcnn", 1)):
        settings = make_detector(system, trained, NAMES, **SMALL[system]).settings
        assert (settings["frozen_stages"], settings["fixed_statistics"]) == (stages, True)
        settings = made(system).settings
        assert (settings["frozen_stages"], settings["fixed_statistics"]) == (0, False)
    own = load_file(tmp_path / "model.safetensors")
    bundle = make_detector("retinanet", trained, NAMES, **SMALL["retinanet"])
    state = bundle.model.backbone.backbone.state_dict()
    assert all(own[name].equal(tensor) for name, tensor in state.items()) and len(state) > 50


def test_a_published_checkpoints_stages_are_under_a_detector(tmp_path):
    classifier = randomize(create_classifier("EMOv2-1M", num_classes=1000))
    torch.save({"net_E": classifier.state_dict(), "net": {}}, tmp_path / "net.pth")
    bundle = make_detector("ssdlite", tmp_path / "net.pth", NAMES, image_size=64)
    state, own = bundle.model.backbone.backbone.emov2.state_dict(), classifier.state_dict()
    assert all(own[name].equal(tensor) for name, tensor in state.items()) and len(state) > 100
    assert bundle.settings["fixed_statistics"] and bundle.settings["backbone"]["window_size"] == 10
    with pytest.raises(ValueError, match=r"nothing\.pth: there is no such file"):
        make_detector("ssdlite", tmp_path / "nothing.pth", NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"system": "yolo"}, "system='yolo' is not one of ssdlite"),
        ({"backbone": "EMOv2-3M"}, "backbone 'EMOv2-3M' is unknown; did you mean"),
        ({"names": {1: "a"}}, "id2label has the numbers 1"),
        ({"score_tresh": 0.1}, "retinanet has no option score_tresh; did you mean score_thresh"),
        ({"score_thresh": 2}, "score_thresh=2 is not"),
        ({"anchor_generator": object()}, "anchor_generator is an object of Python"),
        ({"network": {"depth": 3}}, "depth"),
        ({"frozen_stages": 9}, "frozen_stages=9 is not"),
    ],
)
def test_what_a_detector_does_not_take_is_refused(options, message):
    given = {"system": "retinanet", "backbone": "EMOv2-1M", "names": NAMES, **options}
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        make_detector(given.pop("system"), given.pop("backbone"), given.pop("names"), **given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def change(**values):
    def write(folder):
        content = json.loads((folder / "config.json").read_text())
        for name, value in values.items():
            content = {**content, name: value}
            if value is None:
                del content[name]
        (folder / "config.json").write_text(json.dumps(content))

    return write


def other_weights(folder):
    state = load_file(folder / "model.safetensors")
    state["more"] = state.pop(next(iter(state)))
    save_file(state, folder / "model.safetensors")


def half_the_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "not a detector (no config.json)"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    "another model's": (change(model_type="emov2"), "not a detector"),
    "no system": (change(system=None), "config.json lacks ['system']"),
    "another system": (change(system="ssdlite"), "ssdlite has no option min_size"),
    "an unknown system": (change(system="eval"), "system='eval' is not one of"),
    "a field more": (change(code="x.py"), "has ['code']"),
    "strange options": (change(options={"anchor_generator": "x"}), "is no AnchorGenerator"),
    "a wide backbone": (change(backbone={"widths": [1e9] * 4}), "widths"),
    "an unknown backbone": (change(backbone={"auto_map": "x.py"}), "backbone has 'auto_map'"),
    "no tables": (change(options=[1]), "are tables"),
    "gaps in the classes": (change(id2label={"1": "a"}), "id2label has the numbers 1"),
    "other classes": (change(id2label={"0": "a", "1": "b"}), "weights have other shapes than the configuration says"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "there is no such file"),
    "half the weights": (half_the_weights, "not a file of tensors"),
    "other names": (other_weights, "config.json and weights are of different models"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_named_in_one_line(folder, tmp_path, case):
    damage, message = DAMAGES[case]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damage(copy)
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        load_detector(copy)
    assert message in str(caught.value) and str(copy) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_detectors_folder_is_told(folder, tmp_path, offline):
    assert is_detector(folder) and not is_detector(tmp_path) and not is_detector("EMOv2-5M")
    with pytest.raises(ValueError, match="not a detector"):
        load_detector(trained_folder(tmp_path))
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        load_detector("nowhere")
    with pytest.raises(ValueError, match="somebody/detector: there is no such folder, and on the Hub"):
        load_detector("somebody/detector")


def test_a_backbone_of_other_stages_is_refused():
    inner = made("ssdlite").model.backbone.backbone
    with pytest.raises(ValueError, match="backbone returns stage3, stage4; this detector is on stage2, stage3, stage4"):
        retinanet(inner, 3)
