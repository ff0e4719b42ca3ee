"""Exported classifiers answer as the model does."""

import functools
import sys

import pytest
import torch
from helpers.classifiers import TINY
from helpers.extras import needs
from helpers.models import enliven
from helpers.training import run_here

import d_emo
from d_emo import EMOv2Backbone, EMOv2Config, EMOv2ForImageClassification, create_classifier
from d_emo.eval import export_classifier
from d_emo.eval.systems import export_command
from d_emo.export import OnnxModel, export_program, save_coreml, save_onnx, save_program
from d_emo.train import train_classifier


def network(name="EMOv2-1M", **overrides):
    """A small network with every kind of block, with large weights; its logits depend on the image."""
    small = {"depths": (1, 2, 2, 2), "widths": (16, 16, 32, 32), "head_dims": (8, 8, 8, 8), "num_classes": 7}
    return enliven(create_classifier(name, **{**small, **overrides})).eval()


SMALLEST = {"depths": (1, 1, 2, 1), "widths": (8, 8, 16, 16)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function that gives the small network of a name, and its ONNX file for pictures of 64 x 64."""

    @functools.cache
    def export(name):
        model, path = network(name), tmp_path_factory.mktemp("exported") / "model.onnx"
        save_onnx(model, 64, path)
        return model, path

    return export


@needs("export")
@pytest.mark.parametrize("name", ["EMOv2-1M", pytest.param("EMOv1-1M", marks=pytest.mark.slow)])
def test_onnx_equals_torch_for_any_batch(exported, name):
    model, path = exported(name)
    run = OnnxModel(path)
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = model(pixels)
        assert batch == 1 or (expected[0] - expected[1]).abs().max() > 0.01 * expected.abs().max()
        torch.testing.assert_close(run(pixels), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["EMOv2-1M", pytest.param("EMOv1-1M", marks=pytest.mark.slow)])
def test_exported_programs_equal_torch_for_any_batch(tmp_path, name):
    model = network(name, **SMALLEST)
    save_program(model, 64, tmp_path / "model.pt2")
    run = torch.export.load(str(tmp_path / "model.pt2")).module()
    pixels = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(run(pixels), model(pixels), atol=1e-5, rtol=1e-5)


@needs("coreml")
def test_core_ml_converts(tmp_path):
    save_coreml(network(), 64, tmp_path / "model.mlpackage")
    import coremltools

    description = (
        coremltools.models.MLModel(str(tmp_path / "model.mlpackage"), skip_model_load=True).get_spec().description
    )
    assert [entry.name for entry in description.input] == ["pixel_values"]
    assert list(description.input[0].type.multiArrayType.shape) == [1, 3, 64, 64]
    assert [entry.name for entry in description.output] == ["logits"]


@pytest.mark.slow
@needs("export")
def test_the_command_prints_parity_and_keeps_the_processor(capsys, tmp_path):
    code, _ = run_here(capsys, *TINY, "--max-train-steps", "1", "--validation-share", "0", "--output-dir",
                       tmp_path / "trained", main=train_classifier.main)  # fmt: skip
    assert code == 0
    code, output = run_here(capsys, "--model", tmp_path / "trained", "--formats", "onnx", "torch",
                            main=export_classifier.main)  # fmt: skip
    assert code == 0 and output.count("largest difference") == 2 and "images of 32 x 32" in output
    folder = tmp_path / "trained" / "exported"
    assert {path.name for path in folder.iterdir()} == {"trained.onnx", "trained.pt2", "preprocessor_config.json"}


def test_an_unknown_model_is_named_with_those_that_are_known(capsys, tmp_path, offline):
    code, output = run_here(capsys, "--model", "EMOv3", "--output-dir", tmp_path / "out", main=export_classifier.main)
    assert code != 0 and "--model EMOv3 does not load as an image classifier" in output
    assert "Names with fresh weights: EMOv2-1M, EMOv2-2M" in output and not (tmp_path / "out").exists()
    digits = d_emo.packaged("digits")
    code, output = run_here(capsys, "--model", digits, "--output-dir", tmp_path / "out", main=export_classifier.main)
    assert code != 0 and f"--model {digits}: it holds a pipeline (DEMOPipeline), not an image classifier or a" in output


def test_a_file_that_answers_otherwise_is_not_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(export_command, "difference", lambda *arguments: 1e-3)
    path = tmp_path / "model.pt2"
    path.write_text("an earlier export")
    with pytest.raises(ValueError, match=r"by 1\.0e-03 of the largest logit; deleted"):
        export_command.export_and_check(network(**SMALLEST), 64, "torch", path)
    assert path.read_text() == "an earlier export" and list(tmp_path.iterdir()) == [path]


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'd-emo\[export\]'"):
        save_onnx(network(), 64, tmp_path / "model.onnx")


# ---- what a model takes ----------------------------------------------------------------------------------------------


@needs("export")
def test_onnx_files_take_the_models_channels_sizes_and_type_of_numbers(tmp_path):
    """A float16 network for grey images of 48 x 96."""
    model, path = network(in_channels=1, **SMALLEST).half(), tmp_path / "model.onnx"
    save_onnx(model, (48, 96), path)
    pixels = torch.randn(3, 1, 48, 96, generator=torch.Generator().manual_seed(0))
    answer = OnnxModel(path)(pixels)
    with torch.no_grad():
        own = model(pixels.half())
    assert answer.dtype == torch.float16 and own.abs().max() > 0.1
    torch.testing.assert_close(answer, own, atol=5e-3 * own.abs().max().item(), rtol=0)


@pytest.mark.slow
@needs("export")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_onnx_lacks_becomes_float32_there_and_stays_in_programs(tmp_path, dtype):
    """onnxruntime has no layers of bfloat16 and float64."""
    model = network(**SMALLEST).to(dtype)
    save_onnx(model, 64, tmp_path / "model.onnx")
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answer, program = OnnxModel(tmp_path / "model.onnx")(pixels), export_program(model, 64).module()
        torch.testing.assert_close(program(pixels.to(dtype)), model(pixels.to(dtype)), atol=0.02, rtol=0.02)
        assert next(model.parameters()).dtype == dtype
        torch.testing.assert_close(answer, model.float()(pixels), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [
        (torch.bfloat16, 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((torch.bfloat16, 1), (torch.float64, 3), (torch.float16, 3), (torch.float32, 1))
        ),
    ],
)
def test_the_command_exports_saved_models_of_every_kind(capsys, tmp_path, dtype, channels):
    config = EMOv2Config(depths=[1, 1, 2, 1], widths=[8, 8, 16, 16], head_dims=[8] * 4, num_labels=3, image_size=32,
                         num_channels=channels, clip_window=True, layer_scale=1.0)  # fmt: skip
    enliven(EMOv2ForImageClassification(config)).to(dtype).save_pretrained(tmp_path / "m")
    code, output = run_here(capsys, "--model", tmp_path / "m", "--formats", "torch", main=export_classifier.main)
    assert code == 0 and output.count("largest difference") == 1 and "images of 32 x 32" in output, output
    processor = {"preprocessor_config.json"} if channels == 3 else set()  # there is none for other channels
    assert {path.name for path in (tmp_path / "m" / "exported").iterdir()} == {"m.pt2"} | processor


def test_a_model_stays_in_the_mode_that_it_is_in():
    model = network(**SMALLEST).train()
    model.stem.conv_norm.eval()
    export_program(model, 64)
    assert model.training and model.stem.depthwise_norm.training and not model.stem.conv_norm.training
    with pytest.raises(ValueError, match="no logits"):
        export_program(EMOv2Backbone(EMOv2Config.of("EMOv2-1M")).train(), 64)


# ---- bad arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -1, 1.5, "64", None, True, (64,), (64, 0), (64, 64, 3), 10**9, float("nan")])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(ValueError, match="image_size="):
        export_program(network(), size)


@pytest.mark.parametrize("batch", [0, -1, 1.5, "2", True])
def test_a_batch_size_that_is_none_is_refused(batch):
    with pytest.raises(ValueError, match="batch_size="):
        export_program(network(), 64, batch)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "model is a NoneType; pass a classifier, a segmenter or a detector"),
        ("EMOv2-1M", "model is a str"),
        (torch.nn.Identity(), "Identity without parameters"),
        (torch.nn.Linear(2, 2), "Linear without a convolution"),
    ],
)
def test_other_models_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        export_program(model, 64)


@needs("export")
def test_onnx_files_and_images_that_do_not_fit_are_refused(exported, tmp_path):
    (tmp_path / "text.onnx").write_text("no graph")
    path = exported("EMOv2-1M")[1]
    run = OnnxModel(path, threads=1)
    for call, message in (
        (lambda: OnnxModel(tmp_path / "absent.onnx"), "absent.onnx: there is no such file"),
        (lambda: OnnxModel(tmp_path / "text.onnx"), "text.onnx: not an ONNX file that runs here"),
        (lambda: OnnxModel(path, threads=0), "threads=0 is not None or a whole number from 1 to 1024"),
        (lambda: run(torch.zeros(2, 1, 64, 64)), r"the shape \(2, 1, 64, 64\), the file takes \(B, 3, 64, 64\)"),
        (lambda: run(torch.zeros(0, 3, 64, 64)), "the file takes"),
        (lambda: run(torch.zeros(3, 64, 64)), "the file takes"),
        (lambda: run(torch.zeros(1, 3, 64, 64).numpy()), "pixels is a ndarray; pass a tensor"),
        (lambda: run(None), "pixels is a NoneType; pass a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@needs("export")
@pytest.mark.parametrize("path", [None, 3, ""])
def test_a_path_that_is_none_is_refused(path):
    for call in (save_program, save_onnx):
        with pytest.raises(ValueError, match=r"path=.* is no path of a file"):
            call(network(**SMALLEST), 64, path)
    with pytest.raises(ValueError, match=r"path=.* is no path of a file"):
        OnnxModel(path)


@pytest.mark.parametrize("save", [save_program, pytest.param(save_onnx, marks=needs("export"))])
def test_a_place_that_cannot_be_written_is_refused_before_the_export(tmp_path, save, monkeypatch):
    monkeypatch.setattr("d_emo.export.files.export_program", lambda *_, **__: pytest.fail("it was exported"))
    for path, message in (
        (tmp_path / "absent" / "file", "there is no folder .*absent; make it"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            save(network(**SMALLEST), 64, path)


@needs("coreml")
def test_core_ml_folders_end_as_such(tmp_path):
    with pytest.raises(ValueError, match=r"is no \.mlpackage"):
        save_coreml(network(), 64, tmp_path / "model.onnx")


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a file's size are POSIX's")
@pytest.mark.parametrize(
    ("save", "name"),
    [
        (save_program, "model.pt2"),
        pytest.param(save_onnx, "model.onnx", marks=[pytest.mark.slow, needs("export")]),
    ],
)
def test_a_disk_that_fills_up_leaves_the_earlier_file_and_nothing_else(tmp_path, save, name):
    """Writing stops at 4 kB, as at the end of a disk."""
    import resource

    path = tmp_path / name
    path.write_text("an earlier export")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, former[1]))
    try:
        with pytest.raises(OSError) as caught:
            save(network(**SMALLEST), 64, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert caught.value.filename == str(path)
    assert path.read_text() == "an earlier export" and list(tmp_path.iterdir()) == [path]


def test_a_size_that_the_command_cannot_use_is_refused(capsys, tmp_path):
    for size in ("0", "-5", "65537"):
        code, output = run_here(capsys, "--model", "EMOv2-1M", "--image-size", size, "--output-dir", tmp_path / "out",
                                main=export_classifier.main)  # fmt: skip
        assert code != 0 and f"--image-size: {size} is not a whole number from 1 to 65536" in output
    assert not (tmp_path / "out").exists()
