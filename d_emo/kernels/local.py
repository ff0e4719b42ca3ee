"""The block's local branch, x + SiLU(BatchNorm(depthwise convolution of x)): the operation and its reference.

Shapes: B batch, H x W token grid, E channels, K kernel side.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import register_flop_formula

from . import cpu
from .backend import fast_path, is_plain

Layer = Callable[[torch.Tensor], torch.Tensor]

KERNEL_SIZES = (1, 3, 5, 7)  # that the fast implementations have


def local_branch(hidden_states: torch.Tensor, conv: nn.Module, norm: nn.Module) -> torch.Tensor:
    """hidden_states + SiLU(norm(conv(hidden_states))).

    In training mode the norm's running statistics are updated, as `norm` itself would.

    Args:
        hidden_states: (B, H, W, E).
        conv: depthwise `nn.Conv2d` of E channels, stride 1, "same" padding, no bias.
        norm: `nn.BatchNorm2d` of E channels, or a module in its place (synchronised statistics, say).

    Returns:
        (B, H, W, E).
    """
    if not fusible(hidden_states, conv, norm):
        return reference(hidden_states, conv, norm)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    parameters = (conv.weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    out, mean, variance = _local_branch(hidden_states, *parameters, norm.training, norm.eps)
    if norm.training:
        update_statistics(norm, mean, variance, hidden_states[..., 0].numel())
    return out


@torch.no_grad()
def update_statistics(norm: nn.BatchNorm2d, mean: torch.Tensor, variance: torch.Tensor, count: int) -> None:
    """Move running statistics as BatchNorm does after a batch of `count` pixels a channel; `variance` is over count."""
    assert norm.num_batches_tracked is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.num_batches_tracked.add_(1)
    momentum = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)


def reference(hidden_states: torch.Tensor, conv: Layer, norm: Layer) -> torch.Tensor:
    """The definition, in plain PyTorch."""
    local = conv(hidden_states.permute(0, 3, 1, 2))  # (B, E, H, W), channels-last memory
    return hidden_states + F.silu(norm(local)).permute(0, 2, 3, 1)


def fusible(hidden_states: torch.Tensor, conv: nn.Module, norm: nn.Module) -> bool:
    """Whether a fast implementation can stand for `norm` after `conv`."""
    return (
        _is_depthwise(conv)
        and isinstance(norm, nn.BatchNorm2d)
        and is_plain(norm, nn.BatchNorm2d)
        and norm.affine
        and norm.track_running_stats
        # One pixel a channel has no variance: BatchNorm itself says so.
        and not (norm.training and hidden_states.numel() == hidden_states.shape[-1])
        and fast_path(hidden_states)
    )


def _is_depthwise(conv: nn.Module) -> bool:
    """A depthwise convolution that keeps the grid, of a size that there are kernels for."""
    if not isinstance(conv, nn.Conv2d) or not is_plain(conv, nn.Conv2d):
        return False
    side = conv.kernel_size[0]
    return (
        side in KERNEL_SIZES
        and conv.kernel_size == (side, side)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (side // 2, side // 2)
        and conv.padding_mode == "zeros"
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.bias is None
    )


def convolve(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    batch_statistics: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The result and the statistics that normalised it; `mean` and `variance` are read without batch statistics."""
    hidden_states = hidden_states.contiguous()
    kind = cpu.arithmetic(hidden_states.dtype)
    out = torch.empty_like(hidden_states)
    mean, variance = mean.to(kind, copy=True), variance.to(kind, copy=True)
    shape = cpu.LocalShape(*hidden_states.shape, weight.shape[-1], batch_statistics, eps)
    parameters = kernel_parameters(hidden_states.dtype, weight, gamma, beta)
    cpu.call("local", "local_forward", out.dtype, shape, hidden_states, *parameters, mean, variance, out)
    return out, mean, variance


