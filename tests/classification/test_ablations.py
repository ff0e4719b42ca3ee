"""The paper's architecture and ablation rows: sizes as published, and that the options do what they say."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomize

from d_emo import create_classifier
from d_emo.classification.irmb import make_block
from d_emo.eval.tables import classifier_table
from d_emo.eval.tables.classifier_table import ROWS, agrees, count

# Rows of which the paper does not give enough to build them: each has a remark in the table.
UNDERDETERMINED = {
    "EMOv1-20M",
    "deformable v2",
    "depths 4, 4, 8, 3",
    "depths 2, 2, 12, 3",
    "depths 2, 2, 8, 2, widths 48, 72, 224, 288",
    "EMOv1-5M, attention and convolution in parallel",
    "DeiT-Tiny with i2RMB",
}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.change)
def test_rows_have_the_published_size_or_say_why_not(row):
    agreed = agrees(row, count(row))
    assert agreed == (row.change not in UNDERDETERMINED)
    assert agreed or row.remark


def test_the_table_is_printed(capsys, monkeypatch):
    monkeypatch.setattr(classifier_table, "ROWS", ROWS[:1])
    classifier_table.main([])
    assert "| EMOv2-1M | 1.461M | 1.4M | 284.8 | 285 | yes |" in capsys.readouterr().out


@pytest.mark.parametrize("version", [1, 2])
def test_parallel_adds_what_attention_and_convolution_make_of_the_same_values(version):
    arguments = {"attend": "values" if version == 2 else "inputs", "kernel_size": 3, "window_size": 2}
    parallel = randomize(make_block(8, 2, 2.0, arrangement="parallel", **arguments)).eval()
    grid = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        values = F.gelu(F.linear(grid, parallel.attn.to_qkv.weight[16:], parallel.attn.to_qkv.bias[16:]))
        local = parallel.conv_norm(parallel.conv(values.permute(0, 3, 1, 2)))
        expected = parallel.proj_out(parallel.attn(grid) + F.silu(local).permute(0, 2, 3, 1))
        torch.testing.assert_close(parallel(grid), expected, atol=1e-5, rtol=1e-5)


def test_without_attention_and_convolution_a_block_sees_one_pixel():
    block = randomize(make_block(8, 2, 2.0, attention_type="none", local="none"))
    grid = torch.randn(1, 4, 4, 8)
    changed = grid.clone()
    changed[0, 2, 3] += 1
    difference = (block(changed) - block(grid)).abs().amax(-1)[0]
    assert difference[2, 3] > 0
    difference[2, 3] = 0
    assert difference.max() == 0


@pytest.mark.parametrize("change", [{"dilation": 2}, {"local": "deformable"}, {"arrangement": "parallel"},
                                    {"attending_stages": (1, 2, 3, 4)}, {"kernel_sizes": (1, 3, 7, 9)},
                                    {"local": "none"}])  # fmt: skip
def test_every_option_learns(change):
    model = create_classifier("EMOv2-1M", num_classes=3, layer_scale=1.0, drop_path=0.0, **change).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())
