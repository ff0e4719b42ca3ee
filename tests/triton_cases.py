"""The Triton kernels against plain PyTorch: compiled where there is a GPU, else in Triton's interpreter.

test_triton.py runs this file in a process of its own: Triton decides at its first import whether to interpret.
"""

import pytest
import torch
from test_kernels import WINDOWS, assert_close, attention_case, local_case

from d_emo.kernels import attention, local, triton_attention, triton_local

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in WINDOWS if name != "wide values"])  # slow to interpret
def test_attention_and_its_gradients_equal_the_reference(monkeypatch, name, dtype):
    if dtype == torch.bfloat16:
        monkeypatch.setattr(triton_attention, "WANTED_PROGRAMS", 1)  # all value channels in one program
    qkv, bias, grad, windows = (x.to(DEVICE) if torch.is_tensor(x) else x for x in attention_case(name, dtype))
    exact = [tensor.double().requires_grad_() for tensor in (qkv, bias)]
    expected = attention.reference(*exact, windows)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    assert_close(triton_attention.forward(qkv, bias, windows), expected, dtype)
    grad_qkv, grad_bias = triton_attention.backward(grad, qkv, bias, windows)
    assert_close(grad_qkv, expected_grads[0], dtype)
    assert_close(grad_bias, expected_grads[1], dtype)
    without = attention.reference(qkv.double(), None, windows)
    assert_close(triton_attention.forward(qkv, None, windows), without, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_statistics", [True, False])
@pytest.mark.parametrize(
    ("shape", "kernel"), [((1, 3, 6, 70), 5), ((3, 2, 5, 43), 3), ((1, 2, 3, 8), 7), ((1, 4, 2, 140), 3)]
)
def test_local_branch_and_its_gradients_equal_the_reference(monkeypatch, shape, kernel, batch_statistics, dtype):
    monkeypatch.setattr(triton_local, "WANTED_PROGRAMS", 4)  # two images in a program
    torch.manual_seed(0)
    hidden, conv, norm = local_case(shape, kernel, dtype)
    hidden, conv, norm = hidden.to(DEVICE), conv.to(DEVICE), norm.to(DEVICE)
    grad = torch.randn(shape, device=DEVICE).to(dtype)
    weight = conv.weight.detach().flatten(1).t().contiguous()
    given = (norm.running_mean.clone(), norm.running_var.clone())
    parameters = triton_local.Parameters(weight, norm.weight.detach(), norm.bias.detach(), *given)
    out, mean, variance = triton_local.forward(hidden, parameters, batch_statistics, norm.eps)
    parameters = parameters._replace(mean=mean, variance=variance)
    grads = triton_local.backward(grad, hidden, parameters, batch_statistics, norm.eps)

    conv, norm = conv.double(), norm.double().train(batch_statistics)
    exact = [hidden.double().requires_grad_(), conv.weight, norm.weight, norm.bias]
    expected = local.reference(exact[0], conv, norm)
    assert_close(out, expected, dtype)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    grads = (grads[0], grads[1].t().reshape(conv.weight.shape), *grads[2:])
    for actual, want in zip(grads, wanted, strict=True):
        assert_close(actual, want, dtype)
