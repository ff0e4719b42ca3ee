"""Variants of the definition: each changes what it says and nothing else; their comparison can be gone on with."""

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d_emo import create_model
from d_emo.eval.benchmarks.gpu import definition
from d_emo.eval.benchmarks.gpu.variants import AS_DEFINED, VARIANTS, RunningNorm

SIZES = {"sample_size": 16, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "num_layers": 2, "window_size": 4}
SIZES |= {"num_attention_heads": 2, "num_classes": 3, "learn_sigma": False}


def made(name: str, randomised: bool = True):
    """A network as a variant has it, with weights that are the same for all that have the same shapes."""
    torch.manual_seed(0)
    variant = VARIANTS[name]
    network = create_model("D-EMOv2-N-2", **{**SIZES, **variant.overrides})
    if variant.change:
        variant.change(network)
    if randomised:
        torch.manual_seed(1)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.2)
    return network.train()


def answered(network) -> torch.Tensor:
    """What it makes of two images."""
    generator = torch.Generator().manual_seed(2)
    images, times = torch.randn(2, 3, 16, 16, generator=generator), torch.tensor([0.2, 0.7])
    return network(images, 1000 * times, torch.tensor([0, 2]), return_dict=False)[0]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != AS_DEFINED])
def test_a_variant_computes_something_else_or_begins_elsewhere(name):
    ours, plain = made(name, randomised=False), made(AS_DEFINED, randomised=False)
    values = list(ours.state_dict().values())
    begun = list(plain.state_dict().values())
    same = len(values) == len(begun) and all(map(torch.equal, values, begun))
    answer, expected = answered(made(name)), answered(made(AS_DEFINED))
    assert answer.isfinite().all()
    assert not same or not torch.allclose(answer, expected, rtol=1e-6, atol=1e-6)
    answer.square().mean().backward()


