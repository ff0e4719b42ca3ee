"""The CPU kernels around a block, modulated LayerNorm and gated residual, against PyTorch's in float64."""

import pytest
import torch
from torch import nn

from d_emo.kernels import cpu, gated_sum, modulated_norm, modulation, use_backend

pytestmark = pytest.mark.skipif(bool(cpu.obstacle()), reason=f"no C++ kernels here: {cpu.obstacle()}")

# Largest error over the largest value. Float32 differs in the order of sums, a bfloat16 result is rounded to 2^-9.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 4e-3}
SHAPES = [(2, 16, 16, 384), (3, 5, 7, 43), (1, 1, 1, 6), (2, 3, 11, 64)]  # whole units and vectors, and odd ones


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item() <= TOLERANCE[dtype]


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def exact_copies(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in inputs]


def random_norm(channels: int, affine: bool) -> nn.LayerNorm:
    norm = nn.LayerNorm(channels, eps=1e-3, elementwise_affine=affine)
    for number, parameter in enumerate(norm.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    return norm


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_modulated_norm_and_its_gradients_equal_pytorchs(shape, affine, dtype):
    batch, channels = shape[0], shape[-1]
    x, shift, scale, grad = tensors(dtype, shape, (batch, channels), (batch, channels), shape)
    norm = random_norm(channels, affine).to(cpu.arithmetic(dtype))
    exact_norm = random_norm(channels, affine).double()
    exact_x, exact_shift, exact_scale = exact_copies([x, shift, scale])
    with use_backend("native"):
        out = modulated_norm(norm, x, shift, scale)
    assert out.dtype == dtype
    assert "d_emo_modulated_norm" in type(out.grad_fn).__name__
    exact = exact_norm(exact_x) * (1 + exact_scale[:, None, None]) + exact_shift[:, None, None]
    assert close(out, exact, dtype)
    grads = torch.autograd.grad(out, [x, shift, scale, *norm.parameters()], grad)
    inputs = [exact_x, exact_shift, exact_scale, *exact_norm.parameters()]
    for actual, expected in zip(grads, torch.autograd.grad(exact, inputs, grad.double()), strict=True):
        assert close(actual, expected, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated_sum_and_its_gradients_equal_pytorchs(shape, dtype):
    x, gate, branch, grad = tensors(dtype, shape, (shape[0], shape[-1]), shape, shape)
    exact_x, exact_gate, exact_branch = inputs = exact_copies([x, gate, branch])
    with use_backend("native"):
        out = gated_sum(x, gate, branch)
    assert out.dtype == dtype
    assert "d_emo_gated_sum" in type(out.grad_fn).__name__
    exact = exact_x + exact_gate[:, None, None] * exact_branch
    assert close(out, exact, dtype)
    grads = torch.autograd.grad(out, [x, gate, branch], grad)
    for actual, expected in zip(grads, torch.autograd.grad(exact, inputs, grad.double()), strict=True):
        assert close(actual, expected, dtype)


def test_a_row_far_from_zero_keeps_its_digits():
    """Mean 1000, deviation 1: the difference of mean square and squared mean would lose four of seven digits."""
    x = torch.randn(1, 4, 4, 96, generator=torch.Generator().manual_seed(0)) + 1000
    zero = torch.zeros(1, 96)
    with use_backend("native"):
        out = modulated_norm(nn.LayerNorm(96), x, zero, zero)
    assert (out.double() - nn.LayerNorm(96).double()(x.double())).abs().max() <= 5e-4  # x itself is rounded to 6e-5


def test_results_do_not_depend_on_the_number_of_threads():
    x, branch, grad, gate = (tensor.detach() for tensor in tensors(torch.float32, *[(3, 9, 9, 40)] * 3, (3, 40)))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            normed = modulation._norm_backward(grad, x, gate, None, None, 1e-6)
            results.append((*normed, *modulation._gated_backward(grad, gate, branch)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_operators_are_registered_as_pytorch_wants_them():
    x, branch, shift, scale, weight, bias = tensors(torch.float32, *[(2, 3, 5, 8)] * 2, *[(2, 8)] * 2, (8,), (8,))
    pixels, rows, gains = x.detach(), scale.detach(), weight.detach()
    for affine in ((weight, bias), (weight, None), (None, None)):
        torch.library.opcheck(modulation._norm, (x, shift, scale, *affine, 1e-6))
    torch.library.opcheck(modulation._norm, (pixels.transpose(1, 2), shift, rows, gains, None, 1e-6))
    torch.library.opcheck(modulation._norm_backward, (pixels, pixels, rows, gains, bias.detach(), 1e-6))
    torch.library.opcheck(modulation._norm_backward, (pixels, pixels, rows, None, None, 1e-6))
    torch.library.opcheck(modulation._gated, (x, scale, branch))
    torch.library.opcheck(modulation._gated_backward, (pixels, rows, branch.detach()))


def test_what_is_no_plain_layer_norm_is_called():
    x, shift, scale = (tensor.detach() for tensor in tensors(torch.float32, (2, 3, 3, 8), (2, 8), (2, 8)))
    hooked = nn.LayerNorm(8)
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    for norm in (hooked, nn.RMSNorm(8), nn.LayerNorm((3, 8))):
        with use_backend("native"):
            out = modulated_norm(norm, x, shift, scale)
        assert torch.equal(out, torch.addcmul(shift[:, None, None], norm(x), 1 + scale[:, None, None]))


def test_mixed_types_are_promoted_as_by_autocast():
    x, gate, branch = (tensor.detach() for tensor in tensors(torch.float32, (2, 3, 3, 8), (2, 8), (2, 3, 3, 8)))
    with use_backend("native"), torch.autocast("cpu", torch.bfloat16):
        out = gated_sum(x, gate.bfloat16(), branch.bfloat16())
    assert out.dtype == torch.float32
    assert torch.equal(out, x + gate.bfloat16().float()[:, None, None] * branch.bfloat16().float())
