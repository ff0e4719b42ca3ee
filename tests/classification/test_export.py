"""Exported classifiers answer as the model does."""

import pytest
import torch
from helpers.classifiers import TINY
from helpers.models import randomize
from helpers.training import run_here

from d_emo import create_classifier
from d_emo.eval import export_classifier
from d_emo.eval.classification import export_command
from d_emo.export import OnnxModel, save_coreml, save_onnx, save_program
from d_emo.train import train_classifier


def network(name="EMOv2-1M", **overrides):
    """A small network with every kind of block, randomised; its logits are far from zero."""
    small = {"depths": (1, 2, 2, 2), "widths": (16, 16, 32, 32), "head_dims": (8, 8, 8, 8), "num_classes": 7}
    return randomize(create_classifier(name, **{**small, **overrides})).eval()


@pytest.mark.parametrize("name", ["EMOv2-1M", "EMOv1-1M"])
def test_onnx_equals_torch_for_any_batch(tmp_path, name):
    model = network(name)
    save_onnx(model, 64, tmp_path / "model.onnx")
    run = OnnxModel(tmp_path / "model.onnx")
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            expected = model(pixels)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(run(pixels), expected, atol=1e-4, rtol=1e-4)


def test_exported_programs_equal_torch_for_any_batch(tmp_path):
    model = network()
    save_program(model, 64, tmp_path / "model.pt2")
    run = torch.export.load(str(tmp_path / "model.pt2")).module()
    pixels = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(run(pixels), model(pixels), atol=1e-5, rtol=1e-5)


def test_core_ml_converts(tmp_path):
    pytest.importorskip("coremltools", reason="needs the extra coreml")
    save_coreml(network(), 64, tmp_path / "model.mlpackage")
    import coremltools

    description = (
        coremltools.models.MLModel(str(tmp_path / "model.mlpackage"), skip_model_load=True).get_spec().description
    )
    assert [entry.name for entry in description.input] == ["pixel_values"]
    assert list(description.input[0].type.multiArrayType.shape) == [1, 3, 64, 64]
    assert [entry.name for entry in description.output] == ["logits"]


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


def test_a_file_that_answers_otherwise_is_not_kept(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(export_command, "difference", lambda *arguments: 1e-3)
    path = tmp_path / "model.pt2"
    path.write_text("an earlier export")
    with pytest.raises(ValueError, match=r"by 1\.0e-03 of the largest logit; deleted"):
        export_command.export_and_check(network(), 64, "torch", path)
    assert path.read_text() == "an earlier export" and list(tmp_path.iterdir()) == [path]


def test_a_missing_extra_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"pip install 'd-emo\[export\]'"):
        save_onnx(network(), 64, tmp_path / "model.onnx")
