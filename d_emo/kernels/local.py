"""The operator of the local branch: the choice between backends, and what PyTorch is told about it.

Its definition is `reference.local_branch`. Shapes: B batch, H x W token grid, E channels, K kernel side.
"""

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .dispatch import arithmetic, is_plain, keeps_convolution, operator, takes
from .inputs import check_grid, check_tensors, same_device

KERNEL_SIZES = (1, 3, 5, 7)  # that the backends have


def local_branch(hidden_states: torch.Tensor, conv: nn.Module, norm: nn.Module) -> torch.Tensor:
    """hidden_states + SiLU(norm(conv(hidden_states))).

    In training mode the norm's running statistics are updated, as `norm` itself would.

    Args:
        hidden_states: (B, H, W, E).
        conv: depthwise `nn.Conv2d` of E channels, stride 1, "same" padding, no bias.
        norm: `nn.BatchNorm2d` of E channels, or a module in its place (synchronised statistics, say).

    Returns:
        (B, H, W, E).

    Raises:
        ValueError: the input is no floating-point (B, H, W, E).
    """
    check_grid("local_branch", hidden_states)
    channels, side = hidden_states.shape[-1], conv.kernel_size[:1] if isinstance(conv, nn.Conv2d) else ()
    if not (fusible(conv, norm, hidden_states, channels) and takes("local_branch", hidden_states, side)):
        return reference.local_branch(hidden_states, conv, norm)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    parameters = (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    out, mean, variance, _ = local_operator(hidden_states, *parameters, norm.training, norm.eps)
    if norm.training:
        _update_statistics(norm, mean, variance, hidden_states[..., 0].numel())
    return out


@torch.no_grad()
def _update_statistics(norm: nn.BatchNorm2d, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """Move running statistics as BatchNorm does after a batch of `count` pixels a channel; `variance` is over count."""
    assert norm.num_batches_tracked is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.num_batches_tracked.add_(1)
    momentum = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)


def fusible(conv: nn.Module, norm: nn.Module, grid: torch.Tensor, channels: int) -> bool:
    """Whether the operator can stand for `norm` after `conv` on a grid (B, H, W, any) of so many channels."""
    return (
        _is_depthwise(conv, channels)
        and isinstance(norm, nn.BatchNorm2d)
        and is_plain(norm, nn.BatchNorm2d)
        and norm.num_features == channels
        and norm.affine
        and norm.track_running_stats
        # One pixel a channel has no variance: BatchNorm itself says so.
        and not (norm.training and grid.numel() == grid.shape[-1])
    )


def _is_depthwise(conv: nn.Module, channels: int) -> bool:
    """A depthwise convolution of so many channels that keeps the grid, of a size that there are kernels for."""
    if not isinstance(conv, nn.Conv2d) or not is_plain(conv, nn.Conv2d):
        return False
    side = conv.kernel_size[0]
    return (
        side in KERNEL_SIZES
        and conv.kernel_size == (side, side)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (side // 2, side // 2)
        and conv.padding_mode == "zeros"
        and conv.groups == conv.in_channels == conv.out_channels == channels
        and conv.bias is None
    )


# ---- registration with PyTorch -------------------------------------------------------------------------------------


def _check(x, weight, gamma, beta, mean, variance, batch_statistics, eps, **others):
    check_grid("local_branch", x)
    channels, side = x.shape[-1], weight.shape[-1] if weight.dim() else 0
    per_channel = {"gamma": gamma, "beta": beta, "mean": mean, "variance": variance}
    shapes = {name: (tensor, (channels,)) for name, tensor in per_channel.items()}
    check_tensors("local_branch", x, weight=(weight, (channels, 1, side, side)), **shapes, **others)
    if side not in KERNEL_SIZES:
        raise ValueError(
            f"local_branch: there is no kernel of side {side}, only of {', '.join(map(str, KERNEL_SIZES))}."
        )


_PARAMETERS = "Tensor weight, Tensor gamma, Tensor beta, Tensor mean, Tensor variance, bool batch_statistics, float eps"
# The result, the statistics that normalised it (`mean` and `variance` are read without batch statistics), and what is
# kept for the backward pass: the convolution's result, or nothing.
local_operator = operator("local_branch", f"(Tensor x, {_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor)", _check)
# Gradients of x, weight, gamma and beta, given the statistics that normalised, and what was kept.
local_backward_operator = operator(
    "local_branch_backward",
    f"(Tensor grad, Tensor x, Tensor kept, {_PARAMETERS}) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda grad, x, kept, *parameters: _check(
        x, *parameters, grad=(grad, x.shape), kept=(kept, x.shape if kept.numel() else (0,))
    ),
)


@local_operator.register_fake
def _(hidden_states, weight, gamma, beta, mean, variance, batch_statistics, eps):
    same_device("local_branch", hidden_states, weight, gamma, beta, mean, variance)
    kind = arithmetic(hidden_states.dtype)
    statistics = (mean.new_empty(mean.shape, dtype=kind), mean.new_empty(mean.shape, dtype=kind))
    kept = batch_statistics and keeps_convolution(hidden_states)
    return (
        hidden_states.new_empty(hidden_states.shape),
        *statistics,
        hidden_states.new_empty(hidden_states.shape if kept else (0,)),
    )


@local_backward_operator.register_fake
def _(grad, hidden_states, kept, weight, gamma, beta, mean, variance, batch_statistics, eps):
    same_device("local_branch_backward", grad, hidden_states, kept, weight, gamma, beta, mean, variance)
    return tuple(tensor.new_empty(tensor.shape) for tensor in (hidden_states, weight, gamma, beta))


def _keep_inputs(ctx, inputs, output):
    hidden_states, weight, gamma, beta, _, _, *ctx.options = inputs
    _, mean, variance, kept = output
    ctx.save_for_backward(hidden_states, kept, weight, gamma, beta, mean, variance)
    ctx.mark_non_differentiable(mean, variance, kept)


def _backward(ctx, grad, *_):
    grads = local_backward_operator(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None, None  # statistics and options have none


local_operator.register_autograd(_backward, setup_context=_keep_inputs)


def kernel_parameters(
    dtype: torch.dtype, weight: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parameters as backends take them: the convolution's weight as (K * K, E)."""
    kind = arithmetic(dtype)
    return weight.to(kind).flatten(1).t().contiguous(), gamma.to(kind).contiguous(), beta.to(kind).contiguous()


def gradients(
    grads: tuple[torch.Tensor, ...], weight: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a backend has for x and for `kernel_parameters`, in the layout and types of the parameters."""
    grad_weight = grads[1].t().contiguous().view(weight.shape)
    return grads[0], grad_weight.to(weight.dtype), grads[2].to(gamma.dtype), grads[3].to(beta.dtype)


@register_flop_formula(torch.ops.d_emo.local_branch)
def convolution_flops(hidden_shape, weight_shape, *_, **__) -> int:
    """The convolution's."""
    batch, height, width, channels = hidden_shape
    return 2 * batch * height * width * channels * weight_shape[-1] ** 2


@register_flop_formula(torch.ops.d_emo.local_branch_backward)
def _backward_flops(grad_shape, hidden_shape, kept_shape, weight_shape, *_, **__) -> int:
    """Twice the forward pass's; its recomputation is not counted."""
    return 2 * convolution_flops(hidden_shape, weight_shape)
