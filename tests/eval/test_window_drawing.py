"""The drawing of the block's windows: what it shows, and that the document has it."""

import pytest
import torch
from helpers.paths import ROOT

from d_emo.eval.tables import window_drawing
from d_emo.eval.tables.window_drawing import SIDE, TOKEN, WINDOW


@pytest.fixture(scope="module")
def panels():
    return dict(window_drawing.panels())


def test_windows_hold_the_tokens_of_the_papers_definition(panels):
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    near = (rows // WINDOW == TOKEN[0] // WINDOW) & (columns // WINDOW == TOKEN[1] // WINDOW)
    stride = SIDE // WINDOW
    far = (rows % stride == TOKEN[0] % stride) & (columns % stride == TOKEN[1] % stride)
    local = ((rows - TOKEN[0]).abs() <= 2) & ((columns - TOKEN[1]).abs() <= 2)
    assert torch.equal(panels["Neighborhood window"], near)
    assert torch.equal(panels["Remote window"], far)
    assert torch.equal(panels["Depthwise 5 x 5"], local)
    assert not (near | far).all() and panels["The whole block"].all()


def test_the_documents_drawing_is_what_the_command_prints(capsys):
    window_drawing.main([])
    drawn = (ROOT / "docs" / "explanation" / "windows.svg").read_text(encoding="utf-8")
    assert capsys.readouterr().out == drawn
