"""What lies around a block: LayerNorm modulated by the conditioning, and the gated residual.

Shapes: B batch, H x W token grid, D channels.
"""

import torch
from torch import nn

from . import cpu
from .backend import fast_path, is_plain

UNIT_ROWS = 32  # of an image, that a thread works on at a time


def modulated_norm(
    norm: nn.Module, hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """norm(x) * (1 + scale) + shift.

    Args:
        norm: `nn.LayerNorm` over D channels, or a module in its place.
        hidden_states: x, (B, H, W, D).
        shift, scale: (B, D).

    Returns:
        (B, H, W, D).
    """
    if not _has_kernel(hidden_states) or not _normalises_channels(norm, hidden_states.shape[-1]):
        return torch.addcmul(shift[:, None, None], norm(hidden_states), 1 + scale[:, None, None])
    assert isinstance(norm, nn.LayerNorm)
    return _norm(hidden_states, shift, scale, norm.weight, norm.bias, norm.eps)


def gated_sum(hidden_states: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """hidden_states + gate * branch; tensors of (B, H, W, D), and the gate (B, D)."""
    if not _has_kernel(hidden_states) or branch.dtype != hidden_states.dtype:
        return torch.addcmul(hidden_states, gate[:, None, None], branch)
    return _gated(hidden_states, gate.to(cpu.arithmetic(hidden_states.dtype)), branch)


def _has_kernel(hidden_states: torch.Tensor) -> bool:
    return hidden_states.device.type == "cpu" and fast_path(hidden_states)


def _normalises_channels(norm: nn.Module, channels: int) -> bool:
    return isinstance(norm, nn.LayerNorm) and is_plain(norm, nn.LayerNorm) and norm.normalized_shape == (channels,)


# ---- the operators -------------------------------------------------------------------------------------------------


def _shape(hidden_states: torch.Tensor, eps: float = 0.0) -> cpu.ModulationShape:
    batch, height, width, channels = hidden_states.shape
    return cpu.ModulationShape(batch, height * width, channels, UNIT_ROWS, eps)


def _partial_sums(hidden_states: torch.Tensor) -> torch.Tensor:
    """Room for sums over the rows of every image, in parts: (B, parts, D)."""
    batch, height, width, channels = hidden_states.shape
    parts = -(-height * width // UNIT_ROWS)
    return hidden_states.new_empty(batch, parts, channels, dtype=cpu.arithmetic(hidden_states.dtype))


@torch.library.custom_op("d_emo::modulated_norm", mutates_args=(), device_types="cpu")
def _norm(
    hidden_states: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """LayerNorm with its weight and bias, times 1 + scale, plus shift; both (B, D)."""
    hidden_states, kind = hidden_states.contiguous(), cpu.arithmetic(hidden_states.dtype)
    gain, offset = 1 + scale.to(kind), shift.to(kind)  # (B, D) each
    if bias is not None:
        offset = torch.addcmul(offset, gain, bias.to(kind))
    if weight is not None:
        gain = gain * weight.to(kind)
    out = torch.empty_like(hidden_states)
    cpu.call("modulation", "norm_forward", out.dtype, _shape(out, eps), hidden_states, gain, offset.contiguous(), out)
    return out


@torch.library.custom_op("d_emo::modulated_norm_backward", mutates_args=(), device_types="cpu")
def _norm_backward(
    grad: torch.Tensor,
    hidden_states: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> list[torch.Tensor]:
    """Gradients of x, shift and scale, and of weight and bias as far as there are any."""
    hidden_states, grad = hidden_states.contiguous(), grad.to(hidden_states.dtype).contiguous()
    kind = cpu.arithmetic(grad.dtype)
    factor = 1 + scale.to(kind)  # (B, D)
    gain = factor if weight is None else factor * weight.to(kind)
    grad_hidden = torch.empty_like(hidden_states)
    grad_gain, grad_offset = _partial_sums(hidden_states), _partial_sums(hidden_states)
    tensors = (hidden_states, gain.contiguous(), grad, grad_hidden, grad_gain, grad_offset)
    cpu.call("modulation", "norm_backward", grad.dtype, _shape(grad, eps), *tensors)
    grad_gain, grad_offset = grad_gain.sum(1), grad_offset.sum(1)  # (B, D) each
    grad_scale = grad_gain if weight is None else grad_gain * weight.to(kind)
    if bias is not None:
        grad_scale = torch.addcmul(grad_scale, grad_offset, bias.to(kind))
    grads = [grad_hidden, grad_offset.to(scale.dtype), grad_scale.to(scale.dtype)]
    if weight is not None:
        grads.append((grad_gain * factor).sum(0).to(weight.dtype))
    if bias is not None:
        grads.append((grad_offset * factor).sum(0).to(bias.dtype))
    return grads


@torch.library.custom_op("d_emo::gated_sum", mutates_args=(), device_types="cpu")
def _gated(hidden_states: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """hidden_states + gate * branch, the gate (B, D) in the arithmetic type."""
    hidden_states = hidden_states.contiguous()
    out = torch.empty_like(hidden_states)
    tensors = (hidden_states, gate.contiguous(), branch.contiguous(), out)
    cpu.call("modulation", "gated_forward", out.dtype, _shape(out), *tensors)
    return out


@torch.library.custom_op("d_emo::gated_sum_backward", mutates_args=(), device_types="cpu")
def _gated_backward(grad: torch.Tensor, gate: torch.Tensor, branch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the gate and of the branch."""
    branch, grad = branch.contiguous(), grad.to(branch.dtype).contiguous()
    grad_branch, grad_gate = torch.empty_like(branch), _partial_sums(branch)
    tensors = (gate.contiguous(), branch, grad, grad_branch, grad_gate)
    cpu.call("modulation", "gated_backward", grad.dtype, _shape(grad), *tensors)
    return grad_gate.sum(1), grad_branch


@_norm.register_fake
def _(hidden_states, *_):
    return hidden_states.new_empty(hidden_states.shape)


@_norm_backward.register_fake
def _(grad, hidden_states, scale, weight, bias, eps):
    tensors = (hidden_states, scale, scale, *(tensor for tensor in (weight, bias) if tensor is not None))
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


@_gated.register_fake
def _(hidden_states, gate, branch):
    return hidden_states.new_empty(hidden_states.shape)


@_gated_backward.register_fake
def _(grad, gate, branch):
    return gate.new_empty(gate.shape), branch.new_empty(branch.shape)


def _keep_for_norm(ctx, inputs, output):
    hidden_states, _, *kept, ctx.eps = inputs
    ctx.save_for_backward(hidden_states, *kept)


def _backward_of_norm(ctx, grad):
    hidden_states, scale, weight, bias = ctx.saved_tensors
    grads = iter(_norm_backward(grad, hidden_states, scale, weight, bias, ctx.eps))
    present = (True, True, True, weight is not None, bias is not None)
    return *(next(grads) if there else None for there in present), None


def _keep_for_gated(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward_of_gated(ctx, grad):
    return grad, *_gated_backward(grad, *ctx.saved_tensors)


_norm.register_autograd(_backward_of_norm, setup_context=_keep_for_norm)
_gated.register_autograd(_backward_of_gated, setup_context=_keep_for_gated)
