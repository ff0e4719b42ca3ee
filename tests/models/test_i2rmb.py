"""The spanning window attention and the i2RMB block."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.golden import golden, seeded_input, seeded_weight
from helpers.models import randomize

from d_emo.models import I2RMB, SpanningWindowAttention


def published_attention(attention_type: str) -> tuple[SpanningWindowAttention, dict]:
    expected = golden(f"attention_{attention_type}")
    attention = SpanningWindowAttention(64, 4, expansion=4, window_size=8, attention_type=attention_type)
    weights = {name: seeded_weight(name, tuple(shape)) for name, shape in expected["shapes"].items()}
    attention.load_state_dict(
        {
            "to_qkv.weight": torch.cat([weights["qk.conv.weight"], weights["v.conv.weight"]]).flatten(1),
            "to_qkv.bias": torch.cat([weights["qk.conv.bias"], weights["v.conv.bias"]]),
        }
    )
    return attention, expected


@pytest.mark.parametrize("attention_type", ["neighborhood", "remote", "spanning"])
@torch.no_grad()
def test_attention_equals_the_published_module_to_1e_5(attention_type):
    attention, expected = published_attention(attention_type)
    output = attention(seeded_input(11, (2, 64, 16, 16)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert list(output.shape) == expected["output_shape"]
    torch.testing.assert_close(
        output[0, :8, 3, 5], torch.tensor(expected["output_0_first8_channels_at_3_5"]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        output[1, 200, 9], torch.tensor(expected["output_1_channel_200_row_9"]), atol=1e-5, rtol=0
    )
    assert output.mean().item() == pytest.approx(expected["output_mean"], abs=1e-5)
    assert output.std(correction=0).item() == pytest.approx(expected["output_std"], abs=1e-5)


def masked_attention(attention: SpanningWindowAttention, tokens: torch.Tensor) -> torch.Tensor:
    """An independent restatement: full attention over the padded grid under a mask of which tokens share a window."""
    batch, height, width, dim = tokens.shape
    side_h, side_w = (min(attention.window_size, n) if attention.clip_window else attention.window_size
                      for n in (height, width))  # fmt: skip
    padded_h, padded_w = math.ceil(height / side_h) * side_h, math.ceil(width / side_w) * side_w
    padded = torch.zeros(batch, padded_h, padded_w, dim, dtype=tokens.dtype)
    padded[:, :height, :width] = tokens
    projected = attention.to_qkv(padded).flatten(1, 2)
    row = torch.arange(padded_h).repeat_interleave(padded_w)
    column = torch.arange(padded_w).repeat(padded_h)
    adjacent = row // side_h * padded_w + column // side_w
    distant = row % (padded_h // side_h) * padded_w + column % (padded_w // side_w)
    groups = {"neighborhood": [adjacent], "remote": [distant], "spanning": [adjacent, distant]}
    heads, head_dim = attention.num_heads, dim // attention.num_heads
    total = 0
    for group in groups[attention.attention_type]:
        mask = group[:, None] == group[None]
        outputs = []
        for head in range(heads):
            query = projected[..., head * head_dim : (head + 1) * head_dim]
            key = projected[..., dim + head * head_dim : dim + (head + 1) * head_dim]
            value_dim = attention.inner_dim // heads
            value = F.gelu(projected[..., 2 * dim + head * value_dim : 2 * dim + (head + 1) * value_dim])
            scores = (query @ key.transpose(1, 2) / math.sqrt(head_dim)).masked_fill(~mask, float("-inf"))
            outputs.append(scores.softmax(-1) @ value)
        total = total + torch.cat(outputs, -1)
    return total.view(batch, padded_h, padded_w, -1)[:, :height, :width]


@pytest.mark.parametrize("attention_type", ["neighborhood", "remote", "spanning"])
@pytest.mark.parametrize("clip_window", [True, False])
@pytest.mark.parametrize("grid", [(8, 8), (12, 8), (7, 10), (3, 9), (4, 4), (1, 5)])
def test_attention_equals_masked_full_attention_on_any_grid(attention_type, clip_window, grid):
    attention = SpanningWindowAttention(16, 2, 3, 4, attention_type, clip_window).double()
    randomize(attention)
    tokens = torch.randn(2, *grid, 16, dtype=torch.float64)
    torch.testing.assert_close(attention(tokens), masked_attention(attention, tokens), atol=1e-12, rtol=1e-10)


def test_attention_none_passes_the_expanded_values():
    attention = SpanningWindowAttention(16, 2, 3, 4, "none")
    tokens = torch.randn(1, 5, 6, 16)
    assert attention.to_qkv.out_features == 48
    torch.testing.assert_close(attention(tokens), F.gelu(attention.to_qkv(tokens)))


def test_gradients_reach_query_key_and_value():
    attention = SpanningWindowAttention(16, 2, 3, 4).double()
    tokens = torch.randn(1, 8, 8, 16, dtype=torch.float64)
    attention(tokens).square().sum().backward()
    query, key, value = attention.to_qkv.weight.grad.split((16, 16, 48))
    assert all(part.abs().max() > 1e-6 for part in (query, key, value))


def test_block_equals_its_formula():
    block = I2RMB(16, 2, expansion=3, window_size=4, kernel_size=5).double()
    randomize(block)
    block.eval()
    tokens = torch.randn(2, 8, 8, 16, dtype=torch.float64)
    attended = block.attn(tokens).permute(0, 3, 1, 2)
    norm = block.conv_norm
    local = F.conv2d(attended, block.conv.weight, padding=2, groups=48)
    local = (local - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + 1e-6).sqrt()
    local = local * norm.weight[:, None, None] + norm.bias[:, None, None]
    expected = (attended + local * torch.sigmoid(local)).permute(0, 2, 3, 1) @ block.proj_out.weight.T
    torch.testing.assert_close(block(tokens), expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 16, "num_heads": 3}, "num_heads=3 does not divide 16"),
        (
            {"dim": 16, "num_heads": 2, "attention_type": "global"},
            "attention_type='global' is not one of none, neigh",
        ),
        ({"dim": 16, "num_heads": 2, "kernel_size": 4}, "kernel_size=4 is not an odd whole number from 1 to 63"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        I2RMB(**arguments)
