"""The local branch, x + SiLU(BatchNorm(depthwise convolution of x)), in Triton, for CUDA GPUs.

Channels last throughout. A program walks down a strip of COLUMNS columns of an image, two channels a thread, and reads
every row once: the row joins the sums of the K rows of results it is part of, which stay in registers together with the
weights. With a batch's statistics the convolution's result is stored, in the type of x, where it is first made: reading
it costs less than its products. What follows goes by value: a program does a chunk of pixels, whose rows and columns do
not matter. Sums over the batch (statistics, parameter gradients) are made in a program, then joined, so the result does
not depend on the order in which programs run.

Shapes: B images of H x W tokens, E channels, K kernel side; weights as (K * K, E).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .grids import SIZES, launch

COLUMNS, CHANNELS, WARPS = 4, 128, 2  # of a program: two channels a thread
CHUNK, TILE, TILE_WARPS = 256, 16, 4  # pixels of a program that goes by value, and those worked on at a time
WANTED_PROGRAMS = 2048  # for the weight's gradient, which takes several images a program: some for every core of a GPU


@triton.jit
def _place(first_image, width, E: tl.constexpr, COLUMNS: tl.constexpr, CB: tl.constexpr):
    """This program's image, first column, channels, and place among the parts that are summed up afterwards."""
    strips, blocks = tl.cdiv(width, COLUMNS), tl.cdiv(E, CB)
    strip, rest = tl.program_id(0) % strips, tl.program_id(0) // strips
    image = first_image + rest // blocks
    return image, strip * COLUMNS, rest % blocks * CB + tl.arange(0, CB), image.to(tl.int64) * strips + strip


@triton.jit
def _image(number, height, width, E: tl.constexpr):
    """Where an image starts in a tensor."""
    return number * tl.full((), E, tl.int64) * height * width


@triton.jit
def _vector(pointer, channel, E: tl.constexpr):
    return tl.load(pointer + channel, mask=channel < E, other=0.0)


@triton.jit
def _inside(row, column, height, width):
    """Of a row, how far columns count: one comparison for each, since negative ones are large without a sign."""
    return column.to(tl.uint32) < tl.where((row >= 0) & (row < height), width, 0).to(tl.uint32)


@triton.jit
def _mask(inside, channel, E: tl.constexpr):
    """Which channels of a pixel there are, if it is inside of the grid."""
    return inside if ((channel.shape[0] - 1) & E) == 0 else (channel < E) & inside  # E fills blocks of a power of two


@triton.jit
def _pixels(x, row, column, channel, height, width, E: tl.constexpr, COUNT: tl.constexpr):
    """COUNT neighboring pixels of a row, from `column` on; zeros outside the grid."""
    pixels = ()
    start = x + (row * width + column) * E + channel  # what is added to it below is part of an instruction
    for i in tl.static_range(COUNT):
        mask = _mask(_inside(row, column + i, height, width), channel, E)
        pixels = pixels + (tl.load(start + i * E, mask=mask, other=0.0),)
    return pixels


@triton.jit
def _store(x, values, row, column, channel, height, width, E: tl.constexpr):
    """The opposite of `_pixels`."""
    start = x + (row * width + column) * E + channel
    for i in tl.static_range(len(values)):
        mask = _mask(_inside(row, column + i, height, width), channel, E)
        tl.store(start + i * E, values[i].to(x.dtype.element_ty), mask=mask)


@triton.jit
def _floats(values):
    floats = ()
    for i in tl.static_range(len(values)):
        floats = floats + (values[i].to(tl.float32),)
    return floats


@triton.jit
def _zeros(CB: tl.constexpr, COUNT: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros((CB,), tl.float32),)
    return zeros


@triton.jit
def _taps(weight, channel, E: tl.constexpr, K: tl.constexpr, FLIP: tl.constexpr):
    """The convolution's weights, turned around with FLIP, for the input's gradient."""
    taps = ()
    for tap in tl.static_range(K * K):
        taps = taps + (_vector(weight + (K * K - 1 - tap if FLIP else tap) * E, channel, E),)
    return taps


@triton.jit
def _convolve(sums, pixels, taps, K: tl.constexpr, COLUMNS: tl.constexpr, CB: tl.constexpr):
    """Add a row of COLUMNS + K - 1 pixels to the K rows of results it is part of, COLUMNS sums each, the highest first.

    Returns the highest row, which is then complete, and the sums for the next row of pixels.
    """
    pixels = _floats(pixels)
    complete, rest = (), ()
    for result in tl.static_range(K):
        for i in tl.static_range(COLUMNS):
            total = sums[result * COLUMNS + i]
            for dx in tl.static_range(K):
                total += pixels[i + dx] * taps[(K - 1 - result) * K + dx]
            if result == 0:
                complete = complete + (total,)
            else:
                rest = rest + (total,)
    return complete, rest + _zeros(CB, COLUMNS)