def convolve_backward(
    grad: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    batch_statistics: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, of the convolution and of gamma and beta, given the statistics that normalised."""
    hidden_states, grad = hidden_states.contiguous(), grad.to(hidden_states.dtype).contiguous()
    parameters = kernel_parameters(hidden_states.dtype, weight, gamma, beta)
    grad_hidden, grads = torch.empty_like(hidden_states), [torch.empty_like(parameter) for parameter in parameters]
    shape = cpu.LocalShape(*hidden_states.shape, weight.shape[-1], batch_statistics, eps)
    arguments = (hidden_states, *parameters, mean, variance, grad, grad_hidden, *grads)
    cpu.call("local", "local_backward", hidden_states.dtype, shape, *arguments)
    grad_weight = grads[0].t().contiguous().view(weight.shape)
    return grad_hidden, grad_weight.to(weight.dtype), grads[1].to(gamma.dtype), grads[2].to(beta.dtype)


_local_branch = torch.library.custom_op("d_emo::local_branch", convolve, mutates_args=(), device_types="cpu")
_local_branch_backward = torch.library.custom_op(
    "d_emo::local_branch_backward", convolve_backward, mutates_args=(), device_types="cpu"
)


@_local_branch.register_kernel("cuda")
def convolve_on_gpu(hidden_states, weight, gamma, beta, mean, variance, batch_statistics, eps):
    """The Triton kernels for `convolve`."""
    from . import triton_local

    affine = kernel_parameters(hidden_states.dtype, weight, gamma, beta)
    parameters = triton_local.Parameters(*affine, mean.to(torch.float32), variance.to(torch.float32))
    with torch.cuda.device_of(hidden_states):  # Triton launches on the current device
        out, mean, variance = triton_local.forward(hidden_states.contiguous(), parameters, batch_statistics, eps)
    if batch_statistics:
        return out, mean, variance
    return out, mean.clone(), variance.clone()  # an operator's results must not be its inputs


@_local_branch_backward.register_kernel("cuda")
def convolve_backward_on_gpu(grad, hidden_states, weight, gamma, beta, mean, variance, batch_statistics, eps):
    """The Triton kernels for `convolve_backward`."""
    from . import triton_local

    parameters = triton_local.Parameters(*kernel_parameters(hidden_states.dtype, weight, gamma, beta), mean, variance)
    grad = grad.to(hidden_states.dtype).contiguous()
    with torch.cuda.device_of(hidden_states):
        grads = triton_local.backward(grad, hidden_states.contiguous(), parameters, batch_statistics, eps)
    grad_weight = grads[1].t().contiguous().view(weight.shape)
    return grads[0], grad_weight.to(weight.dtype), grads[2].to(gamma.dtype), grads[3].to(beta.dtype)


def kernel_parameters(
    dtype: torch.dtype, weight: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The parameters as the kernels take them: the convolution's weight as (K * K, E)."""
    kind = cpu.arithmetic(dtype)
    return weight.to(kind).flatten(1).t().contiguous(), gamma.to(kind).contiguous(), beta.to(kind).contiguous()


@_local_branch.register_fake
def _(hidden_states, weight, gamma, beta, mean, variance, *_):
    kind = cpu.arithmetic(hidden_states.dtype)
    statistics = (mean.new_empty(mean.shape, dtype=kind), mean.new_empty(mean.shape, dtype=kind))
    return hidden_states.new_empty(hidden_states.shape), *statistics


@_local_branch_backward.register_fake
def _(grad, hidden_states, weight, gamma, beta, *_):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (hidden_states, weight, gamma, beta))


def _keep_inputs(ctx, inputs, output):
    hidden_states, weight, gamma, beta, _, _, *ctx.options = inputs
    _, mean, variance = output
    ctx.save_for_backward(hidden_states, weight, gamma, beta, mean, variance)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, variance)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 8
    return *_local_branch_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


_local_branch.register_autograd(_backward, setup_context=_keep_inputs)


@register_flop_formula(torch.ops.d_emo.local_branch)
def convolution_flops(hidden_shape, weight_shape, *_, **__) -> int:
    """The convolution's."""
    batch, height, width, channels = hidden_shape
    return 2 * batch * height * width * channels * weight_shape[-1] ** 2


@register_flop_formula(torch.ops.d_emo.local_branch_backward)
def _backward_flops(grad_shape, hidden_shape, weight_shape, *_, **__) -> int:
    """Twice the forward pass's; its recomputation is not counted."""
    return 2 * convolution_flops(hidden_shape, weight_shape)
