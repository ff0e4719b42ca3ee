"""The CPU kernels' own matrix products against PyTorch's in float64, and the choice between the two."""

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from helpers.models import randomize
from torch import nn

from d_emo.kernels import apply_linear, calibration, cpu, linear, linear_and_bias, use_backend
from d_emo.kernels.calibration import Speeds
from d_emo.models import I2RMB

pytestmark = pytest.mark.skipif(bool(cpu.obstacle()), reason=f"no C++ kernels here: {cpu.obstacle()}")

# Largest error over the largest value. Float32 differs in the order of sums, a bfloat16 result is rounded to 2^-9.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
TYPES = list(TOLERANCE)
ALL = [True, True, True]  # every product by the kernels


@pytest.fixture
def own_products(monkeypatch):
    """The kernels' own products, whichever are faster here."""
    monkeypatch.setattr(calibration, "product_speeds", lambda *_: Speeds(2.0, 2.0, 2.0))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def tensors(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    # Whole vectors and panels; odd rows; sums over several pieces of the depth; several blocks of the weight's
    # gradient; less than a vector.
    [((4, 16, 16), 96, 160), ((3, 5, 7), 70, 26), ((65,), 802, 1100), ((400,), 500, 430), ((64,), 2, 4)],
)
def test_products_and_gradients_equal_pytorchs(own_products, rows, inputs, outputs, dtype):
    x, weight, grad = tensors(dtype, (*rows, inputs), (outputs, inputs), (*rows, outputs))
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    with use_backend("native"):
        assert linear.can_multiply(x, weight)
        out = linear.product(x, weight)
    assert out.grad_fn is not None
    assert "d_emo_linear" in type(out.grad_fn).__name__
    exact = F.linear(exact_x, exact_weight)
    grads = torch.autograd.grad(out, (x, weight), grad)
    exact_grads = torch.autograd.grad(exact, (exact_x, exact_weight), grad.double())
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
            results.append((linear._product(x, weight, True, ALL), linear._weight_gradient(grad, x, True)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


def test_only_the_gradients_that_are_wanted_are_computed(own_products, monkeypatch):
    calls = []
    call = cpu.call
    monkeypatch.setattr(cpu, "call", lambda *a: (calls.append((a[1], a[3].by_column)), call(*a)))
    x, weight = tensors(torch.float32, (64, 8), (6, 8))
    with use_backend("native"):
        linear.product(x.detach(), weight).sum().backward()
        linear.product(x, weight.detach()).sum().backward()
    forward, of_input = ("linear_forward", 1), ("linear_forward", 0)
    assert calls == [forward, ("linear_weight_gradient", 1), forward, of_input]


@pytest.mark.parametrize("own", itertools.product([False, True], repeat=3))
def test_each_product_is_the_kernels_or_pytorchs_as_was_measured(monkeypatch, own):
    monkeypatch.setattr(calibration, "product_speeds", lambda *_: Speeds(*(1.5 if by_us else 0.9 for by_us in own)))
    calls = []
    call = cpu.call
    monkeypatch.setattr(cpu, "call", lambda *a: (calls.append((a[1], a[3].by_column)), call(*a)))
    x, weight, grad = tensors(torch.float32, (4, 16, 8), (6, 8), (4, 16, 6))
    exact_x, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    with use_backend("native"):
        out = linear.product(x, weight)
    out.backward(grad)
    exact = F.linear(exact_x, exact_weight)
    exact.backward(grad.double())
    pairs = ((out, exact), (x.grad, exact_x.grad), (weight.grad, exact_weight.grad))
    assert all(relative_error(actual, expected) <= 1e-6 for actual, expected in pairs)
    ours = [("linear_forward", 1), ("linear_forward", 0), ("linear_weight_gradient", 1)]
    assert calls == [product for product, by_us in zip(ours, own, strict=True) if by_us]


@pytest.mark.parametrize("own", [True, False])
def test_operators_are_registered_as_pytorch_wants_them(own):
    x, weight = tensors(torch.float32, (4, 16, 8), (6, 8))
    for order in (lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        flags = [own] * 3
        torch.library.opcheck(linear._product, (order(x.detach()).requires_grad_(), weight, True, flags))
        torch.library.opcheck(linear._product, (order(x.detach()), weight.detach().t().contiguous(), False, flags))
        torch.library.opcheck(linear._weight_gradient, (order(x.detach())[..., :6], order(x.detach()), own))


@pytest.mark.parametrize("speed", [0.0, 2.0])
def test_a_block_trains_the_same_with_either_product(monkeypatch, speed):
    """And in autocast, where products are of bfloat16."""
    monkeypatch.setattr(calibration, "product_speeds", lambda *_: Speeds(speed, speed, speed))
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


def test_what_the_kernels_cannot_multiply_is_left_to_pytorch():
    x = torch.randn(64, 8)
    with use_backend("auto"):
        assert linear.can_multiply(x, torch.randn(6, 8))
        assert not linear.can_multiply(x[:63], torch.randn(6, 8))  # too few rows to pack a weight for
        assert not linear.can_multiply(x, torch.randn(5, 8))  # odd
        assert not linear.can_multiply(x.double(), torch.randn(6, 8).double())
        assert not linear.can_multiply(x.half(), torch.randn(6, 8).half())
        assert not linear.can_multiply(x, torch.randn(6, 8).bfloat16())
    with use_backend("reference"):
        assert not linear.can_multiply(x, torch.randn(6, 8))


def test_layers_with_a_bias_keep_it(own_products):
    layer = nn.Linear(8, 6)
    x = torch.randn(64, 8)
    with use_backend("native"):
        out, bias = linear_and_bias(layer, x)
        assert torch.allclose(out + bias, layer(x), atol=1e-6)
        assert torch.equal(apply_linear(layer, x), layer(x))


@pytest.fixture
def empty_cache(monkeypatch, tmp_path):
    """A folder for what is measured, and nothing measured yet."""
    monkeypatch.setattr(cpu, "cached_path", lambda name, suffix: tmp_path / f"{name}{suffix}")
    calibration._speeds.cache_clear()
    yield tmp_path
    calibration._speeds.cache_clear()


@pytest.mark.parametrize("numbers", [calibration.LEAST_LARGE, 1000])
@pytest.mark.parametrize("dtype", TYPES)
def test_speed_is_measured_once_and_remembered(empty_cache, dtype, numbers):
    measured = calibration.product_speeds(dtype, numbers)
    assert all(0.01 < speed < 1000 for speed in measured)
    (path,) = empty_cache.iterdir()
    assert json.loads(path.read_text()) == measured._asdict()
    path.write_text(json.dumps({**measured._asdict(), "forward": 3.5}))
    assert calibration.product_speeds(dtype, numbers) == measured  # in this process
    calibration._speeds.cache_clear()
    assert calibration.product_speeds(dtype, numbers) == measured._replace(forward=3.5)


def test_layers_are_judged_by_their_size(empty_cache, monkeypatch):
    speeds = {calibration.SMALL: Speeds(2.0, 2.0, 2.0), calibration.LARGE: Speeds(0.5, 0.5, 0.5)}
    monkeypatch.setattr(calibration, "_measure", lambda dtype, *layer: speeds[layer])
    x = torch.randn(64, 1024)
    with use_backend("native"):
        small, large = (linear.product(x, torch.randn(n, 1024, requires_grad=True)) for n in (1000, 2000))
    assert "d_emo_linear" in type(small.grad_fn).__name__
    assert "d_emo_linear" not in type(large.grad_fn).__name__


def test_a_cache_that_cannot_be_written_costs_a_measurement_only(empty_cache, monkeypatch, caplog):
    (empty_cache / "file").touch()
    monkeypatch.setattr(cpu, "cached_path", lambda name, suffix: empty_cache / "file" / f"{name}{suffix}")
    monkeypatch.setattr(calibration, "_measure", lambda *_: Speeds(1.5, 1.0, 0.5))
    monkeypatch.setattr(calibration.logger, "propagate", True)
    assert calibration.product_speeds(torch.float32, 1000) == Speeds(1.5, 1.0, 0.5)
    assert "cannot be kept, every process measures it again: [Errno" in caplog.text
