"""The Triton kernels against plain PyTorch: compiled where there is a GPU, else in Triton's interpreter.

test_triton.py runs this file in a process of its own: Triton decides at its first import whether to interpret.
"""

import pytest
import torch

from d_emo.kernels import reference
from d_emo.kernels import triton as backend
from d_emo.kernels.triton import attention, grids, local
from helpers.kernel_cases import WINDOWS, assert_close, attention_case, local_case

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Several images are launched in parts, as those of a batch beyond a grid's limit are; chunks are small."""
    monkeypatch.setattr(grids, "LARGEST_GRID", 8)
    monkeypatch.setattr(local, "CHUNK", 8)
    monkeypatch.setattr(local, "TILE", 4)


def results(outputs: tuple[torch.Tensor, ...], *likes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The results of an operator, which PyTorch wants in memory of their own, and with these shapes."""
    storages = [tensor.untyped_storage() for tensor in (*outputs, *likes)]
    # Empty ones have no memory to share.
    assert len({storage.data_ptr() or storage._cdata for storage in storages}) == len(outputs) + len(likes)
    assert [tensor.shape for tensor in outputs] == [tensor.shape for tensor in likes]
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in WINDOWS if name != "wide values"])  # slow to interpret
def test_attention_and_its_gradient_equal_the_reference(monkeypatch, name, dtype):
    if dtype == torch.bfloat16:
        monkeypatch.setattr(attention, "WANTED_PROGRAMS", 1)  # all value channels in one program
    qkv, grad, windows = (x.to(DEVICE) if torch.is_tensor(x) else x for x in attention_case(name, dtype))
    exact = qkv.double().requires_grad_()
    expected = reference.window_attention(exact, windows)
    assert_close(backend.attend(qkv, windows), expected, dtype)
    (actual,) = results((backend.attend_backward(grad, qkv, windows),), qkv)
    assert_close(actual, torch.autograd.grad(expected, exact, grad.double())[0], dtype)


@pytest.mark.parametrize(
    ("shape", "kernel", "batch_statistics", "dtype"),
    [
        pytest.param((1, 3, 6, 70), 5, True, torch.float32, id="large float32"),
        pytest.param((1, 3, 6, 70), 5, True, torch.bfloat16, id="large bfloat16"),
        pytest.param((3, 2, 5, 43), 3, True, torch.float32, id="large float32, many images"),
        pytest.param((3, 2, 5, 43), 3, False, torch.float32, id="large float32, fixed statistics"),
        pytest.param((3, 2, 5, 43), 3, False, torch.bfloat16, id="large bfloat16, fixed statistics"),
        pytest.param((1, 2, 3, 8), 7, True, torch.float32, id="float32, kernel beyond the image"),
        pytest.param((1, 4, 2, 140), 3, True, torch.float32, id="float32, many channels"),
        pytest.param((2, 2, 3, 128), 3, True, torch.float32, id="float32, whole block of channels"),
    ],
)
def test_local_branch_and_its_gradients_equal_the_reference(monkeypatch, shape, kernel, batch_statistics, dtype):
    monkeypatch.setattr(local, "WANTED_PROGRAMS", 4)  # two images in a program
    torch.manual_seed(0)
    hidden, conv, norm = local_case(shape, kernel, dtype)
    hidden, conv, norm = hidden.to(DEVICE), conv.to(DEVICE), norm.to(DEVICE)
    grad = torch.randn(shape, device=DEVICE).to(dtype)
    learned = (conv.weight.detach(), norm.weight.detach(), norm.bias.detach())
    statistics, options = (norm.running_mean, norm.running_var), (batch_statistics, norm.eps)
    kept = torch.empty_like(hidden) if batch_statistics else hidden.new_empty(0)
    out, *statistics, kept = results(
        backend.convolve(hidden, *learned, *statistics, *options), hidden, *statistics, kept
    )
    grads = backend.convolve_backward(grad, hidden, kept, *learned, *statistics, *options)
    results(grads, hidden, *learned)

    conv, norm = conv.double(), norm.double().train(batch_statistics)
    exact = [hidden.double().requires_grad_(), conv.weight, norm.weight, norm.bias]
    expected = reference.local_branch(exact[0], conv, norm)
    assert_close(out, expected, dtype)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    for actual, want in zip(grads, wanted, strict=True):
        assert_close(actual, want, dtype)


def test_statistics_of_local_branches_join_in_batches_of_more_pixels_than_32_bits_count():
    """Four parts of 2^31 pixels each, whose means are 0 to 3; within each the variance is 5."""
    means = torch.arange(4.0, device=DEVICE)[:, None].expand(4, 3).contiguous()
    squares, (mean, variance) = torch.full_like(means, 5.0 * 2**31), torch.zeros(2, 3, device=DEVICE)
    sizes = {"parts": 4, "strips": 1, "height": 2**29, "width": 4}
    local._join_kernel[(1,)](means, squares, mean, variance, **sizes, E=3, COLUMNS=4, PB=2, CB=4)
    torch.testing.assert_close(mean, torch.full_like(mean, 1.5))
    torch.testing.assert_close(variance, torch.full_like(variance, 5 + 1.25))
