"""Variants of the definition: each changes what it says and nothing else; their comparison can be gone on with."""

import dataclasses
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


BEGIN_ELSEWHERE = [name for name in VARIANTS if name.endswith("PyTorch's")]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in (AS_DEFINED, *BEGIN_ELSEWHERE)])
def test_a_variant_computes_something_else(name):
    ours, plain = made(name), made(AS_DEFINED)
    if len(list(ours.parameters())) == len(list(plain.parameters())):
        for parameter, same in zip(ours.parameters(), plain.parameters(), strict=True):
            if parameter.shape == same.shape:
                parameter.data.copy_(same)
    answer, expected = answered(ours), answered(plain)
    assert answer.isfinite().all() and not torch.allclose(answer, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", BEGIN_ELSEWHERE)
def test_a_variant_begins_with_the_weights_that_it_names(name):
    ours, plain = (made(one, randomised=False).state_dict() for one in (name, AS_DEFINED))
    named = {"qkv": ["to_qkv"], "proj_out": ["i2rmb.proj_out"], "both": ["to_qkv", "i2rmb.proj_out"]}[
        name.split(":")[0]
    ]
    changed = {key for key in ours if not torch.equal(ours[key], plain[key])}
    assert changed == {key for key in ours if any(part in key for part in named)}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_trains_in_bfloat16_as_gpus_do(name):
    network = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        answer = answered(network)
    answer.float().square().mean().backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    torch.testing.assert_close(answer.float(), answered(made(name)), rtol=0.1, atol=0.3)


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
    norm = block.conv_norm

    def normalise(pixels):
        variance, mean = torch.var_mean(pixels, dim=(2, 3), correction=0, keepdim=True)
        shape = (1, -1, 1, 1)
        return (pixels - mean) / (variance + 1e-6).sqrt() * norm.weight.view(shape) + norm.bias.view(shape)

    expected = restated(block, tokens, normalise, later=False)
    torch.testing.assert_close(block(tokens), expected, rtol=1e-4, atol=1e-4)


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
def test_modulation_sits_where_it_says(name):
    outside = made(name).blocks[0]
    block, tokens = outside.block, torch.randn(2, 8, 8, 16)
    conditioning = torch.randn(2, 16)
    shift, scale, gate = (part[:, None, None] for part in block.modulation(F.silu(conditioning)).split(16, dim=-1))
    inside = block.i2rmb(block.norm(tokens))
    expected = {"modulated after": inside * (1 + scale) + shift, "gate only": inside}[name]
    torch.testing.assert_close(outside(tokens, conditioning), tokens + gate * expected, rtol=1e-5, atol=1e-5)


def test_a_rounded_stream_is_that_of_bfloat16():
    network, tokens = made("bfloat16 stream"), torch.randn(2, 8, 8, 16)
    stream = network.blocks[0](tokens, torch.randn(2, 16))
    assert stream.dtype == torch.float32
    assert torch.equal(stream, stream.bfloat16().float())


def test_a_comparison_goes_on_and_is_refused_on_other_terms(picture_table, tmp_path, capsys):
    words = ["--data", str(picture_table), "--output-dir", str(tmp_path), "--tiny", "--variants", AS_DEFINED]
    definition.main([*words, "GELU later"])
    printed = capsys.readouterr().out
    rows = {row[1]: row for row in (line[2:-2].split(" | ") for line in printed.splitlines() if line.startswith("| D"))}
    assert set(rows) == {"", "GELU later", AS_DEFINED}
    found = {json.loads(path.read_text())["variant"]: path.parent for path in tmp_path.glob("*/run.json")}
    assert set(found) == set(rows)
    told, plain = rows["GELU later"], rows[AS_DEFINED]
    losses = [float(line.split(",")[1]) for line in (found["GELU later"] / "loss.csv").read_text().splitlines()[1:]]
    assert len(losses) == 20
    assert told[2] == "after the attention, not on its values"
    assert float(told[6]) == pytest.approx(sum(losses[:2]) / 2, abs=1e-4)  # before a tenth, and at the end
    assert float(told[10]) == pytest.approx(sum(losses[-2:]) / 2, abs=1e-4)
    assert float(told[11]) == pytest.approx(float(plain[10]) - float(told[10]), abs=1.01e-4)

    definition.main([*words, "no norm"])
    assert "1 of 1" in capsys.readouterr().out  # only what was missing
    with pytest.raises(SystemExit, match=r"was made with .*choose another --output-dir"):
        definition.main([item for item in words if item != "--tiny"])


def test_a_run_that_fails_leaves_the_others(picture_table, tmp_path, capsys, monkeypatch):
    def broken(network):
        raise RuntimeError("out of something")

    monkeypatch.setitem(VARIANTS, "no norm", dataclasses.replace(VARIANTS["no norm"], change=broken))
    words = ["--data", str(picture_table), "--output-dir", str(tmp_path), "--tiny", "--models", "D-EMOv2-N-2"]
    with pytest.raises(SystemExit, match=r"no-norm-0\.002-seed0 did not end well"):
        definition.main([*words, "--variants", "no norm", "remote"])
    printed = capsys.readouterr().out
    assert "RuntimeError: out of something" in printed and "| D-EMOv2-N-2 | remote |" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants", "GELU"], "--variants 'GELU' is none of 'as defined'"),
        (["--models", "DiT-N-3"], "--models 'DiT-N-3' is none of "),
        (["--seeds", "1", "1"], "--seeds 1 1: name each once"),
    ],
)
def test_what_is_unknown_or_named_twice_is_refused(picture_table, tmp_path, capsys, more, message):
    words = ["--data", str(picture_table), "--output-dir", str(tmp_path / "out"), "--tiny"]
    with pytest.raises(SystemExit) as refused:
        definition.main([*words, *more])
    assert message in f"{refused.value}{capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()
