"""The encoder-decoder of U-EMOv2 and the plain UNet, against mmsegmentation's outputs and networks spelled out."""

import pytest
import torch
import torch.nn.functional as F
from helpers.segmenters import awake

from d_emo.segmentation.unet import UNet

BLOCKS = ("i2rmb", "conv")


def small(block: str, **changes) -> UNet:
    return UNet(block, **{"base_channels": 8, "depth": 3, "head_dim": 4, "window_size": 4, **changes})


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("block", "parameters"), [("i2rmb", 21_281_728), ("conv", 28_949_568)])
def test_bodies_have_the_published_parameters(block, parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in UNet(block).parameters()) == parameters


def by_mmsegmentations_name(name: str) -> str:
    part, number, kind, *_ = name.split(".")
    if part == "encoder":
        _, number, _, _, unit, *rest = name.split(".")
        return ".".join(("encoder", number, "blocks", unit, *rest))
    stage = f"decoder.{3 - int(number)}"
    if kind == "upsample":
        return f"{stage}.reduce." + name.split("interp_upsample.1.")[1]
    return f"{stage}.pair.blocks." + name.split("convs.")[1]


def test_the_plain_unet_gives_mmsegmentations_output(shared):
    golden = torch.load(shared / "golden" / "dense_heads.pt", weights_only=True)
    network = UNet("conv", base_channels=4).eval()
    network.load_state_dict({by_mmsegmentations_name(n): t for n, t in golden["unet"]["state"].items()})
    with torch.no_grad():
        finest = network(golden["pixels"])[-1]
    torch.testing.assert_close(finest, golden["unet"]["output"], atol=1e-5, rtol=0)


