"""The local branch, x + SiLU(BatchNorm(depthwise convolution of x)), in Triton, for CUDA GPUs.

Channels last throughout. A program does a block of channels of some tokens of one image. The convolution is computed
again rather than stored: a pass over the tensor costs more than its 25 products. Sums over the batch (statistics,
parameter gradients) are made in a program, then joined in PyTorch, so the result does not depend on the order in which
programs run.

Shapes: B images of N = H x W tokens, E channels, K kernel side; weights as (K * K, E).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

TOKEN_BLOCK, CHANNEL_BLOCK = 64, 64


@triton.jit
def _convolve(x, weight, token, channel, mask, height, width, E: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr):
    """The convolution at some tokens, zeros around the grid; FLIP turns the kernel, for the input's gradient."""
    row, column = token // width, token % width
    total = tl.zeros((token.shape[0], channel.shape[0]), tl.float32)
    for tap in tl.static_range(K * K):
        y, z = row + tap // K - K // 2, column + tap % K - K // 2
        inside = mask & ((y >= 0) & (y < height) & (z >= 0) & (z < width))[:, None]
        place = (K * K - 1 - tap if FLIP else tap) * E + channel
        taps = tl.load(weight + place, mask=channel < E, other=0.0).to(tl.float32)
        pixels = tl.load(x + (y * width + z)[:, None] * E + channel[None, :], mask=inside, other=0.0)
        total += pixels.to(tl.float32) * taps[None, :]
    return total


@triton.jit
def _place(tokens, E: tl.constexpr, TB: tl.constexpr, CB: tl.constexpr):
    """This program's image, tokens and channels, and which of them exist."""
    token = tl.program_id(0) * TB + tl.arange(0, TB)
    channel = tl.program_id(1) * CB + tl.arange(0, CB)
    return tl.program_id(2).to(tl.int64), token, channel, (token < tokens)[:, None] & (channel < E)[None, :]