@triton.jit
def _row(x, row, column, channel, height, width, E: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr):
    """The pixels of a row that the results of COLUMNS columns are made of."""
    return _pixels(x, row, column - K // 2, channel, height, width, E, COLUMNS + K - 1)


@triton.jit
def _walk(
    x, row, column, channel, height, width, pixels, sums, taps,
    E: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """One row down: the results of row - K // 2, the sums that go on, and the next row of pixels, fetched ahead."""
    below = _row(x, row + 1, column, channel, height, width, E, K, COLUMNS)
    complete, sums = _convolve(sums, pixels, taps, K, COLUMNS, CB)
    return complete, sums, below


@triton.jit(do_not_specialize=SIZES)
def _convolution_kernel(
    x, weight, convolved, means, squares, height, width, first_image,
    E: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, CB: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    """The convolution; its mean over this program's pixels, and sum of squared differences from it (Welford, 1962).

    Of what is stored: rounded values may vary more than the exact ones, next to which they would not be normalised.
    """
    image, column, channel, part = _place(first_image, width, E, COLUMNS, CB)
    offset = _image(image, height, width, E)
    taps, sums = _taps(weight, channel, E, K, False), _zeros(CB, K * COLUMNS)
    mean, square, count = tl.zeros((CB,), tl.float32), tl.zeros((CB,), tl.float32), 0.0
    pixels = _row(x + offset, 0, column, channel, height, width, E, K, COLUMNS)
    for row in range(height + K // 2):
        complete, sums, pixels = _walk(
            x + offset, row, column, channel, height, width, pixels, sums, taps, E, K, COLUMNS, CB
        )
        _store(convolved + offset, complete, row - K // 2, column, channel, height, width, E)
        if STATISTICS:
            for i in tl.static_range(COLUMNS):
                y = complete[i].to(convolved.dtype.element_ty).to(tl.float32)
                counts = _inside(row - K // 2, column + i, height, width).to(tl.float32)
                count += counts
                difference = y - mean
                mean += difference * (counts / tl.maximum(count, 1.0))
                square += difference * (y - mean) * counts
    if STATISTICS:
        tl.store(means + part * E + channel, mean, mask=channel < E)
        tl.store(squares + part * E + channel, square, mask=channel < E)


@triton.jit(do_not_specialize=SIZES)
def _join_kernel(
    means, squares, mean, variance, parts, strips, height, width,
    E: tl.constexpr, COLUMNS: tl.constexpr, PB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """Mean and variance of the batch from those of its parts (Chan, Golub and LeVeque, 1979)."""
    channel = tl.program_id(0) * CB + tl.arange(0, CB)
    pixels = ((parts // strips).to(tl.int64) * height * width).to(tl.float32)
    total = tl.zeros((CB,), tl.float32)
    for first in range(0, parts, PB):
        count, place, mask = _parts(first, parts, strips, height, width, channel, E, COLUMNS, PB)
        total += tl.sum(count * tl.load(means + place, mask=mask, other=0.0), 0)
    average = total / pixels
    total = tl.zeros((CB,), tl.float32)
    for first in range(0, parts, PB):
        count, place, mask = _parts(first, parts, strips, height, width, channel, E, COLUMNS, PB)
        difference = tl.load(means + place, mask=mask, other=0.0) - average[None, :]
        square = tl.load(squares + place, mask=mask, other=0.0) + count * difference * difference
        total += tl.sum(tl.where(mask, square, 0.0), 0)
    tl.store(mean + channel, average, mask=channel < E)
    tl.store(variance + channel, total / pixels, mask=channel < E)


@triton.jit
def _parts(first, parts, strips, height, width, channel, E: tl.constexpr, COLUMNS: tl.constexpr, PB: tl.constexpr):
    """Pixels of PB parts as a column, where their vectors lie, and which of them exist."""
    part = (first + tl.arange(0, PB)[:, None]).to(tl.int64)
    count = height * tl.minimum(width - part % strips * COLUMNS, COLUMNS)
    return count.to(tl.float32), part * E + channel[None, :], (part < parts) & (channel[None, :] < E)


class _Normalisation(NamedTuple):
    """Vectors of a program's channels."""

    gamma: tl.tensor
    beta: tl.tensor
    mean: tl.tensor
    deviation: tl.tensor  # its reciprocal


@triton.jit
def _normalisation(gamma, beta, mean, variance, eps, channel, E: tl.constexpr):
    deviation = tl.rsqrt(_vector(variance, channel, E) + eps)
    return _Normalisation(_vector(gamma, channel, E), _vector(beta, channel, E), _vector(mean, channel, E), deviation)


@triton.jit
def _multiply_add(gamma, beta, mean, variance, eps, channel, E: tl.constexpr):
    """BatchNorm of a program's channels as a factor and a summand."""
    norm = _normalisation(gamma, beta, mean, variance, eps, channel, E)
    scale = norm.gamma * norm.deviation
    return scale, norm.beta - norm.mean * scale


@triton.jit
def _branch(x, y, scale, shift):
    """x + SiLU(BatchNorm(y))."""
    u = y * scale + shift
    return x.to(tl.float32) + u * tl.sigmoid(u)


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    x, weight, gamma, beta, mean, variance, out, eps, height, width, first_image,
    E: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    image, column, channel, _ = _place(first_image, width, E, COLUMNS, CB)
    offset = _image(image, height, width, E)
    taps, sums = _taps(weight, channel, E, K, False), _zeros(CB, K * COLUMNS)
    scale, shift = _multiply_add(gamma, beta, mean, variance, eps, channel, E)
    pixels = _row(x + offset, 0, column, channel, height, width, E, K, COLUMNS)
    for row in range(height + K // 2):
        inputs = _pixels(x + offset, row - K // 2, column, channel, height, width, E, COLUMNS)
        complete, sums, pixels = _walk(
            x + offset, row, column, channel, height, width, pixels, sums, taps, E, K, COLUMNS, CB
        )
        results = ()
        for i in tl.static_range(COLUMNS):
            results = results + (_branch(inputs[i], complete[i], scale, shift),)
        _store(out + offset, results, row - K // 2, column, channel, height, width, E)


@triton.jit
def _chunk(first_image, E: tl.constexpr, CB: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """This program's chunk, where it starts in a tensor, its channels, and the places of its first tile from there."""
    blocks = tl.cdiv(E, CB)
    chunk = (first_image + tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * CB + tl.arange(0, CB)
    return chunk, chunk * (CHUNK * E), channel, tl.arange(0, TILE)[:, None] * E + channel[None, :]


@triton.jit
def _there(chunk, tile, pixels, channel, E: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Which values of a chunk's tile there are."""
    pixel = chunk * CHUNK + tile * TILE + tl.arange(0, TILE)
    return _mask((pixel < pixels)[:, None], channel, E)


@triton.jit(do_not_specialize=SIZES)
def _normalisation_kernel(
    x, convolved, gamma, beta, mean, variance, out, eps, pixels, first_image,
    E: tl.constexpr, CB: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The branch's result, given the convolution's."""
    chunk, offset, channel, place = _chunk(first_image, E, CB, CHUNK, TILE)
    scale, shift = _multiply_add(gamma, beta, mean, variance, eps, channel, E)
    for tile in range(CHUNK // TILE):
        mask, at = _there(chunk, tile, pixels, channel, E, CHUNK, TILE), place + tile * (TILE * E)
        y = tl.load(convolved + offset + at, mask=mask, other=0.0).to(tl.float32)
        result = _branch(tl.load(x + offset + at, mask=mask, other=0.0), y, scale[None, :], shift[None, :])
        tl.store(out + offset + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _activation_gradient(convolved, grad, at, mask, norm):
    """Normalised convolution z, and the gradient with respect to gamma z + beta."""
    y = tl.load(convolved + at, mask=mask, other=0.0).to(tl.float32)
    z = (y - norm.mean[None, :]) * norm.deviation[None, :]
    u = z * norm.gamma[None, :] + norm.beta[None, :]
    gate = tl.sigmoid(u)
    return z, tl.load(grad + at, mask=mask, other=0.0).to(tl.float32) * gate * (1.0 + u * (1.0 - gate))


@triton.jit(do_not_specialize=SIZES)
def _affine_gradient_kernel(
    convolved, grad, gamma, beta, mean, variance, grad_gamma, grad_beta, eps, pixels, first_image,
    E: tl.constexpr, CB: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    chunk, offset, channel, place = _chunk(first_image, E, CB, CHUNK, TILE)
    norm = _normalisation(gamma, beta, mean, variance, eps, channel, E)
    total, total_normed = tl.zeros((TILE, CB), tl.float32), tl.zeros((TILE, CB), tl.float32)
    for tile in range(CHUNK // TILE):
        mask = _there(chunk, tile, pixels, channel, E, CHUNK, TILE)
        z, g = _activation_gradient(convolved + offset, grad + offset, place + tile * (TILE * E), mask, norm)
        total += g  # zero where there is no value
        total_normed += g * z
    tl.store(grad_gamma + chunk * E + channel, tl.sum(total_normed, 0), mask=channel < E)
    tl.store(grad_beta + chunk * E + channel, tl.sum(total, 0), mask=channel < E)


@triton.jit(do_not_specialize=SIZES)
def _convolution_gradient_kernel(
    convolved, grad, gamma, beta, mean, variance, grad_gamma, grad_beta, grad_y, eps, share, pixels, first_image,
    E: tl.constexpr, CB: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Gradient with respect to the convolution's result; `share`, a pixel's, is zero with given statistics."""
    chunk, offset, channel, place = _chunk(first_image, E, CB, CHUNK, TILE)
    norm = _normalisation(gamma, beta, mean, variance, eps, channel, E)
    drop_normed = (_vector(grad_gamma, channel, E) * share)[None, :]
    drop = (_vector(grad_beta, channel, E) * share)[None, :]
    scale = (norm.gamma * norm.deviation)[None, :]
    for tile in range(CHUNK // TILE):
        mask, at = _there(chunk, tile, pixels, channel, E, CHUNK, TILE), place + tile * (TILE * E)
        z, g = _activation_gradient(convolved + offset, grad + offset, at, mask, norm)
        result = (g - drop - z * drop_normed) * scale
        tl.store(grad_y + offset + at, result.to(grad_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def _input_gradient_kernel(
    grad, grad_y, weight, grad_x, height, width, first_image,
    E: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    image, column, channel, _ = _place(first_image, width, E, COLUMNS, CB)
    offset = _image(image, height, width, E)
    taps, sums = _taps(weight, channel, E, K, True), _zeros(CB, K * COLUMNS)
    pixels = _row(grad_y + offset, 0, column, channel, height, width, E, K, COLUMNS)
    next_grads = _pixels(grad + offset, 0 - K // 2, column, channel, height, width, E, COLUMNS)
    for row in range(height + K // 2):
        y = row + 1 - K // 2
        grads, next_grads = next_grads, _pixels(grad + offset, y, column, channel, height, width, E, COLUMNS)
        complete, sums, pixels = _walk(
            grad_y + offset, row, column, channel, height, width, pixels, sums, taps, E, K, COLUMNS, CB
        )
        results = ()
        for i in tl.static_range(COLUMNS):
            results = results + (complete[i] + grads[i].to(tl.float32),)
        _store(grad_x + offset, results, row - K // 2, column, channel, height, width, E)


@triton.jit(do_not_specialize=SIZES)
def _weight_gradient_kernel(
    x, grad_y, grad_weight, batch, groups, height, width, first_image,
    E: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    """The part of a strip of columns of every groups-th image."""
    group, column, channel, part = _place(first_image, width, E, COLUMNS, CB)
    totals = _zeros(CB, K * K)
    for image in range(group, batch, groups):
        offset = _image(image, height, width, E)
        grads = _zeros(CB, K * COLUMNS)  # of the K rows of results that a row of pixels is part of, the highest first
        next_pixels = _row(x + offset, 0 - K // 2, column, channel, height, width, E, K, COLUMNS)
        next_grads = _pixels(grad_y + offset, 0, column, channel, height, width, E, COLUMNS)
        for row in range(height + K // 2):
            pixels, grads = _floats(next_pixels), grads[COLUMNS:] + _floats(next_grads)
            y = row + 1
            next_pixels = _row(x + offset, y - K // 2, column, channel, height, width, E, K, COLUMNS)
            next_grads = _pixels(grad_y + offset, y, column, channel, height, width, E, COLUMNS)
            sums = ()
            for tap in tl.static_range(K * K):
                total = totals[tap]
                for i in tl.static_range(COLUMNS):
                    total += pixels[i + tap % K] * grads[(K - 1 - tap // K) * COLUMNS + i]
                sums = sums + (total,)
            totals = sums
    for tap in tl.static_range(K * K):
        tl.store(grad_weight + (part * K * K + tap) * E + channel, totals[tap], mask=channel < E)


class Parameters(NamedTuple):
    """Weight as (K * K, E), BatchNorm's affine parameters, the statistics that normalise: float32."""

    weight: torch.Tensor
    gamma: torch.Tensor
    beta: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor


def _options(x: torch.Tensor, weight: torch.Tensor) -> tuple[int, int, dict[str, int]]:
    """Strips of an image, programs an image, and what kernels are compiled for."""
    side, channels = round(weight.shape[0] ** 0.5), x.shape[-1]
    columns = COLUMNS if side <= 5 else COLUMNS // 2  # what registers have room for
    strips = triton.cdiv(x.shape[2], columns)
    options = {"E": channels, "K": side, "COLUMNS": columns, "CB": CHANNELS, "num_warps": WARPS}
    return strips, strips * triton.cdiv(channels, CHANNELS), options


def batch_of_several_images(channels: int, width: int) -> int:
    """Images from which on a program of the weight's gradient does two."""
    strips = triton.cdiv(width, COLUMNS)
    return 2 * triton.cdiv(WANTED_PROGRAMS, strips * triton.cdiv(channels, CHANNELS))


def _by_value(x: torch.Tensor) -> tuple[int, int, int, dict[str, int]]:
    """Programs a chunk, chunks, pixels, and what kernels that go by value are compiled for."""
    channels, pixels = x.shape[-1], x.shape[:3].numel()
    options = {"E": channels, "CB": CHANNELS, "CHUNK": CHUNK, "TILE": TILE, "num_warps": TILE_WARPS}
    return triton.cdiv(channels, CHANNELS), triton.cdiv(pixels, CHUNK), pixels, options


def forward(x: torch.Tensor, parameters: Parameters, batch_statistics: bool, eps: float) -> tuple[torch.Tensor, ...]:
    """The result, the mean and variance that normalised it (the batch's own if asked for), and then the convolution's.

    The last is empty with given statistics.
    """
    batch, height, width, channels = x.shape
    weight, gamma, beta, mean, variance = parameters
    strips, programs, options = _options(x, weight)
    out = torch.empty_like(x)
    if not batch_statistics:
        arguments = (x, weight, gamma, beta, mean, variance, out, eps, height, width)
        launch(_forward_kernel, programs, batch, *arguments, **options)
        return out, mean, variance, x.new_empty(0)
    parts, convolved = batch * strips, torch.empty_like(x)
    means, squares = x.new_empty(2, parts, channels, dtype=torch.float32)
    mean, variance = torch.empty_like(mean), torch.empty_like(variance)
    arguments = (x, weight, convolved, means, squares, height, width)
    launch(_convolution_kernel, programs, batch, *arguments, **options, STATISTICS=True)
    blocks = {"E": channels, "COLUMNS": options["COLUMNS"], "PB": 32, "CB": 32}
    joined = (means, squares, mean, variance, parts, strips, height, width)
    _join_kernel[(triton.cdiv(channels, blocks["CB"]),)](*joined, **blocks)
    programs, chunks, pixels, options = _by_value(x)
    arguments = (x, convolved, gamma, beta, mean, variance, out, eps, pixels)
    launch(_normalisation_kernel, programs, chunks, *arguments, **options)
    return out, mean, variance, convolved


def backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    convolved: torch.Tensor,
    parameters: Parameters,
    batch_statistics: bool,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, the weight (as (K * K, E)), gamma and beta.

    `convolved` is the convolution's result; if it is empty, it is made again.
    """
    batch, height, width, channels = x.shape
    weight, *normalisation = parameters
    strips, programs, options = _options(x, weight)
    if not convolved.numel():
        convolved, none = torch.empty_like(x), weight
        arguments = (x, weight, convolved, none, none, height, width)
        launch(_convolution_kernel, programs, batch, *arguments, **options, STATISTICS=False)
    blocks, chunks, pixels, by_value = _by_value(x)
    parts = x.new_empty(2, chunks, channels, dtype=torch.float32)
    launch(_affine_gradient_kernel, blocks, chunks, convolved, grad, *normalisation, *parts, eps, pixels, **by_value)
    grad_gamma, grad_beta = (part.sum(0) for part in parts)  # not one tensor: an operator's results share no memory
    share = 1 / pixels if batch_statistics else 0.0
    grad_y, grad_x = torch.empty_like(x), torch.empty_like(x)
    given = (*normalisation, grad_gamma, grad_beta, grad_y, eps, share, pixels)
    launch(_convolution_gradient_kernel, blocks, chunks, convolved, grad, *given, **by_value)
    launch(_input_gradient_kernel, programs, batch, grad, grad_y, weight, grad_x, height, width, **options)
    groups = min(batch, triton.cdiv(WANTED_PROGRAMS, programs))
    grad_weights = x.new_empty(groups * strips, *weight.shape, dtype=torch.float32)
    arguments = (x, grad_y, grad_weights, batch, groups, height, width)
    launch(_weight_gradient_kernel, programs, groups, *arguments, **options)
    return grad_x, grad_weights.sum(0), grad_gamma, grad_beta
