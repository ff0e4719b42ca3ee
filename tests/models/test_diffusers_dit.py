"""Networks of Diffusers' DiTTransformer2DModel as ours and back, against that class itself."""

import json

import pytest
import torch
from diffusers import DiTTransformer2DModel
from helpers.diffusers_dit import diffusers_dit
from helpers.models import randomize, tiny_model

from d_emo import DEMOTransformer2DModel, DiTBaselineTransformer2DModel, create_model

TIMES, LABELS = torch.tensor([0, 417, 999]), torch.tensor([0, 2, 3])
TINY = {"sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "num_classes": 3}


@torch.no_grad()
def assert_same(ours, theirs, channels=4, side=8):
    images = torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(1))
    expected = theirs(images, TIMES, LABELS).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(images, TIMES, LABELS).sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"out_channels": None},
        {"attention_bias": False},
        {"norm_eps": 1e-2},
        {"patch_size": 4, "num_layers": 1},
        {"in_channels": 3, "out_channels": 6},
    ],
    ids=str,
)
def test_their_folders_become_ours(overrides, tmp_path):
    theirs = diffusers_dit(**overrides)
    theirs.save_pretrained(tmp_path)
    ours = DiTBaselineTransformer2DModel.from_pretrained(tmp_path)
    assert not ours.training and ours.config.num_classes == 3
    assert_same(ours, theirs, overrides.get("in_channels", 4))
    if "attention_bias" not in overrides:  # theirs without biases, ours with zeros
        back = ours.to_diffusers()
        assert_same(ours, back, overrides.get("in_channels", 4))
        assert {name: tensor.tolist() for name, tensor in back.state_dict().items()} == {
            name: tensor.tolist() for name, tensor in theirs.state_dict().items()
        }


@pytest.mark.parametrize("overrides", [{}, {"learn_sigma": False}, {"patch_size": 4}], ids=str)
def test_our_networks_become_theirs(overrides, tmp_path):
    ours = randomize(create_model("DiT-S-2", timestep_freq_shift=1, **TINY, **overrides)).eval()
    ours.proj_out.weight.data.mul_(10)
    ours.to_diffusers().save_pretrained(tmp_path)
    assert_same(ours, DiTTransformer2DModel.from_pretrained(tmp_path))


def test_the_other_frequencies_are_another_network():
    """Why the configuration says which: with the published ones the same weights answer otherwise."""
    theirs = diffusers_dit()
    ours = DiTBaselineTransformer2DModel(**{**TINY, "timestep_freq_shift": 0, "mlp_norm_eps": 1e-5})
    from d_emo.models.diffusers_dit import import_diffusers_state

    import_diffusers_state(theirs.state_dict(), ours)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(ours.eval(), theirs)


def test_files_of_older_versions_are_theirs_too(tmp_path):
    theirs = diffusers_dit()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    old = {"_class_name": "Transformer2DModel", "attention_type": "default", "cross_attention_dim": None}
    (tmp_path / "config.json").write_text(json.dumps({**config, **old}))
    assert_same(DiTBaselineTransformer2DModel.from_pretrained(tmp_path), theirs)


def test_types_and_information_are_as_asked_for(tmp_path):
    diffusers_dit().save_pretrained(tmp_path)
    model, information = DiTBaselineTransformer2DModel.from_pretrained(
        tmp_path, torch_dtype=torch.bfloat16, output_loading_info=True
    )
    assert model.dtype == torch.bfloat16 and model.pos_embed.dtype == torch.float32
    assert information["missing_keys"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_fn": "gelu"}, "activation_fn='gelu' makes another network than DiT's"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine=True makes another"),
        ({"out_channels": 12}, "out_channels=12 is neither in_channels=4 nor twice"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm=None is not a whole number"),
        ({"num_layers": "2"}, "num_layers='2' is not a whole number"),
        ({"num_layers": 10**9}, "num_layers=1000000000 is not a whole number from 1 to 1000"),
        ({"attention_head_dim": 0}, "attention_head_dim=0 is not"),
        ({"sample_size": 9}, "sample_size=9 is not a multiple of patch_size=2"),
        ({"num_layers": 1}, "config.json and weights are of different models"),
        ({"num_layers": 3}, "config.json and weights are of different models"),
    ],
    ids=str,
)
def test_other_networks_of_that_class_are_refused(change, message, tmp_path):
    diffusers_dit().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message) as refusal:
        DiTBaselineTransformer2DModel.from_pretrained(tmp_path)
    assert "\n" not in str(refusal.value)


def test_what_cannot_be_converted_is_refused_by_name(tmp_path):
    diffusers_dit(tied=False).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformer_blocks.1.norm1.emb.* differs from the first block's"):
        DiTBaselineTransformer2DModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device_map cannot be followed"):
        DiTBaselineTransformer2DModel.from_pretrained(tmp_path, device_map="auto")
    with pytest.raises(ValueError, match=r"load it with DiTBaselineTransformer2DModel.from_pretrained, which converts"):
        DEMOTransformer2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model("D-EMOv2"), "DEMOTransformer2DModel is not the DiT network"),
        (lambda: tiny_model("DiT"), "timestep_freq_shift=0, the timestep embedding of the DiT paper's code"),
        (lambda: tiny_model("DiT", learn_sigma=False, prediction_type="flow_prediction"), "SiT is DiT's network with"),
        (lambda: tiny_model("DiT", timestep_freq_shift=1, mlp_ratio=2.0), "mlp_ratio=2.0, and Diffusers' DiT has 4"),
        (lambda: tiny_model("DiT", timestep_freq_shift=1, norm_eps=1e-3), "norm_eps=0.001, and Diffusers' DiT has"),
        (lambda: tiny_model("DiT", timestep_freq_shift=1, sample_size=(8, 16)), "Diffusers' DiT is square"),
        (lambda: tiny_model("DiT", timestep_freq_shift=1, timestep_factor=0.5), "timestep_offset and timestep_factor"),
    ],
)  # fmt: skip
def test_what_their_class_cannot_compute_is_refused_by_name(model, message):
    with pytest.raises(ValueError, match=message):
        model().to_diffusers()