@triton.jit
def _statistics_kernel(
    x, weight, means, squares, height, width,
    E: tl.constexpr, K: tl.constexpr, TB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Mean of the convolution over this program's tokens, and the sum of squared differences from it."""
    image, token, channel, mask = _place(height * width, E, TB, CB)
    y = _convolve(x + image * height * width * E, weight, token, channel, mask, height, width, E, K, False)
    count = tl.minimum(height * width - tl.program_id(0) * TB, TB)
    mean = tl.sum(tl.where(mask, y, 0.0), 0) / count
    difference = tl.where(mask, y - mean[None, :], 0.0)
    part = (image * tl.num_programs(0) + tl.program_id(0)) * E + channel
    tl.store(means + part, mean, mask=channel < E)
    tl.store(squares + part, tl.sum(difference * difference, 0), mask=channel < E)


@triton.jit
def _forward_kernel(
    x, weight, scale, shift, out, height, width,
    E: tl.constexpr, K: tl.constexpr, TB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    image, token, channel, mask = _place(height * width, E, TB, CB)
    x += image * height * width * E
    y = _convolve(x, weight, token, channel, mask, height, width, E, K, False)
    known = channel < E
    u = y * tl.load(scale + channel, mask=known, other=0.0) + tl.load(shift + channel, mask=known, other=0.0)
    place = token[:, None] * E + channel[None, :]
    total = tl.load(x + place, mask=mask, other=0.0).to(tl.float32) + u * tl.sigmoid(u)
    tl.store(out + image * height * width * E + place, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _activation_gradient(
    x, grad, weight, gamma, beta, mean, deviation, token, channel, mask, height, width,
    E: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Normalised convolution z, and the gradient with respect to gamma z + beta."""
    known = channel < E
    y = _convolve(x, weight, token, channel, mask, height, width, E, K, False)
    z = (y - tl.load(mean + channel, mask=known, other=0.0)) * tl.load(deviation + channel, mask=known, other=0.0)
    u = z * tl.load(gamma + channel, mask=known, other=0.0) + tl.load(beta + channel, mask=known, other=0.0)
    gate = tl.sigmoid(u)
    g = tl.load(grad + token[:, None] * E + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, z, 0.0), g * gate * (1.0 + u * (1.0 - gate))


@triton.jit
def _affine_gradient_kernel(
    x, grad, weight, gamma, beta, mean, deviation, grad_gamma, grad_beta, height, width,
    E: tl.constexpr, K: tl.constexpr, TB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    image, token, channel, mask = _place(height * width, E, TB, CB)
    offset = image * height * width * E
    z, g = _activation_gradient(
        x + offset, grad + offset, weight, gamma, beta, mean, deviation, token, channel, mask, height, width, E, K
    )
    part = (image * tl.num_programs(0) + tl.program_id(0)) * E + channel
    tl.store(grad_gamma + part, tl.sum(g * z, 0), mask=channel < E)
    tl.store(grad_beta + part, tl.sum(g, 0), mask=channel < E)


@triton.jit
def _convolution_gradient_kernel(
    x, grad, weight, gamma, beta, mean, deviation, drop, drop_normed, grad_y, height, width,
    E: tl.constexpr, K: tl.constexpr, TB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Gradient with respect to the convolution's result; `drop` and `drop_normed` are zero with given statistics."""
    image, token, channel, mask = _place(height * width, E, TB, CB)
    offset, known = image * height * width * E, channel < E
    z, g = _activation_gradient(
        x + offset, grad + offset, weight, gamma, beta, mean, deviation, token, channel, mask, height, width, E, K
    )
    g -= tl.load(drop + channel, mask=known, other=0.0) + z * tl.load(drop_normed + channel, mask=known, other=0.0)
    g *= tl.load(gamma + channel, mask=known, other=0.0) * tl.load(deviation + channel, mask=known, other=0.0)
    tl.store(grad_y + offset + token[:, None] * E + channel[None, :], g.to(grad_y.dtype.element_ty), mask=mask)


@triton.jit
def _input_gradient_kernel(
    x, grad, grad_y, weight, grad_x, grad_weight, height, width,
    E: tl.constexpr, K: tl.constexpr, TB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Gradient of x, and this program's part of the weight's."""
    image, token, channel, mask = _place(height * width, E, TB, CB)
    offset, known = image * height * width * E, channel < E
    place = token[:, None] * E + channel[None, :]
    total = _convolve(grad_y + offset, weight, token, channel, mask, height, width, E, K, True)
    total += tl.load(grad + offset + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x + offset + place, total.to(grad_x.dtype.element_ty), mask=mask)
    g = tl.load(grad_y + offset + place, mask=mask, other=0.0).to(tl.float32)
    row, column = token // width, token % width
    part = (image * tl.num_programs(0) + tl.program_id(0)) * K * K * E
    for tap in tl.static_range(K * K):
        y, z = row + tap // K - K // 2, column + tap % K - K // 2
        inside = mask & ((y >= 0) & (y < height) & (z >= 0) & (z < width))[:, None]
        pixels = tl.load(x + offset + (y * width + z)[:, None] * E + channel[None, :], mask=inside, other=0.0)
        tl.store(grad_weight + part + tap * E + channel, tl.sum(g * pixels.to(tl.float32), 0), mask=known)


class Parameters(NamedTuple):
    """Weight as (K * K, E), BatchNorm's affine parameters, the statistics that normalise: float32."""

    weight: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor


def _launch(x: torch.Tensor, weight: torch.Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    batch, height, width, channels = x.shape
    grid = (triton.cdiv(height * width, TOKEN_BLOCK), triton.cdiv(channels, CHANNEL_BLOCK), batch)
    side = round(weight.shape[0] ** 0.5)
    return grid, {"E": channels, "K": side, "TB": TOKEN_BLOCK, "CB": CHANNEL_BLOCK}


def forward(x: torch.Tensor, parameters: Parameters, batch_statistics: bool, eps: float) -> tuple[torch.Tensor, ...]:
    """The result, and the mean and variance that normalised it (the batch's own if asked for)."""
    batch, height, width, channels = x.shape
    weight, gamma, beta, mean, variance = parameters
    grid, options = _launch(x, weight)
    if batch_statistics:
        means, squares = (x.new_empty(batch, grid[0], channels, dtype=torch.float32) for _ in range(2))
        _statistics_kernel[grid](x, weight, means, squares, height, width, **options)
        starts = torch.arange(grid[0], device=x.device) * TOKEN_BLOCK
        counts = (height * width - starts).clamp(max=TOKEN_BLOCK)[None, :, None].float()
        # Parts joined after Chan, Golub and LeVeque (1979).
        count = batch * height * width
        mean = (means * counts).sum((0, 1)) / count
        variance = (squares + counts * (means - mean).square()).sum((0, 1)) / count
    scale = gamma * torch.rsqrt(variance + eps)
    out = torch.empty_like(x)
    _forward_kernel[grid](x, weight, scale, beta - mean * scale, out, height, width, **options)
    return out, mean, variance


def backward(
    grad: torch.Tensor, x: torch.Tensor, parameters: Parameters, batch_statistics: bool, eps: float
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, the weight (as (K * K, E)), gamma and beta."""
    batch, height, width, channels = x.shape
    weight, gamma, beta, mean, variance = parameters
    grid, options = _launch(x, weight)
    deviation = torch.rsqrt(variance + eps)
    parts = [x.new_empty(batch * grid[0], channels, dtype=torch.float32) for _ in range(2)]
    shared = (x, grad, weight, gamma, beta, mean, deviation)
    _affine_gradient_kernel[grid](*shared, *parts, height, width, **options)
    grad_gamma, grad_beta = (part.sum(0) for part in parts)
    share = 1 / (batch * height * width) if batch_statistics else 0.0
    grad_y, grad_x = torch.empty_like(x), torch.empty_like(x)
    drops = (grad_beta * share, grad_gamma * share)
    _convolution_gradient_kernel[grid](*shared, *drops, grad_y, height, width, **options)
    grad_weights = x.new_empty(batch * grid[0], *weight.shape, dtype=torch.float32)
    _input_gradient_kernel[grid](x, grad, grad_y, weight, grad_x, grad_weights, height, width, **options)
    return grad_x, grad_weights.sum(0), grad_gamma, grad_beta
