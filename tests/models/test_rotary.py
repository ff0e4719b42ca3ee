"""LightningDiT, JiT and bottleneck patches: sizes, multiply-adds, and what their blocks and tokens are made of."""

import pytest
import torch
from helpers.models import fresh_model, randomize, tiny_model
from helpers.paths import ROOT

from d_emo import create_model
from d_emo.eval.tables import model_table
from d_emo.models.flops import count_macs, count_parameters
from d_emo.models.layers import BottleneckPatchEmbed
from d_emo.models.published import export_state
from d_emo.models.rotary import rotary_angles, turned

ROTARY, FAMILIES = ["LightningDiT", "JiT"], ["D-EMOv2", "DiT", "LightningDiT", "JiT"]


def published_parameters(depth, dim, heads, patch, channels, tokens, normed=True, bottleneck=None, context=0):
    """By the published definitions: stored positions counted, tables of rotary positions (no parameters) not."""
    inner = int(2 / 3 * 4 * dim)
    block = 2 * dim + (2 * dim // heads if normed else 0)  # norms
    block += 3 * dim * (dim + 1) + dim * (dim + 1) + 2 * inner * (dim + 1) + dim * (inner + 1) + 6 * dim * (dim + 1)
    patches = patch * patch * channels
    entry = dim * (patches + 1) if bottleneck is None else patches * bottleneck + dim * (bottleneck + 1)
    time_and_labels = dim * 257 + dim * (dim + 1) + 1001 * dim
    output = dim + 2 * dim * (dim + 1) + patches * (dim + 1)
    return depth * block + entry + tokens * dim + time_and_labels + context * dim + output


# Millions as others quote them of the papers, whose own tables could not be looked at: JiT's (arXiv 2511.13720) of 256
# and 512 pixels, and 675 for LightningDiT's XL (arXiv 2501.01423); its B and L are counted here (DiT's: 130 and 458).
@pytest.mark.parametrize(
    ("name", "overrides", "sizes", "millions"),
    [
        ("LightningDiT-B-1", {}, (12, 768, 12, 1, 32, 256), 131),
        ("LightningDiT-L-1", {}, (24, 1024, 16, 1, 32, 256), 458),
        ("LightningDiT-XL-1", {}, (28, 1152, 16, 1, 32, 256), 675),
        ("LightningDiT-XL-1", {"qk_norm": False}, (28, 1152, 16, 1, 32, 256, False), 675),
        ("LightningDiT-XL-2", {"sample_size": 32, "in_channels": 4}, (28, 1152, 16, 2, 4, 256), 675),
        ("JiT-B-16", {}, (12, 768, 12, 16, 3, 256, True, 128, 32), 131),
        ("JiT-L-16", {}, (24, 1024, 16, 16, 3, 256, True, 128, 32), 459),
        ("JiT-H-16", {}, (32, 1280, 16, 16, 3, 256, True, 256, 32), 953),
        ("JiT-B-32", {"sample_size": 512}, (12, 768, 12, 32, 3, 256, True, 128, 32), 133),
        ("JiT-L-32", {"sample_size": 512}, (24, 1024, 16, 32, 3, 256, True, 128, 32), 462),
        ("JiT-H-32", {"sample_size": 512}, (32, 1280, 16, 32, 3, 256, True, 256, 32), 956),
    ],
)
def test_parameters_are_those_of_the_published_definitions(name, overrides, sizes, millions):
    with torch.device("meta"):
        counted = count_parameters(create_model(name, **overrides))
    assert counted == published_parameters(*sizes)
    assert round(counted / 1e6) == millions


@pytest.mark.parametrize(("name", "gmacs"), [("JiT-B-16", 25), ("JiT-L-16", 88), ("JiT-H-16", 182)])
def test_macs_round_to_the_flops_that_are_quoted_of_the_paper(name, gmacs):
    with torch.device("meta"):
        assert round(count_macs(create_model(name)) / 1e9) == gmacs


@pytest.mark.slow
def test_the_documents_table_is_what_its_command_prints(capsys):
    model_table.main(["--pattern", "LightningDiT-*-1", "JiT-*-16"])
    assert capsys.readouterr().out.strip() in (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")


def test_macs_are_those_counted_by_hand():
    """16 tokens of 8 values, 32 channels, 2 blocks; JiT: 3 class tokens in one block of 3, 6 channels on the way in.

    On the CPU: PyTorch's counter leaves its own attention for CPUs out.
    """

    def block(tokens):
        products = tokens * (3 * 32 * 32 + 32 * 32 + 2 * 85 * 32 + 85 * 32) + 6 * 32 * 32
        return products + 2 * tokens * tokens * 32

    around = 256 * 32 + 32 * 32 + 2 * 32 * 32  # time, and the output's modulation
    small = {"sample_size": 8, "in_channels": 2}
    lightning = fresh_model("LightningDiT", **small)
    assert count_macs(lightning) == 16 * 8 * 32 + 2 * block(16) + around + 16 * 32 * 8
    jit = fresh_model("JiT", **small, num_layers=3, context_start=2)
    assert count_macs(jit) == 16 * (8 * 6 + 6 * 32) + 2 * block(16) + block(19) + around + 16 * 32 * 8


def test_attention_by_rotary_positions_depends_on_offsets_alone():
    angles = rotary_angles(6, 7, 8, torch.device("cpu")).view(6, 7, 4)
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0))

    def product(first, second):
        return (turned(query, angles[first][None]) * turned(key, angles[second][None])).sum()

    torch.testing.assert_close(product((1, 2), (3, 1)), product((3, 4), (5, 3)), atol=1e-5, rtol=0)
    assert (product((1, 2), (3, 1)) - product((1, 2), (2, 0))).abs() > 1e-3
    assert (product((0, 0), (0, 2)) - product((0, 0), (2, 0))).abs() > 1e-3


