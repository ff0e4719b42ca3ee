"""Decode heads against mmsegmentation's outputs, and against what other libraries have of the same layers."""

import pytest
import torch
from helpers.golden import golden, seeded_input, seeded_state
from helpers.mmseg_names import ours
from torchvision.models.segmentation.deeplabv3 import ASPP
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetPyramidPoolingModule

from d_emo.segmentation.heads import (
    AuxiliaryHead,
    DeepLabv3Head,
    PSPHead,
    SegformerHead,
    SemanticFPNHead,
    feature_pyramid,
)

HEADS = ("deeplabv3", "pspnet", "segformer", "auxiliary", "fpn_neck", "fpn_head")


def build(name, widths, channels, classes):
    """A head by mmsegmentation's name, in eval mode."""
    made = {
        "deeplabv3": lambda: DeepLabv3Head(widths[3], classes, channels),
        "pspnet": lambda: PSPHead(widths[3], classes, channels),
        "segformer": lambda: SegformerHead(widths, classes, channels),
        "auxiliary": lambda: AuxiliaryHead(widths[2], classes, channels),
        "fpn_neck": lambda: feature_pyramid(widths, channels),
        "fpn_head": lambda: SemanticFPNHead(channels, classes, channels),
    }
    return made[name]().eval()


@torch.no_grad()
def answer(name, heads, maps):
    """A head's output on four maps; that of the neck is its finest level."""
    if name in ("fpn_neck", "fpn_head"):
        levels = list(heads["fpn_neck"]({str(number): level for number, level in enumerate(maps)}).values())
        return levels[0] if name == "fpn_neck" else heads["fpn_head"](levels)
    if name == "segformer":
        return heads[name](maps)
    return heads[name](maps[2 if name == "auxiliary" else 3])


@pytest.mark.parametrize("name", HEADS)
def test_heads_give_mmsegmentations_outputs_on_odd_grids(name):
    expected = golden("dense_heads")
    maps = [seeded_input(number, tuple(shape)) for number, shape in enumerate(expected["maps"])]
    if name == "deeplabv3":  # every dilation reaches inside
        maps[3] = seeded_input(9, tuple(expected["wide_map"]))
    heads = {key: build(key, [2, 3, 4, 5], 3, 2) for key in HEADS}
    for key, head in heads.items():
        head.load_state_dict(ours(key, seeded_state(expected["heads"][key]["shapes"])))
    output, wanted = answer(name, heads, maps), expected["heads"][name]
    assert list(output.shape) == wanted["output_shape"]
    values = torch.tensor(wanted["values"])
    assert values.std() > 0.05
    torch.testing.assert_close(output.flatten()[:: wanted["step"]], values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_heads_give_the_shared_outputs(name, shared):
    stored = torch.load(shared / "golden" / "dense_heads.pt", weights_only=True)
    heads = {key: build(key, [8, 12, 16, 24], 16, 5) for key in HEADS}
    for key, head in heads.items():
        head.load_state_dict(ours(key, stored[key]["state"]))
    output = answer(name, heads, stored["maps"])
    torch.testing.assert_close(output, stored[name]["output"], atol=1e-5, rtol=1e-5)


def test_an_unknown_name_of_mmsegmentations_is_no_tensor_of_ours():
    with pytest.raises(KeyError, match=r"psp_modules\.0\.1\.conv\.weight"):
        ours("deeplabv3", {"psp_modules.0.1.conv.weight": torch.ones(1)})


def lively(head):
    """A head in eval mode, whose outputs depend on its input."""
    head.load_state_dict(seeded_state({name: list(tensor.shape) for name, tensor in head.state_dict().items()}))
    return head.eval()


# ---- other libraries -------------------------------------------------------------------------------------------------


def unit_state(unit, conv, norm):
    """A unit's tensors under another library's names of its two layers."""
    state = unit.state_dict()
    return {name.replace("conv.", f"{conv}.").replace("bn.", f"{norm}."): tensor for name, tensor in state.items()}


def test_the_atrous_branches_are_torchvisions():
    head = lively(DeepLabv3Head(6, 3, 4))
    theirs = ASPP(6, [12, 24, 36], 4).eval()
    for branch, own in zip(theirs.convs, [*head.branches, head.pooled], strict=True):
        layers = [layer for layer in branch if isinstance(layer, torch.nn.Conv2d | torch.nn.BatchNorm2d)]
        for layer, mine in zip(layers, (own.conv, own.bn), strict=True):
            layer.load_state_dict(mine.state_dict())
    theirs.project = torch.nn.Identity()
    features = seeded_input(0, (2, 6, 30, 26))
    with torch.no_grad():
        *branches, average = theirs(features).split(4, dim=1)
        joined = torch.cat([average, *branches], dim=1)  # torchvision's average comes last
        torch.testing.assert_close(head(features), head.classifier(head.bottleneck(joined)), atol=1e-5, rtol=1e-5)
    assert head.bottleneck.conv.kernel_size == (3, 3)


def test_the_pyramid_pooling_is_transformers():
    head = lively(PSPHead(6, 3, 4))
    theirs = UperNetPyramidPoolingModule((1, 2, 3, 6), 6, 4, align_corners=False).eval()
    for block, branch in zip(theirs.blocks, head.branches, strict=True):
        block.layers[1].load_state_dict(unit_state(branch, "conv", "batch_norm"))
    features = seeded_input(0, (2, 6, 9, 13))
    with torch.no_grad():
        joined = torch.cat([features, *theirs(features)], dim=1)
        torch.testing.assert_close(head(features), head.classifier(head.bottleneck(joined)), atol=1e-5, rtol=1e-5)


def test_the_auxiliary_head_is_transformers():
    head = lively(AuxiliaryHead(6, 3, 4))
    config = UperNetConfig(auxiliary_in_channels=6, auxiliary_channels=4, num_labels=3)
    theirs = UperNetFCNHead(config, [6]).eval()
    theirs.convs[0].load_state_dict(unit_state(head.unit, "conv", "batch_norm"))
    theirs.classifier.load_state_dict(head.classifier.state_dict())
    features = seeded_input(0, (2, 6, 9, 13))
    with torch.no_grad():
        torch.testing.assert_close(head(features), theirs([None, None, features]), atol=1e-6, rtol=1e-6)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["deeplabv3", "pspnet"])
