"""Blocks that see one of each 2 x 2 tokens: the formula, gradients, BatchNorm's statistics, what is refused."""

import re

import pytest
import torch
from helpers.models import tiny_model

from d_emo import create_model
from d_emo.models.kept_tokens import TokenFusion, keep, put_back

FAMILIES = ("D-EMOv2", "DiT")
CONFIG = {"num_layers": 3, "dense_blocks": 1}
TIMES, LABELS = torch.tensor([100.0, 900.0]), torch.tensor([0, 10])


def drawn(side: int = 16):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, side, side, generator=generator)
    return noisy, torch.randint(0, 4, (2, side // 4, side // 4), generator=generator, dtype=torch.uint8)


def by_hand(model, noisy, kept):
    """A restatement, token by token."""
    condition = model.embed_time(TIMES) + model.label_embed(LABELS)
    tokens = model.patch_embed(noisy).permute(0, 2, 3, 1) + model.pos_embed
    before = model.blocks[0](tokens, condition)
    places = {
        (b, r, c): (2 * r + int(kept[b, r, c]) // 2, 2 * c + int(kept[b, r, c]) % 2)
        for b in range(2)
        for r in range(kept.shape[1])
        for c in range(kept.shape[2])
    }
    sparse = torch.empty(*kept.shape, before.shape[-1])
    for (b, r, c), (row, column) in places.items():
        sparse[b, r, c] = before[b, row, column]
    sparse = model.blocks[1](sparse, condition)
    after = model.fusion.mask_token.expand_as(before).clone()
    for (b, r, c), (row, column) in places.items():
        after[b, row, column] = sparse[b, r, c]
    fused = torch.cat([before, after], -1) @ model.fusion.proj.weight.T + model.fusion.proj.bias
    return model._unpatchify(model.proj_out(model.norm_out(model.blocks[2](fused, condition), condition)))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_middle_block_sees_the_kept_tokens(family):
    model, (noisy, kept) = tiny_model(family, **CONFIG).eval(), drawn()
    found = model(noisy, TIMES, LABELS, kept=kept).sample
    torch.testing.assert_close(found, by_hand(model, noisy, kept), atol=1e-6, rtol=1e-5)
    assert (found - model(noisy, TIMES, LABELS).sample).abs().max() > 1e-3


@torch.no_grad()
def test_kept_tokens_are_put_back_where_they_were():
    tokens, (_, kept) = torch.randn(2, 8, 8, 5), drawn()
    restored = put_back(keep(tokens, kept), kept, torch.full((5,), 7.0))
    same = (restored == tokens).all(-1)
    assert same.sum() == tokens[..., 0].numel() // 4
    assert (restored[~same] == 7).all()


@torch.no_grad()
def test_a_fresh_fusion_leaves_what_passed_identities_as_it_is():
    fusion, tokens = TokenFusion(8), torch.randn(2, 4, 4, 8)
    fusion.reset()
    torch.testing.assert_close(fusion(tokens, tokens, None), tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_a_gradient_and_the_mask_token_one_of_zeros_without_dropping(family):
    for dropping in (True, False):
        model, (noisy, kept) = tiny_model(family, **CONFIG).train(), drawn()
        model(noisy, TIMES, LABELS, kept=kept if dropping else None).sample.square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert bool(parameter.grad.abs().max() > 0) == (dropping or "mask_token" not in name), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_statistics_of_the_middle_are_those_of_all_tokens(checkpointing):
    """What sampling normalises with is of the grid that sampling has, whatever the steps between saw."""
    model, (noisy, kept) = tiny_model(**CONFIG).train(), drawn()
    if checkpointing:
        model.enable_gradient_checkpointing()

    def statistics():
        return [{name: value.clone() for name, value in block.named_buffers()} for block in model.blocks]

    start = statistics()
    model(noisy, TIMES, LABELS, kept=kept).sample.sum().backward()
    sparse = statistics()
    model(noisy, TIMES, LABELS).sample.sum().backward()
    dense = statistics()

    def moved(index, old, new):
        return any(not torch.equal(old[index][name], new[index][name]) for name in old[index])

    assert [moved(index, start, sparse) for index in range(3)] == [True, False, True]
    assert [moved(index, sparse, dense) for index in range(3)] == [True, True, True]
    assert model.blocks[1].i2rmb.conv_norm.momentum == 0.1


def test_saved_and_loaded(tmp_path):
    model, (noisy, kept) = tiny_model(**CONFIG).eval(), drawn()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(again(noisy, TIMES, LABELS, kept=kept).sample, model(noisy, TIMES, LABELS, kept=kept).sample)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dense_blocks": 0}, "dense_blocks=0"),
        ({"dense_blocks": 2, "num_layers": 4}, "leave none of num_layers=4 between; use 1 to 1"),
        ({"dense_blocks": 1, "num_layers": 4, "guide_block": 2}, "guide_block=2 is among the blocks"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        create_model("D-EMOv2-N-2", **config)


def test_calls_that_do_not_fit_are_refused():
    noisy, kept = drawn()
    with pytest.raises(ValueError, match="the network has no dense_blocks"):
        tiny_model()(noisy, TIMES, LABELS, kept=kept)
    with pytest.raises(ValueError, match=re.escape("kept is (2, 3, 4); pass whole numbers from 0 to 3, (2, 4, 4)")):
        tiny_model(**CONFIG)(noisy, TIMES, LABELS, kept=kept[:, :3])
    with pytest.raises(ValueError, match="needs a grid of even sides, and it is 7 x 7"):
        tiny_model(**CONFIG, sample_size=14)(noisy[..., :14, :14], TIMES, LABELS, kept=kept)
