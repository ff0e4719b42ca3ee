"""Exported segmenters, video classifiers and detectors answer as the models do, for any batch and sizes not square."""

import re

import pytest
import torch
from helpers.extras import needs
from helpers.models import enliven
from helpers.paths import ROOT
from helpers.training import run_here

from d_emo import create_segmenter, create_video_classifier
from d_emo.eval import export_classifier
from d_emo.eval.systems import export_command
from d_emo.export import OnnxModel, as_network, example_images, export_program, save_coreml, save_onnx
from d_emo.kernels import use_backend

SMALLEST = {"depths": (1, 1, 2, 1), "widths": (8, 8, 16, 16), "head_dims": (8,) * 4}
HEADS = ("deeplabv3", "pspnet", "segformer", "semantic_fpn")


def segmenter(head="semantic_fpn", **overrides):
    """A segmenter of a few thousand parameters; windows of 10, which its small grids are padded to."""
    small = {**SMALLEST, "head_channels": 8, "num_classes": 5}
    small |= {"auxiliary_channels": 8} if head in ("deeplabv3", "pspnet") else {}
    small |= {"pyramid_channels": 16} if head == "semantic_fpn" else {}
    return enliven(create_segmenter("EMOv2-1M", head, **{**small, **overrides})).eval()


def video_network(**overrides):
    """A video classifier of a few thousand parameters."""
    return enliven(create_video_classifier("V-EMOv2-1M", num_classes=5, **{**SMALLEST, **overrides})).eval()


def detector(name, **options):
    """A detector on the smallest backbone, without training."""
    detection = pytest.importorskip("d_emo.detection", reason="needs torchvision")
    return enliven(getattr(detection, name)("EMOv2-1M", 4, **options), gain=4.0).eval()


def several(made):
    """One tensor or more, as a tuple."""
    return (made,) if isinstance(made, torch.Tensor) else made


@torch.no_grad()
def assert_same(model, run, size, tolerance, frames=None):
    """The file's answers are the model's to a share of the largest, for any batch, and depend on the picture."""
    for batch in (1, 3):
        pixels = example_images(model, size, batch, seed=batch, num_frames=frames)
        expected = several(as_network(model, pixels)(pixels))
        for got, own in zip(several(run(pixels)), expected, strict=True):
            assert got.shape == own.shape
            assert (got - own).abs().max() <= tolerance * own.abs().max()
    first, other = (several(run(example_images(model, size, 1, seed=seed, num_frames=frames)))[0] for seed in (7, 8))
    assert (first - other).abs().max() > 0.01 * first.abs().max()


@needs("export")
@pytest.mark.parametrize("head", ["semantic_fpn", *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS[:3])])
@pytest.mark.parametrize("size", [pytest.param((64, 96), marks=pytest.mark.slow), (72, 100)])
def test_onnx_of_segmenters_equals_torch_where_windows_and_grids_are_padded(tmp_path, head, size):
    model = segmenter(head)
    save_onnx(model, size, tmp_path / "model.onnx")
    assert_same(model, OnnxModel(tmp_path / "model.onnx", threads=1), size, 1e-4)


@pytest.mark.parametrize("head", ["deeplabv3", *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS[1:])])
def test_programs_of_segmenters_equal_torch(head):
    model = segmenter(head, num_channels=1)
    assert_same(model, export_program(model, (64, 96)).module(), (64, 96), 1e-5)


@pytest.mark.parametrize("plain", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_programs_of_video_classifiers_equal_torch(plain):
    model = video_network(num_channels=1)
    model = model.v_emov2 if plain else model
    assert_same(model, export_program(model, (64, 96), num_frames=5).module(), (64, 96), 1e-5, frames=5)


@pytest.mark.slow
@needs("export")
@pytest.mark.parametrize("frames", [None, 6])
def test_onnx_of_video_classifiers_equals_torch(tmp_path, frames):
    model = video_network()
    save_onnx(model, (64, 96), tmp_path / "model.onnx", frames)
    run = OnnxModel(tmp_path / "model.onnx", threads=1)
    assert run.shape[1:] == [frames or 4, 3, 64, 96]
    assert_same(model, run, (64, 96), 1e-4, frames)
    with pytest.raises(ValueError, match=r"the file takes \(B, [46], 3, 64, 96\)"):
        run(torch.zeros(1, 3, 3, 64, 96))


@pytest.mark.slow
@needs("export")
@pytest.mark.parametrize(("name", "size"), [("ssdlite", 320), ("retinanet", (96, 128))])
def test_onnx_of_one_stage_detectors_equals_torch(tmp_path, name, size):
    model = detector(name)
    save_onnx(model, size, tmp_path / "model.onnx")
    run = OnnxModel(tmp_path / "model.onnx", threads=1)
    assert run.names == ("logits", "boxes")
    assert_same(model, run, size, 1e-4)


@torch.no_grad()
def test_the_boxes_of_a_files_network_are_those_that_a_detector_finds():
    model = detector("ssdlite", score_thresh=0.0)
    picture = torch.rand(3, 320, 320, generator=torch.Generator().manual_seed(0))
    found = model([picture])[0]
    pixels = model.transform([picture])[0].tensors
    logits, boxes = as_network(model, pixels)(pixels)
    scores = logits[0].softmax(-1)[:, 1:]  # without the background
    assert len(found["boxes"]) > 5
    for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
        near = (boxes[0] - box).abs().amax(1) < 1e-2
        assert (scores[near, label] - score).abs().min() < 1e-5


@pytest.mark.slow
@needs("export")
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["ssdlite", "retinanet", "mask_rcnn"])
def test_pytorchs_older_exporter_takes_whole_detectors_as_the_document_says(tmp_path, monkeypatch, name):
    """Of another picture of the example's size; a box of the model's is found in the file's, whatever their order."""
    import onnxruntime

    limits = {"box_score_thresh": 0.0} if name == "mask_rcnn" else {"score_thresh": 0.0}
    model = detector(name, **limits, **({} if name == "ssdlite" else {"min_size": 128, "max_size": 160}))
    page = (ROOT / "docs" / "classification.md").read_text(encoding="utf-8")
    (code,) = [part for part in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "dynamo=False" in part]
    monkeypatch.chdir(tmp_path)
    draw = torch.Generator().manual_seed(0)
    exec(
        compile(code, "docs/classification.md", "exec"),
        {"torch": torch, "model": model, "image": torch.rand(3, 120, 150)},
    )
    picture = torch.rand(3, 120, 150, generator=draw)
    made = onnxruntime.InferenceSession("detector.onnx").run(None, {"image": picture.numpy()})
    boxes, scores, labels = (
        next(part for part in made if part.ndim == dims and (part.dtype == "int64") == whole)
        for dims, whole in ((2, False), (1, False), (1, True))
    )
    with use_backend("reference"):
        found = model([picture])[0]
    assert 5 < len(found["boxes"]) == len(boxes)
    for box, score, label in zip(*(found[part].numpy() for part in ("boxes", "scores", "labels")), strict=True):
        same = (abs(boxes - box).max(1) < 0.05) & (abs(scores - score) < 1e-3) & (labels == label)
        assert same.any()


