"""How-to pages whose blocks are run as they are, beside small models of their names."""

import shutil

import pytest
import torch
from helpers.detectors import write_detector
from helpers.paths import ROOT
from helpers.tutorials import blocks, run_blocks

import d_emo


@pytest.mark.slow
def test_the_page_on_exporting_writes_its_files(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="of the extra export")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(d_emo.packaged("digits-classifier"), tmp_path / "runs" / "digits-classifier")
    write_detector(tmp_path / "runs" / "my-detector", ["red", "blue"])
    found = [block for block in blocks("exporting", ROOT / "docs" / "how_to") if "d-emo convert" not in block.code]
    assert len(found) == 3  # what converts DiTs has its tests
    variables = {"pixel_values": torch.rand(2, 3, 224, 224)}
    ran = run_blocks(found, tmp_path, variables)
    assert variables["logits"].shape == (2, 1000)
    assert "images of" in ran[0][1]
    made = {path.name for path in (tmp_path / "runs" / "digits-classifier" / "exported").iterdir()}
    assert {"digits-classifier.onnx", "digits-classifier.pt2", "preprocessor_config.json"} <= made
    assert (tmp_path / "detector.onnx").is_file()
