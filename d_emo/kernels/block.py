"""The block from end to end, as one operation where there is one."""

import torch
from torch import nn

from .attention import Windows, window_attention
from .fused import infer_block
from .linear import apply_linear, linear_and_bias
from .local import fusible, local_branch
from .training import train_block


def whole_block(
    hidden_states: torch.Tensor,
    to_qkv: nn.Module,
    windows: Windows,
    conv: nn.Module,
    norm: nn.Module,
    proj_out: nn.Module,
) -> torch.Tensor:
    """`proj_out(local_branch(window_attention(to_qkv(x), windows), conv, norm))`.

    Args:
        hidden_states: x, (B, H, W, C).
        to_qkv: `nn.Linear` to 2C + E channels, or a module in its place.
        windows: how the grid is cut, without padding.
        conv, norm: see `local_branch`.
        proj_out: `nn.Linear` from E channels without a bias, or a module in its place.

    Returns:
        (B, H, W, O).
    """
    if hidden_states.device.type == "cpu" and fusible(hidden_states, conv, norm):
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        if not torch.is_grad_enabled() and not norm.training:
            return infer_block(hidden_states, to_qkv, windows, conv, norm, proj_out)
        trained = train_block(hidden_states, to_qkv, windows, conv, norm, proj_out)
        if trained is not None:
            return trained
    qkv, bias = linear_and_bias(to_qkv, hidden_states)  # (B, H, W, 2C + E)
    attended = window_attention(qkv, bias, windows)  # (B, H, W, E)
    return apply_linear(proj_out, local_branch(attended, conv, norm))  # (B, H, W, O)