def test_one_image_leaves_pooled_branches_a_single_value(name):
    head, features = build(name, [2, 3, 4, 5], 3, 2), seeded_input(0, (1, 5, 8, 8))
    assert head(features).shape == (1, 2, 8, 8)
    with pytest.raises(ValueError, match=r"^a batch of 1 image leaves BatchNorm a single value .*pass 2 images"):
        head.train()(features)
    assert head(seeded_input(0, (2, 5, 8, 8))).shape == (2, 2, 8, 8)
    for module in head.modules():  # frozen statistics: nothing is learned from the batch
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    assert head(features).shape == (1, 2, 8, 8)


@pytest.mark.parametrize("name", ["deeplabv3", "pspnet", "segformer", "auxiliary", "fpn_head"])
def test_whole_channels_are_dropped_before_the_classifier(name):
    head = lively(build(name, [2, 3, 4, 5], 64, 2))
    assert head.dropout.p == 0.1
    head.dropout.p = 0.5
    head.dropout.train()
    seen = {}
    head.dropout.register_forward_hook(lambda module, args, output: seen.update(before=args[0], after=output))
    head.classifier.register_forward_hook(lambda module, args, output: seen.update(classified=args[0]))
    widths = {"fpn_head": [64] * 4, "segformer": [2, 3, 4, 5], "auxiliary": [4]}.get(name, [5])
    maps = [seeded_input(number, (1, width, 8, 8)) for number, width in enumerate(widths)]
    head(maps if len(maps) > 1 else maps[0])
    kept = (seen["after"] != 0).flatten(2).any(2)[0]
    assert 10 < kept.sum() < 54
    torch.testing.assert_close(seen["after"][:, kept], seen["before"][:, kept] * 2)
    assert seen["classified"] is seen["after"]
