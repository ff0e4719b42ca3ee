"""Counting as the paper does: each rule on cases added up by hand, and Table II's formulas on real modules."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d_emo.models.flops import (
    PublishedMacs,
    count_macs_as_published,
    count_parameters,
    macs_of,
    published_module_costs,
)
from d_emo.models.i2rmb import I2RMB, SpanningWindowAttention


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def counted(module, *shape, device="cpu"):
    module = module if isinstance(module, nn.Module) else Call(module)
    return count_macs_as_published(module.to(device), torch.zeros(*shape, device=device))


MAP = (2, 3, 4, 6)  # 144 values
RULES = {
    "BatchNorm": (nn.BatchNorm2d(3), MAP, PublishedMacs(0, 2 * 144, 0)),
    "BatchNorm without weights": (nn.BatchNorm2d(3, affine=False), MAP, PublishedMacs(0, 144, 0)),
    "BatchNorm of volumes": (nn.BatchNorm3d(3), (2, 3, 2, 4, 6), PublishedMacs(0, 2 * 288, 0)),
    "LayerNorm": (nn.LayerNorm(6), MAP, PublishedMacs(0, 5 * 144, 0)),
    "LayerNorm without weights": (nn.LayerNorm(6, elementwise_affine=False), MAP, PublishedMacs(0, 4 * 144, 0)),
    "a LayerNorm that is called as a function": (
        lambda x: F.layer_norm(x, (6,), bias=None, weight=torch.ones(6, device=x.device)),
        MAP,
        PublishedMacs(0, 5 * 144, 0),
    ),
    "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), MAP, PublishedMacs(0, 0, 4 * 576)),
    "bilinear, positional": (lambda x: F.interpolate(x, (8, 12), None, "bilinear"), MAP, PublishedMacs(0, 0, 4 * 576)),
    "bilinear to the same size": (
        lambda x: F.interpolate(x, size=(4, 6), mode="bilinear"), MAP, PublishedMacs(0, 0, 4 * 144)
    ),
    "nearest": (nn.UpsamplingNearest2d(scale_factor=2), MAP, PublishedMacs(0, 0, 576)),
    "nearest to the same size": (lambda x: F.interpolate(x, size=(4, 6)), MAP, PublishedMacs(0, 0, 144)),
    "adaptive pooling": (nn.AdaptiveAvgPool2d(2), MAP, PublishedMacs(0, 0, 144)),
    "adaptive pooling to a row": (nn.AdaptiveAvgPool2d((1, 3)), MAP, PublishedMacs(0, 0, 144)),
    "adaptive pooling of volumes": (nn.AdaptiveAvgPool3d((2, 1, 1)), (2, 3, 2, 4, 6), PublishedMacs(0, 0, 288)),
    "adaptive pooling to one value, a mean": (nn.AdaptiveAvgPool2d(1), MAP, PublishedMacs(0, 0, 0)),
    "a mean": (lambda x: x.mean((2, 3)), MAP, PublishedMacs(0, 0, 0)),
    "a mean by pooling": (nn.AvgPool2d(2), MAP, PublishedMacs(0, 0, 0)),
    "activation and softmax": (lambda x: F.gelu(x).softmax(-1) + x, MAP, PublishedMacs(0, 0, 0)),
    "a convolution with bias": (nn.Conv2d(3, 5, 3, padding=1), MAP, PublishedMacs(2 * 24 * 5 * 3 * 9, 0, 0)),
    "a convolution of volumes": (nn.Conv3d(3, 5, 1), (2, 3, 2, 4, 6), PublishedMacs(2 * 48 * 5 * 3, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_give_what_is_added_up_by_hand(rule, device):
    module, shape, expected = RULES[rule]
    if isinstance(module, nn.Module):
        module = module.to_empty(device=device)
    assert counted(module, *shape, device=device) == expected


def test_a_frozen_batch_norm_counts_as_one():
    from torchvision.ops import FrozenBatchNorm2d

    assert counted(FrozenBatchNorm2d(3), *MAP) == PublishedMacs(0, 2 * 144, 0)


def test_parts_are_added_up_to_the_total():
    network = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Upsample(scale_factor=2))
    result = counted(network, 1, 3, 2, 2)
    assert result == PublishedMacs(4 * 12, 2 * 16, 64)
    assert result.total == 48 + 32 + 64


def test_counting_leaves_the_mode_and_no_hook():
    network = nn.Sequential(SpanningWindowAttention(8, 2, 2.0, 2)).train()
    counted(network, 1, 2, 2, 8)
    assert network.training and not network[0]._forward_hooks


def test_a_single_window_counts_twice_whatever_class_says_so():
    """One block on one window of 2 x 2, added up by hand; then a module of another class with the same method."""
    block = I2RMB(8, 2, 3.0, window_size=2, kernel_size=3)
    tokens, dim, inner = 4, 8, 24
    products = tokens * (dim * (2 * dim + inner) + inner * dim + 9 * inner) + 2 * tokens**2 * (dim + inner)
    assert counted(block, 1, 2, 2, dim) == PublishedMacs(products, 2 * tokens * inner, 0)

    class Volume(nn.Linear):
        def macs_saved(self, batch, frames, height, width, channels):
            return 1000 * batch * frames + height * width * channels

    assert counted(Volume(3, 1, bias=False), 2, 5, 4, 6, 3) == PublishedMacs(240 * 3 + 10_000 + 72, 0, 0)


C, SIDE, WINDOW, KERNEL, GROUPS = 12, 8, 4, 5, 3
COSTS = published_module_costs(C, SIDE, WINDOW, KERNEL, GROUPS)
# An entry of an attention matrix: exponential, sum, division. PyTorch's counter, which gives the rest, knows none.
SOFTMAX = 3


def test_table_ii_attention_is_torchs_attention_and_its_softmax():
    attention = nn.MultiheadAttention(C, 1, batch_first=True)
    tokens = torch.zeros(1, SIDE**2, C)
    flops = 2 * macs_of(lambda: attention(tokens, tokens, tokens)) + SOFTMAX * SIDE**4
    assert (count_parameters(attention), flops) == (COSTS["attention"].parameters, COSTS["attention"].flops)


@pytest.mark.parametrize("kind", ["neighborhood", "remote"])
def test_table_ii_window_attention_is_this_packages_with_a_projection(kind):
    attention = nn.Sequential(SpanningWindowAttention(C, 1, 1.0, WINDOW, kind), nn.Linear(C, C))
    flops = 2 * macs_of(lambda: attention(torch.zeros(1, SIDE, SIDE, C))) + SOFTMAX * SIDE**2 * WINDOW**2
    expected = COSTS["window attention"]
    assert (count_parameters(attention), flops) == (expected.parameters, expected.flops)


@pytest.mark.parametrize(("name", "groups"), [("convolution", GROUPS), ("depthwise convolution", C)])
def test_table_ii_convolutions_are_torchs(name, groups):
    conv = nn.Conv2d(C, C, KERNEL, padding=KERNEL // 2, groups=groups)
    flops = 2 * macs_of(lambda: conv(torch.zeros(1, C, SIDE, SIDE)))
    assert (count_parameters(conv), flops) == (COSTS[name].parameters, COSTS[name].flops)