def test_what_no_file_can_hold_is_refused_in_one_line():
    network = segmenter()
    masks = detector("mask_rcnn", min_size=64, max_size=64)
    for call, message in (
        (lambda: export_program(masks, 64), "second stage works on as many boxes .* export RetinaNet or SSDLite"),
        (lambda: export_program(network, 64, num_frames=4), "num_frames=4: .* takes images, not clips; leave it out"),
        (lambda: export_program(video_network().v_emov2, 64), "VEMOv2 takes clips; pass num_frames"),
        (lambda: export_program(video_network(), 64, num_frames=0), "num_frames=0 is not None or a whole number"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.slow
@needs("coreml")
@pytest.mark.parametrize("kind", ["segmenter", "video", "detector"])
def test_core_ml_converts_every_kind(tmp_path, kind):
    import coremltools

    model = {"segmenter": segmenter, "video": video_network, "detector": lambda: detector("ssdlite")}[kind]()
    save_coreml(model, 320 if kind == "detector" else (64, 96), tmp_path / "model.mlpackage")
    written = coremltools.models.MLModel(str(tmp_path / "model.mlpackage"), skip_model_load=True).get_spec().description
    names = ["logits", "boxes"] if kind == "detector" else ["logits"]
    assert [entry.name for entry in written.output] == names


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [segmenter, pytest.param(video_network, marks=pytest.mark.slow)])
def test_the_command_opens_folders_by_what_they_hold_and_prints_parity(capsys, tmp_path, made):
    made().save_pretrained(tmp_path / "m")
    code, output = run_here(capsys, "--model", tmp_path / "m", "--formats", "torch", "--image-size", 64, 96,
                            main=export_classifier.main)  # fmt: skip
    assert code == 0 and output.count("largest difference") == 1, output
    assert ("clips of 4 frames of 64 x 96" in output) == (made is video_network)
    assert {path.name for path in (tmp_path / "m" / "exported").iterdir()} == {"m.pt2", "preprocessor_config.json"}


@pytest.mark.slow
@needs("export")
@pytest.mark.parametrize(
    "name", ["EMOv2-1M/segformer", "EMOv2-1M/ssdlite", "EMOv2-1M/retinanet", "U-EMOv2-5M", "V-EMOv2-1M"]
)
def test_the_command_exports_our_names(capsys, tmp_path, name):
    code, output = run_here(capsys, "--model", name, "--image-size", 64, "--output-dir", tmp_path,
                            main=export_classifier.main)  # fmt: skip
    assert code == 0 and "largest difference" in output and (tmp_path / f"{name.replace('/', '-')}.onnx").is_file()


def test_the_command_refuses_what_does_not_fit(capsys, tmp_path):
    segmenter().save_pretrained(tmp_path / "m")
    for given, message in (
        (["--image-size", 64, 64, 3], "--image-size 64 64 3: expected one side, or height and width"),
        (["--image-size", 64, "--frames", 4], "--frames 4: EMOv2ForSemanticSegmentation takes images, not clips"),
        ([], "no image processor of it makes images of a single size; pass --image-size"),
    ):
        code, output = run_here(capsys, "--model", tmp_path / "m", *given, main=export_classifier.main)
        assert code != 0 and message in output, output
    assert not (tmp_path / "m" / "exported").exists()


@pytest.mark.parametrize("name", ["EMOv2-1M/segnet", "EMOv2-6M", "U-EMOv2-5M/segformer", "/nowhere/model", "a/b/c"])
def test_a_mistyped_name_gets_the_names_and_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr(export_command.AutoConfig, "from_pretrained", lambda name: pytest.fail("the Hub was asked"))
    with pytest.raises(ValueError, match=r"does not load as .*no such folder or name.*: EMOv2-1M.*/semantic_fpn"):
        export_command.open_model(name)


def test_a_hub_id_is_asked_of_the_hub(offline):
    with pytest.raises(ValueError, match=r"owner/model does not load as .*Names with fresh weights: EMOv2-1M"):
        export_command.open_model("owner/model")