def block_of(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The inside of a variant's first block, and tokens (B, H, W, C) for it."""
    network = made(name)
    return network.blocks[0].i2rmb, torch.randn(2, 8, 8, 16, generator=torch.Generator().manual_seed(3))


def restated(block, tokens: torch.Tensor, normalise: Callable, later: bool) -> torch.Tensor:
    """A block by loops over windows and heads, with a normalisation of (B, E, H, W) of its own."""
    attn, side = block.attn, 4
    query, key, value = attn.to_qkv(tokens).split((16, 16, 64), dim=-1)
    value = value if later else F.gelu(value)
    attended = torch.zeros_like(value)
    near = [(slice(i, i + side), slice(j, j + side)) for i in (0, 4) for j in (0, 4)]
    far = [(slice(i, None, 2), slice(j, None, 2)) for i in (0, 1) for j in (0, 1)]
    for rows, columns in near + far:
        for head in range(2):
            q, k = (x[:, rows, columns, 8 * head : 8 * head + 8].flatten(1, 2) for x in (query, key))
            v = value[:, rows, columns, 32 * head : 32 * head + 32].flatten(1, 2)
            seen = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1) @ v
            attended[:, rows, columns, 32 * head : 32 * head + 32] += seen.unflatten(1, (side, side))
    attended = F.gelu(attended) if later else attended
    local = F.silu(normalise(block.conv(attended.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
    return block.proj_out(attended + local)


def by_batch(norm: nn.BatchNorm2d) -> Callable:
    """Normalised by the mean and the variance of a batch."""

    def normalise(pixels: torch.Tensor) -> torch.Tensor:
        variance, mean = torch.var_mean(pixels, dim=(0, 2, 3), correction=0, keepdim=True)
        shape = (1, -1, 1, 1)
        return (pixels - mean) / (variance + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)

    return normalise


@pytest.mark.parametrize(("name", "eps"), [(AS_DEFINED, 1e-6), ("eps 1e-5", 1e-5), ("eps 1e-3", 1e-3)])
def test_epsilons_are_those_of_the_batchs_norm(name, eps):
    block, tokens = block_of(name)
    assert block.conv_norm.eps == eps
    expected = restated(block, tokens, by_batch(block.conv_norm), later=False)
    torch.testing.assert_close(block(tokens), expected, rtol=1e-4, atol=1e-4)


def test_gelu_comes_after_both_kinds_of_windows_were_added():
    outside, tokens = block_of("GELU later")
    expected = restated(outside.block, tokens, by_batch(outside.block.conv_norm), later=True)
    torch.testing.assert_close(outside(tokens), expected, rtol=1e-4, atol=1e-4)


def test_an_images_statistics_are_its_own():
    block, tokens = block_of("an image's statistics")
    together, alone = block(tokens), torch.cat([block(one[None]) for one in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_no_norm_is_none():
    block, tokens = block_of("no norm")
    expected = restated(block, tokens, lambda pixels: pixels, later=False)
    torch.testing.assert_close(block(tokens), expected, rtol=1e-4, atol=1e-4)


def test_running_statistics_begin_with_the_first_batch_and_have_no_gradient():
    ours = RunningNorm(nn.BatchNorm2d(4), momentum=0.1).train()
    torch.manual_seed(0)
    first, second = (2 * torch.randn(3, 4, 5, 5) + shift for shift in (1, 3))
    variance, mean = torch.var_mean(first, dim=(0, 2, 3), keepdim=True)
    torch.testing.assert_close(ours(first), (first - mean) / (variance + 1e-5).sqrt())
    after, middle = torch.var_mean(second, dim=(0, 2, 3), keepdim=True)
    mean, variance = 0.9 * mean + 0.1 * middle, 0.9 * variance + 0.1 * after
    second.requires_grad_()
    answer = ours(second)
    torch.testing.assert_close(answer, (second - mean) / (variance + 1e-5).sqrt())
    ours(first)  # changes the statistics in place, not what the gradient needs
    answer.sum().backward()  # of normalisation by the batch itself this sum has no gradient
    torch.testing.assert_close(second.grad, torch.ones_like(second) / (variance + 1e-5).sqrt())
    torch.testing.assert_close(ours.eval()(first), ours(first))


@pytest.mark.parametrize("name", ["modulated after", "gate only"])
def test_without_shift_and_scale_it_makes_no_difference_where_they_sit(name):
    ours, plain = made(name), made(AS_DEFINED)
    with torch.no_grad():
        for block in [*plain.blocks, *(outside.block for outside in ours.blocks)]:
            block.modulation.weight[:32] = 0
            block.modulation.bias[:32] = 0
    torch.testing.assert_close(answered(ours), answered(plain), rtol=1e-5, atol=1e-5)


def test_a_rounded_stream_is_that_of_bfloat16():
    network, tokens = made("bfloat16 stream"), torch.randn(2, 8, 8, 16)
    stream = network.blocks[0](tokens, torch.randn(2, 16))
    assert stream.dtype == torch.float32
    assert torch.equal(stream, stream.bfloat16().float())


def test_a_comparison_goes_on_and_is_refused_on_other_terms(picture_table, tmp_path, capsys):
    words = ["--data", str(picture_table), "--output-dir", str(tmp_path), "--tiny", "--variants", AS_DEFINED]
    definition.main([*words, "GELU later"])
    printed = capsys.readouterr().out
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith("| D")]
    assert sorted(row[1] for row in rows) == ["", "GELU later", AS_DEFINED]
    found = {json.loads(path.read_text())["variant"]: path.parent for path in tmp_path.glob("*/run.json")}
    assert set(found) == {"", "GELU later", AS_DEFINED}
    losses = [float(line.split(",")[1]) for line in (found["GELU later"] / "loss.csv").read_text().splitlines()[1:]]
    told = next(row for row in rows if row[1] == "GELU later")
    assert told[5] == f"{losses[0]:.4f}" and told[9] == f"{losses[-1]:.4f}"  # tenths of 20 steps are lines of two
    plain = next(row for row in rows if row[1] == AS_DEFINED)
    assert float(told[10]) == pytest.approx(float(plain[9]) - float(told[9]), abs=1.01e-4)

    definition.main([*words, "no norm"])
    assert "1 of 1" in capsys.readouterr().out  # only what was missing
    with pytest.raises(SystemExit, match="choose another --output-dir"):
        definition.main([item for item in words if item != "--tiny"])


def test_unknown_variants_are_refused_by_name(picture_table, tmp_path):
    words = ["--data", str(picture_table), "--output-dir", str(tmp_path), "--tiny"]
    with pytest.raises(SystemExit, match="'GELU' is none of 'as defined'"):
        definition.main([*words, "--variants", "GELU"])