def unit(state: dict, prefix: str, features: torch.Tensor) -> torch.Tensor:
    weight = state[f"{prefix}.conv.weight"]
    features = F.conv2d(features, weight, padding=weight.shape[-1] // 2)
    statistics = state[f"{prefix}.bn.running_mean"], state[f"{prefix}.bn.running_var"]
    return F.relu(F.batch_norm(features, *statistics, state[f"{prefix}.bn.weight"], state[f"{prefix}.bn.bias"]))


def attend(query_key_value: torch.Tensor, heads: int, channels: int, window: int) -> torch.Tensor:
    """(H, W, 2C + E) -> (H, W, E): each token asks those of its own window, and those at its window's strides."""
    height, width, _ = query_key_value.shape
    query, key, value = query_key_value.split((channels, channels, query_key_value.shape[-1] - 2 * channels), dim=-1)
    value, total = F.gelu(value), 0
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    near = (y // window) * width + x // window
    far = (y % (height // window)) * width + x % (width // window)
    for group in (near.flatten(), far.flatten()):
        q, k, v = (part.reshape(height * width, heads, -1).transpose(0, 1) for part in (query, key, value))
        scores = q @ k.transpose(1, 2) / (channels // heads) ** 0.5  # (heads, H W, H W)
        scores = scores.masked_fill(group[:, None] != group[None, :], -torch.inf)
        total = total + (scores.softmax(-1) @ v).transpose(0, 1).reshape(height, width, -1)
    return total


def block(state: dict, prefix: str, features: torch.Tensor, head_dim: int, window: int) -> torch.Tensor:
    """An i2RMB block on one image (1, C, H, W)."""
    channels, side = features.shape[1], features.shape[2]
    tokens = features[0].permute(1, 2, 0)  # (H, W, C)
    own = {name.removeprefix(f"{prefix}."): t for name, t in state.items() if name.startswith(f"{prefix}.")}
    normed = F.layer_norm(tokens, (channels,), own["norm.weight"], own["norm.bias"], 1e-6)
    padded = F.pad(normed, (0, 0, 0, -side % window, 0, -side % window))
    qkv = F.linear(padded, own["i2rmb.attn.to_qkv.weight"], own["i2rmb.attn.to_qkv.bias"])
    attended = attend(qkv, channels // head_dim, channels, window)[:side, :side]
    inner = attended.permute(2, 0, 1)[None]  # (1, E, H, W)
    kernel = own["i2rmb.conv.weight"]
    local = F.conv2d(inner, kernel, padding=kernel.shape[-1] // 2, groups=inner.shape[1])
    norm = (own[f"i2rmb.conv_norm.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
    local = F.silu(F.batch_norm(local, *norm, eps=1e-6))
    keeps = own["i2rmb.proj_out.weight"].shape[0] == channels
    mixed = (inner + local if keeps else local)[0].permute(1, 2, 0)
    result = F.linear(mixed, own["i2rmb.proj_out.weight"]) * own["layer_scale"]
    return (tokens + result if keeps else result).permute(2, 0, 1)[None]


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("side", [8, 16, 20])  # grids of 2 and 5 are padded up to windows of 4
@torch.no_grad()
def test_outputs_are_those_of_the_network_written_out(kind, side):
    network, image = awake(small(kind)).eval(), pixels(1, 3, side, side)
    state = network.state_dict()

    def pair(prefix: str, features: torch.Tensor) -> torch.Tensor:
        for number in (0, 1):
            name = f"{prefix}.blocks.{number}"
            features = unit(state, name, features) if kind == "conv" else block(state, name, features, 4, 4)
        return features

    first = unit(state, "encoder.0.blocks.1", unit(state, "encoder.0.blocks.0", image))
    second = pair("encoder.1", F.max_pool2d(first, 2))
    third = pair("encoder.2", F.max_pool2d(second, 2))
    expected = [third]
    for number, skip in enumerate((second, first)):
        doubled = F.interpolate(expected[-1], scale_factor=2, mode="bilinear", align_corners=False)
        joined = torch.cat((skip, unit(state, f"decoder.{number}.reduce", doubled)), dim=1)
        expected.append(pair(f"decoder.{number}.pair", joined))
    outputs = network(image)
    assert len(outputs) == 3
    for ours, theirs in zip(outputs, expected, strict=True):
        assert theirs.std() > 1e-3
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", BLOCKS)
def test_the_two_differ_in_their_pairs_alone(kind):
    with torch.device("meta"):
        state = UNet(kind).state_dict()
    shared = {name: t.shape for name, t in state.items() if name.startswith("encoder.0.") or ".reduce." in name}
    assert shared["encoder.0.blocks.1.conv.weight"] == (64, 64, 3, 3)
    assert [shared[f"decoder.{i}.reduce.conv.weight"][:2] for i in range(4)] == [
        (512, 1024),
        (256, 512),
        (128, 256),
        (64, 128),
    ]
    others = [name for name in state if name not in shared]
    assert all(("i2rmb" in name or "layer_scale" in name or ".norm." in name) == (kind == "i2rmb") for name in others)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 16, 16), (1, 48, 16), (5, 32, 64)])
def test_outputs_go_from_the_coarsest_grid_to_the_images(kind, channels, height, width):
    network = UNet(kind, channels, base_channels=4, head_dim=4).eval()
    with torch.no_grad():
        outputs = network(pixels(2, channels, height, width))
    expected = [(2, 4 * s, height // s, width // s) for s in (16, 8, 4, 2, 1)]
    assert [tuple(output.shape) for output in outputs] == expected
    assert network.channels == [shape[1] for shape in expected]


@pytest.mark.parametrize(("height", "width"), [(250, 256), (16, 8), (17, 16), (1, 1)])
def test_sides_that_are_no_multiples_of_16_are_refused_with_the_way_out(height, width):
    with pytest.raises(ValueError, match=rf"{height} x {width} .* multiples of 16; .*predict_in_windows") as raised:
        UNet("conv", base_channels=4)(pixels(1, 3, height, width))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_batch_that_ends_as_one_value_is_refused_in_training(kind):
    network = small(kind).train()
    with pytest.raises(ValueError, match="BatchNorm a single value"):
        network(pixels(1, 3, 4, 4))
    network.eval()(pixels(1, 3, 4, 4))
    network.train()(pixels(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": "resnet"}, "block='resnet' is not one of i2rmb, conv"),
        ({"depth": 1}, "depth=1 is not a whole number from 2 to 8"),
        ({"base_channels": 0}, "base_channels=0 is not"),
        ({"head_dim": 32}, r"head_dim=32 cuts 8 channels .* into no whole heads; choose a divisor of base_channels=8"),
        ({"expansion": 1.3}, r"head_dim=4 cuts 32 channels and their 41 inner ones"),
        ({"expansion": 0.01}, "expansion=0.01 leaves no inner channel"),
        ({"base_channels": 65_536}, "more than 1e.10 parameters"),
        ({"kernel_size": 4}, "kernel_size=4 is not an odd"),
        ({"window_size": 0}, "window_size=0 is not"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(change, message):
    with pytest.raises(ValueError, match=message) as raised:
        small(**{"block": "i2rmb", **change})
    assert "\n" not in str(raised.value)


def test_heads_say_nothing_to_the_plain_unet():
    assert small("conv", head_dim=32).channels == [32, 16, 8]
