"""DeiT-Tiny and PVT-Tiny with the paper's blocks: other images, what they refuse. Sizes: `test_ablations.py`."""

import builtins
import re

import pytest
import torch
from helpers.models import randomize
from transformers import PvtConfig, PvtForImageClassification

from d_emo.classification.other_networks import deit_tiny, pvt_tiny

NETWORKS = [(build, block) for build in (deit_tiny, pvt_tiny) for block in (None, "irmb", "i2rmb")]
networks = pytest.mark.parametrize(("build", "block"), NETWORKS, ids=lambda part: getattr(part, "__name__", part))


# Names of transformers' PVT, whose defaults are PVT-Tiny, in this package's.
PVT_NAMES = {
    r"^pvt.encoder.patch_embeddings.3.cls_token": "class_token",
    r"^pvt.encoder.patch_embeddings.(.).position_embeddings": r"positions.\1",
    r"^pvt.encoder.patch_embeddings.(.).projection": r"embeddings.\1",
    r"^pvt.encoder.patch_embeddings.(.).layer_norm": r"norms.\1",
    r"^pvt.encoder.block": "stages",
    r"attention.self.sequence_reduction": "attention.shorten",
    r"attention.self.layer_norm": "attention.norm",
    r"attention.self": "attention",
    r"attention.output.dense": "project",
    r"layer_norm_1": "norm",
    r"layer_norm_2": "mlp.0",
    r"mlp.dense1": "mlp.1",
    r"mlp.dense2": "mlp.3",
    r"^pvt.encoder.layer_norm": "norm",
    r"^classifier": "head",
}


def test_plain_pvt_tiny_is_transformers_with_the_same_weights():
    """To 1e-4 of outputs of about 1: the epsilons of a few norms differ, 1e-5 and 1e-6."""
    reference = randomize(PvtForImageClassification(PvtConfig(num_labels=5, image_size=64))).eval()
    model = pvt_tiny(num_classes=5, image_size=64).eval()
    state = {}
    for name, tensor in reference.state_dict().items():
        for theirs, ours in PVT_NAMES.items():
            name = re.sub(theirs, ours, name)
        state[name] = tensor[0] if name.startswith("positions") else tensor
    model.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = reference(images).logits, model(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@networks
def test_other_images_classes_and_channels_work_and_every_parameter_learns(build, block):
    model = randomize(build(block, num_classes=3, image_size=(64, 96), in_channels=1)).train()
    logits = model(torch.randn(2, 1, 64, 96, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 3)
    logits.square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]


@networks
def test_images_of_another_size_are_refused_in_a_line(build, block):
    model = build(block, num_classes=2, image_size=64)
    with pytest.raises(ValueError, match=r"^pixel_values are 64 x 96, the network takes 64 x 64; .*image_size=\.$"):
        model(torch.zeros(1, 3, 64, 96))
    with pytest.raises(ValueError, match=r"^pixel_values have 1 channels"):
        model(torch.zeros(1, 1, 64, 64))


@pytest.mark.parametrize("build", [deit_tiny, pvt_tiny])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"block": "IRMB2"}, "block='IRMB2' is not None or one of irmb, i2rmb"),
        ({"num_classes": 0}, "num_classes=0 is not a whole number from 1"),
        ({"image_size": 100}, "image_size=100 is not a multiple of"),
        ({"image_size": (64, 65)}, r"image_size=\(64, 65\) is not a multiple of"),
        ({"image_size": "big"}, "image_size='big' is not"),
        ({"in_channels": 0}, "in_channels=0 is not"),
    ],
)
def test_values_out_of_range_are_refused_in_a_line(build, wrong, message):
    with pytest.raises(ValueError, match=f"^{build.__name__}: {message}.*$"):
        build(**wrong)


def test_missing_timm_is_named_with_the_extra_that_brings_it(monkeypatch):
    real = builtins.__import__

    def importing(name, *rest, **more):
        if name.startswith("timm"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", importing)
    with pytest.raises(ImportError, match=r"pip install 'd-emo\[timm\]'"):
        deit_tiny()
    pvt_tiny(image_size=32)