@pytest.mark.parametrize("family", ROTARY)
@torch.no_grad()
def test_half_precision_and_autocast_are_near_single(family, tmp_path, recwarn):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    latents, labels = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 4, 10])
    expected = model(latents, 500, labels).sample
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    found = half(latents.bfloat16(), 500, labels).sample
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model(latents, 500, labels).sample
    assert found.dtype == torch.bfloat16 and half.pos_embed.dtype == torch.float32
    for output in (found, cast):
        assert 0 < (output.float() - expected).norm() / expected.norm() < 0.03
    assert not [warning for warning in recwarn if "rms" in str(warning.message) or "fused" in str(warning.message)]


def test_class_tokens_and_their_positions_learn_and_are_told_apart():
    model = tiny_model("JiT").train()
    arguments = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), 500, torch.tensor([0, 4])
    before = model(*arguments).sample
    before.square().mean().backward()
    gradients = model.context_embed.grad
    assert (gradients.abs().amax(1) > 1e-7).all() and (gradients[0] - gradients[1]).abs().max() > 1e-7
    with torch.no_grad():
        model.context_embed.add_(1.0)
        assert (model(*arguments).sample - before).abs().max() > 1e-4


@torch.no_grad()
def test_a_network_without_class_tokens_is_one_sequence_throughout():
    model, other = tiny_model("JiT", context_length=0), tiny_model("JiT", context_length=0, context_start=1)
    arguments = torch.randn(2, 4, 16, 16), 500, torch.tensor([0, 4])
    assert model.context_embed.shape == (0, 32)
    assert torch.equal(model(*arguments).sample, other(*arguments).sample)


@torch.no_grad()
def test_normed_queries_and_keys_do_not_feel_their_scale():
    for normed in (True, False):
        model = tiny_model("LightningDiT", qk_norm=normed, norm_eps=1e-12)
        arguments = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)), 500, torch.tensor([0, 4])
        before = model(*arguments).sample
        for block in model.blocks:
            block.to_qkv.weight[:64] *= 3
            block.to_qkv.bias[:64] *= 3
        same = torch.allclose(model(*arguments).sample, before, atol=1e-5)
        assert same == normed


@pytest.mark.parametrize("family", ROTARY)
@torch.no_grad()
def test_adapters_take_the_names_of_dits_layers(family):
    peft = pytest.importorskip("peft", reason="needs the extra lora")
    model = tiny_model(family)
    arguments = torch.randn(2, 4, 16, 16), 500, torch.tensor([0, 4])
    base = model(*arguments).sample
    names = ["to_qkv", "to_out", "mlp_in", "mlp_out", "modulation"]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    assert (model(*arguments).sample - base).abs().max() > 1e-3
    model.disable_adapters()
    torch.testing.assert_close(model(*arguments).sample, base, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_bottleneck_is_two_products_in_every_family(family, tmp_path):
    model = tiny_model(family, patch_size=4, patch_bottleneck=5)
    embed = model.patch_embed
    assert isinstance(embed, BottleneckPatchEmbed) and embed.reduce.bias is None
    images = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(3)
    expected = patches @ (embed.expand.weight.flatten(1) @ embed.reduce.weight.flatten(1)).T + embed.expand.bias
    torch.testing.assert_close(embed(images).permute(0, 2, 3, 1), expected, atol=1e-6, rtol=1e-5)
    without = tiny_model(family, patch_size=4, patch_bottleneck=None)
    assert count_parameters(without) - count_parameters(model) == 64 * 32 - (64 * 5 + 5 * 32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(images, 5, torch.tensor([1, 2])).sample,
                               model(images, 5, torch.tensor([1, 2])).sample)  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_bottlenecks_begin_as_other_products_do(family):
    torch.manual_seed(0)
    embed = fresh_model(family, patch_size=4, patch_bottleneck=48, hidden_size=128).patch_embed
    for weight in (embed.reduce.weight, embed.expand.weight):
        bound = (6 / (weight.shape[0] + weight[0].numel())) ** 0.5  # Xavier's
        assert 0.95 * bound < weight.abs().max() <= bound
    assert not embed.expand.bias.any()


def test_networks_elsewhere_have_no_bottleneck():
    model = randomize(create_model("DiT-N-4", num_layers=1, patch_bottleneck=8, timestep_freq_shift=1))
    with pytest.raises(ValueError, match="patch_bottleneck=8 is not in DiT's own scripts"):
        export_state(model)
    with pytest.raises(ValueError, match="patch_bottleneck=8, and Diffusers' DiT has none"):
        model.to_diffusers()
