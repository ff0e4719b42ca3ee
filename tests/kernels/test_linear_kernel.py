"""The CPU kernels' own linear layers against PyTorch's in float64, and the choice between the two."""

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomize

from d_emo.kernels import cpp, dispatch, linear, use_backend
from d_emo.kernels.cpp import build
from d_emo.models import I2RMB

pytestmark = pytest.mark.skipif(bool(build.obstacle()), reason=f"no C++ kernels here: {build.obstacle()}")

# Largest error over the largest value. Float32 differs in the order of sums, a bfloat16 result is rounded to 2^-9.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-3}
TYPES = list(TOLERANCE)


@pytest.fixture
def own_products(monkeypatch):
    """The kernels' own products, whatever is faster here."""
    monkeypatch.setattr(dispatch, "_has", lambda *_: True)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    # Whole vectors and panels; odd rows; sums over several pieces of the depth; several blocks of the weight's
    # gradient; less than a vector.
    [((4, 16, 16), 96, 160), ((3, 5, 7), 70, 26), ((65,), 802, 1100), ((400,), 500, 430), ((64,), 2, 4)],
)
def test_results_and_gradients_equal_pytorchs(own_products, rows, inputs, outputs, with_bias, dtype):
    parameters = tensors(dtype, (*rows, inputs), (outputs, inputs), *([(outputs,)] if with_bias else []))
    (grad,) = tensors(dtype, (*rows, outputs))
    exact_parameters = [tensor.detach().double().requires_grad_() for tensor in parameters]
    with use_backend("native"):
        out = linear.linear(*parameters)
    assert "d_emo_linear" in type(out.grad_fn).__name__
    exact = F.linear(*exact_parameters)
    grads = torch.autograd.grad(out, parameters, grad)
    exact_grads = torch.autograd.grad(exact, exact_parameters, grad.double())
    for actual, expected in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert actual.dtype == dtype
        assert relative_error(actual, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TYPES)
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    x, weight, grad = (tensor.detach() for tensor in tensors(dtype, (300, 100), (820, 100), (300, 820)))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append((linear.linear_operator(x, weight, None), *linear.linear_backward_operator(grad, x, weight)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_operators_are_registered_as_pytorch_wants_them():
    x, weight, bias = tensors(torch.float32, (4, 16, 8), (6, 8), (6,))
    for order in (lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        inputs = order(x.detach())
        torch.library.opcheck(linear.linear_operator, (inputs.requires_grad_(), weight, None))
        torch.library.opcheck(linear.linear_operator, (inputs, weight, bias))
        inputs = inputs.detach()
        torch.library.opcheck(linear.linear_backward_operator, (inputs[..., :6], inputs, weight.detach()))


@pytest.mark.parametrize("own", [True, False])
def test_a_block_trains_the_same_with_either_product(monkeypatch, own):
    """And in autocast, where products are of bfloat16."""
    monkeypatch.setattr(dispatch, "_has", lambda operator, *_: own or operator != "linear")
    block = randomize(I2RMB(48, 3))
    hidden, grad = (tensor.detach() for tensor in tensors(torch.float32, (2, 16, 16, 48), (2, 16, 16, 48)))

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(block(hidden), list(block.parameters()), grad))

    with use_backend("reference"):
        expected = [value.double() for value in gradients()]
    with use_backend("native"):
        actual = gradients()
        with torch.autocast("cpu", torch.bfloat16):
            rounded = torch.autograd.grad(block(hidden), list(block.parameters()), grad.bfloat16())
    for value, coarse, want in zip(actual, rounded, expected, strict=True):
        assert value.dtype == coarse.dtype == torch.float32
        assert relative_error(value, want) <= 1e-4  # of a whole block
        assert relative_error(coarse, want) <= 5e-2


def test_what_the_kernels_cannot_multiply_is_left_to_pytorch(own_products):
    x = torch.randn(64, 8)
    with use_backend("auto"):
        assert linear.multiplies(x, torch.randn(6, 8))
        assert not linear.multiplies(x[:63], torch.randn(6, 8))  # too few rows to pack a weight for
        assert not linear.multiplies(x, torch.randn(5, 8))  # odd
        assert not linear.multiplies(x.half(), torch.randn(6, 8).half())
        assert not linear.multiplies(x, torch.randn(6, 8).bfloat16())
    with use_backend("reference"):
        assert not linear.multiplies(x, torch.randn(6, 8))


@pytest.mark.parametrize(
    ("processor", "linear_layers", "blocks"),
    [
        ({"vendor_id": "AuthenticAMD", "flags": "avx2"}, [True, True, True], [True, True, True]),
        ({"vendor_id": "GenuineIntel", "flags": "avx512f"}, [False, False, True], [True, True, True]),
        ({"vendor_id": "GenuineIntel", "flags": "avx512f amx_bf16"}, [False, False, False], [True, True, False]),
        ({"Features": "asimd"}, [True, True, True], [True, True, True]),
    ],
)
def test_the_processor_decides_whose_products_are_used(monkeypatch, processor, linear_layers, blocks):
    """In float64, float32 and bfloat16: whether the kernels' are."""
    monkeypatch.setattr(build, "processor", lambda: processor)
    for operator, expected in (("linear", linear_layers), ("infer_block", blocks), ("local_branch", [True] * 3)):
        assert [not cpp.slower(operator, dtype) for dtype in TYPES] == expected
