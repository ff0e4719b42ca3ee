"""Variants of D-EMOv2's definition, each with one thing changed that parameter counts cannot decide.

A variant is a change of a fresh network in place, before its first step. Shapes: see d_emo/models/i2rmb.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from d_emo.kernels import local_branch
from d_emo.kernels.reference import merge_windows, split_windows
from d_emo.models import I2RMB


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What is changed.

    Attributes:
        about: a line for the table.
        overrides: of the network's configuration.
        change: of the network, in place.
    """

    about: str
    overrides: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Any], None] | None = None


# ---- changes of the weights ------------------------------------------------------------------------------------------


def _of_blocks(change: Callable[[I2RMB], None]) -> Callable[[Any], None]:
    """A change of every block's inside as one of the network."""

    def change_network(network: Any) -> None:
        for block in network.blocks:
            change(block.i2rmb)

    return change_network


def _fresh_qkv(block: I2RMB) -> None:
    block.attn.to_qkv.reset_parameters()


def _fresh_proj_out(block: I2RMB) -> None:
    block.proj_out.reset_parameters()


def _fresh_both(block: I2RMB) -> None:
    _fresh_qkv(block)
    _fresh_proj_out(block)


def _epsilon(value: float) -> Callable[[I2RMB], None]:
    def change(block: I2RMB) -> None:
        block.conv_norm.eps = value

    return change


# ---- changes of the normalisation ------------------------------------------------------------------------------------


class RunningNorm(nn.Module):
    """BatchNorm by its running statistics also in training: no gradient, and next to no noise, of the batch.

    Args:
        norm: gives weights and epsilon.
        momentum: share of a batch in the running statistics.
    """

    def __init__(self, norm: nn.BatchNorm2d, momentum: float):
        super().__init__()
        self.norm, self.momentum = norm, momentum

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, E, H, W) -> (B, E, H, W)."""
        mean, variance, seen = self.norm.running_mean, self.norm.running_var, self.norm.num_batches_tracked
        assert mean is not None
        assert variance is not None
        assert seen is not None
        if self.training:
            with torch.no_grad():
                variance_now, mean_now = torch.var_mean(hidden_states.float(), dim=(0, 2, 3))
                # The first batch's statistics take the place of none.
                share = torch.where(seen == 0, 1.0, self.momentum)
                mean.lerp_(mean_now, share)
                variance.lerp_(variance_now, share)
                seen.add_(1)
        # A copy: the next step changes the statistics.
        mean, variance = mean.clone(), variance.clone()
        return F.batch_norm(hidden_states, mean, variance, self.norm.weight, self.norm.bias, eps=self.norm.eps)


def _running_norm(block: I2RMB) -> None:
    block.conv_norm = RunningNorm(block.conv_norm, momentum=0.1)  # type: ignore[assignment]


def _image_norm(block: I2RMB) -> None:
    norm = block.conv_norm
    block.conv_norm = nn.GroupNorm(norm.num_features, norm.num_features, eps=norm.eps)  # type: ignore[assignment]


def _no_norm(block: I2RMB) -> None:
    block.conv_norm = nn.Identity()  # type: ignore[assignment]


# ---- changes of the block --------------------------------------------------------------------------------------------


class GeluLater(nn.Module):
    """The inside of a block whose GELU comes after the attention instead of on its values."""

    def __init__(self, block: I2RMB):
        super().__init__()
        self.block = block

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        block, attn = self.block, self.block.attn
        window = attn.window(*hidden_states.shape[1:3])
        query, key, value = attn.to_qkv(hidden_states).split((attn.dim, attn.dim, attn.inner_dim), dim=-1)
        query = query / math.sqrt(attn.dim // attn.num_heads)
        attended = torch.zeros_like(value)  # (B, H, W, E)
        for remote in (False, True):
            q, k, v = (split_windows(x, window, attn.num_heads, remote) for x in (query, key, value))
            seen = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(dim=-1).to(v.dtype), v)
            attended = attended + merge_windows(seen, value.shape[:3], window, attn.num_heads, remote)
        return block.proj_out(local_branch(F.gelu(attended), block.conv, block.conv_norm))


class Modulated(nn.Module):
    """A block of D-EMOv2, modulated elsewhere.

    Args:
        block: the block as it is defined.
        where: "output", x + gate * (f(norm(x)) * (1 + scale) + shift), or "gate", x + gate * f(norm(x)).
    """

    def __init__(self, block: Any, where: str):
        super().__init__()
        self.block, self.where = block, where

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """(B, h, w, D) and (B, D) -> (B, h, w, D)."""
        block = self.block
        shift, scale, gate = block.modulation(F.silu(conditioning))[:, None, None].chunk(3, dim=-1)
        inside = block.i2rmb(block.norm(hidden_states))
        if self.where == "output":
            inside = inside * (1 + scale) + shift
        return hidden_states + gate * inside


class RoundedStream(nn.Module):
    """A block after which the residual stream is rounded to bfloat16, as where it is kept in that type."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """(B, h, w, D) and (B, D) -> (B, h, w, D)."""
        return self.block(hidden_states, conditioning).bfloat16().to(hidden_states.dtype)


def _replaced(make: Callable[[Any], nn.Module]) -> Callable[[Any], None]:
    """Other blocks around those that there are."""

    def change(network: Any) -> None:
        network.blocks = nn.ModuleList(make(block) for block in network.blocks)

    return change


def _gelu_later(network: Any) -> None:
    for block in network.blocks:
        block.i2rmb = GeluLater(block.i2rmb)


AS_DEFINED = "as defined"
VARIANTS: dict[str, Variant] = {
    AS_DEFINED: Variant(about=""),
    "qkv: PyTorch's": Variant(about="to_qkv's initial weights, not Xavier's", change=_of_blocks(_fresh_qkv)),
    "proj_out: PyTorch's": Variant(about="proj_out likewise", change=_of_blocks(_fresh_proj_out)),
    "both: PyTorch's": Variant(about="both, as in the published classifiers", change=_of_blocks(_fresh_both)),
    "eps 1e-5": Variant(about="BatchNorm's epsilon, PyTorch's", change=_of_blocks(_epsilon(1e-5))),
    "eps 1e-3": Variant(about="BatchNorm's epsilon, Keras's", change=_of_blocks(_epsilon(1e-3))),
    "running statistics": Variant(about="averaged ones normalise, momentum 0.1", change=_of_blocks(_running_norm)),
    "an image's statistics": Variant(about="of every image and channel (InstanceNorm)", change=_of_blocks(_image_norm)),
    "no norm": Variant(about="none after the convolution", change=_of_blocks(_no_norm)),
    "GELU later": Variant(about="after the attention, not on its values", change=_gelu_later),
    "modulated after": Variant(
        about="shift and scale after the block", change=_replaced(lambda block: Modulated(block, "output"))
    ),
    "gate only": Variant(about="neither shift nor scale", change=_replaced(lambda block: Modulated(block, "gate"))),
    "bfloat16 stream": Variant(about="the residual stream rounded after each block", change=_replaced(RoundedStream)),
    "neighborhood": Variant(about="neighborhood windows only", overrides={"attention_type": "neighborhood"}),
    "remote": Variant(about="remote windows only", overrides={"attention_type": "remote"}),
    "no attention": Variant(about="values only", overrides={"attention_type": "none"}),
    "one window": Variant(about="a window over the whole grid", overrides={"window_size": 64}),
    "kernel 3": Variant(about="a depthwise convolution of 3 x 3", overrides={"kernel_size": 3}),
    "kernel 7": Variant(about="of 7 x 7", overrides={"kernel_size": 7}),
}  # fmt: skip
