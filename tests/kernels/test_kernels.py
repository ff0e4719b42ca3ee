"""The fast kernels against plain PyTorch: C++ on the CPU here, Triton in its interpreter in test_triton.py."""

import pytest
import torch
from helpers.kernel_cases import TOLERANCE, WINDOWS, assert_close, attention_case, local_case
from helpers.models import randomize, tiny_model
from torch import nn

from d_emo import create_model
from d_emo.kernels import (
    Windows,
    attention,
    backend,
    backend_report,
    calibration,
    cpu,
    fused,
    local,
    selfcheck,
    set_backend,
    training,
    use_backend,
)
from d_emo.kernels.calibration import Speeds
from d_emo.models import I2RMB
from d_emo.models.flops import count_macs

pytestmark = pytest.mark.skipif(bool(cpu.obstacle()), reason=f"no C++ kernels here: {cpu.obstacle()}")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_attention_and_its_gradients_equal_the_reference(name, dtype, with_bias):
    qkv, bias, grad, windows = attention_case(name, dtype)
    inputs = [qkv.requires_grad_(), bias.requires_grad_()] if with_bias else [qkv.requires_grad_()]
    with use_backend("native"):
        out = attention.window_attention(qkv, bias if with_bias else None, windows)
    grads = torch.autograd.grad(out, inputs, grad)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = attention.reference(exact[0], exact[1] if with_bias else None, windows)
    assert_close(out, expected, dtype)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_close(actual, wanted, dtype)


def test_gelu_is_as_close_as_pytorchs():
    """A window of one token attends to itself, so the result is GELU of its value; far from zero, too."""
    values = torch.cat([torch.linspace(-12, 12, 64 * 64 * 15), torch.linspace(-1e4, 1e4, 64 * 64)]).view(1, 64, 64, 16)
    qkv = torch.cat([torch.zeros(1, 64, 64, 2), values], dim=-1).requires_grad_()
    with use_backend("native"):
        out = attention.window_attention(qkv, None, Windows(1, 1, 1, 1, remote=False))
    out.sum().backward()
    exact = values.double().requires_grad_()
    expected = nn.functional.gelu(exact)
    expected.sum().backward()
    assert ((out - expected).abs() <= 3e-7 * values.abs() + 2e-7).all()
    assert (qkv.grad[..., 2:] - exact.grad).abs().max() <= 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("shape", "kernel"), [((4, 16, 16, 64), 5), ((3, 7, 5, 43), 3), ((1, 9, 11, 20), 7),
                                               ((2, 3, 4, 16), 1), ((1, 2, 2, 5), 5)])  # fmt: skip
def test_local_branch_its_gradients_and_statistics_equal_the_reference(shape, kernel, training, dtype):
    torch.manual_seed(0)
    hidden, conv, norm = local_case(shape, kernel, dtype)
    exact_conv, exact_norm = (type(module)(**kwargs).double() for module, kwargs in (
        (conv, {"in_channels": shape[-1], "out_channels": shape[-1], "kernel_size": kernel, "padding": kernel // 2,
                "groups": shape[-1], "bias": False}),
        (norm, {"num_features": shape[-1]}),
    ))  # fmt: skip
    exact_conv.load_state_dict(conv.state_dict())
    exact_norm.load_state_dict(norm.state_dict())
    norm.train(training)
    exact_norm.train(training)
    inputs = [hidden.requires_grad_(), conv.weight, norm.weight, norm.bias]
    exact = [hidden.detach().double().requires_grad_(), exact_conv.weight, exact_norm.weight, exact_norm.bias]
    grad = torch.randn(shape).to(dtype)
    with use_backend("native"):
        out = local.local_branch(hidden, conv, norm)
    expected = local.reference(exact[0], exact_conv, exact_norm)
    assert_close(out, expected, dtype)
    grads = torch.autograd.grad(out, inputs, grad)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_close(actual, wanted, dtype)
    assert norm.num_batches_tracked == exact_norm.num_batches_tracked
    assert_close(norm.running_mean, exact_norm.running_mean, dtype)
    assert_close(norm.running_var, exact_norm.running_var, dtype)


def test_gradients_equal_finite_differences():
    qkv = torch.randn(1, 4, 4, 2 * 4 + 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(14, dtype=torch.float64, requires_grad=True)
    windows = Windows(4, 2, 2, 2)
    assert torch.autograd.gradcheck(lambda *x: attention._window_attention(*x, *windows), (qkv, bias))
    hidden, conv, norm = local_case((2, 3, 4, 3), 3, torch.float64)
    hidden.requires_grad_()
    for batch_statistics in (True, False):
        arguments = (norm.running_mean, norm.running_var, batch_statistics, 1e-5)
        assert torch.autograd.gradcheck(
            lambda *x, given=arguments: local._local_branch(*x, *given)[0],
            (hidden, conv.weight, norm.weight, norm.bias),
        )


def test_operators_are_registered_as_pytorch_wants_them():
    """Shapes, strides and types that compilers are told, mutation, gradients; for inputs in any memory order."""
    qkv, bias, grad, windows = attention_case("remote", torch.float32)
    hidden, conv, norm = local_case((1, 4, 4, 8), 3, torch.float32)
    weights = tuple(tensor.detach() for tensor in (conv.weight, norm.weight, norm.bias))
    statistics = (norm.running_mean, norm.running_var)
    channels = grad.shape[-1]
    fused_weights = (torch.rand(channels, 1, 3, 3), *(torch.rand(channels) for _ in range(4)))
    for order in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        x, g, h = order(qkv), order(grad), order(hidden)
        torch.library.opcheck(attention._window_attention, (x.clone().requires_grad_(), bias, *windows))
        torch.library.opcheck(attention._window_attention_backward, (g, x, bias, *windows))
        torch.library.opcheck(local._local_branch, (h.clone().requires_grad_(), *weights, *statistics, True, 1e-5))
        torch.library.opcheck(local._local_branch_backward, (h, h, *weights, *statistics, True, 1e-5))
        torch.library.opcheck(fused._attend_and_convolve, (x, bias, *windows, *fused_weights, 1e-5))
        products = (torch.rand(qkv.shape[-1], windows.dim), bias, torch.rand(10, channels))
        pixels = torch.rand(*qkv.shape[:3], windows.dim)
        torch.library.opcheck(fused._infer_block, (order(pixels), *products, *windows, *fused_weights, 1e-5))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("grid", [(16, 16), (8, 8), (9, 13)])
@torch.no_grad()
def test_block_in_inference_equals_the_reference(dtype, grid):
    block = randomize(I2RMB(48, 3)).to(dtype).eval()
    exact = randomize(I2RMB(48, 3)).double().eval()
    exact.load_state_dict({name: tensor.double() for name, tensor in block.state_dict().items()})
    hidden = torch.randn(2, *grid, 48).to(dtype)
    with use_backend("native"):
        out = block(hidden)
    with use_backend("reference"):
        expected = exact(hidden.double())
    assert_close(out, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "heads", "expansion", "out_dim", "grid"),
    [(48, 3, 4, 48, (16, 16)), (72, 1, 5, 100, (8, 24)), (400, 2, 4, 400, (8, 16)), (20, 2, 1.5, 14, (8, 8))],
)
@torch.no_grad()
def test_the_blocks_own_products_equal_a_librarys(monkeypatch, dim, heads, expansion, out_dim, grid, dtype):
    """Also where heads fill no whole vector or panel, and sums go beyond one piece of the depth."""
    block = randomize(I2RMB(dim, heads, expansion, out_dim=out_dim)).to(dtype).eval()
    hidden = torch.randn(5, *grid, dim).to(dtype)
    with use_backend("native"):
        monkeypatch.setattr(calibration, "product_speeds", lambda *_: Speeds(2.0, 2.0, 2.0))
        out = block(hidden)
        monkeypatch.setattr(calibration, "product_speeds", lambda *_: Speeds(0.0, 0.0, 0.0))
        assert_close(out, block(hidden), dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(out, block.float()(hidden.float()), torch.bfloat16)
    with use_backend("reference"):
        assert_close(out, block.double()(hidden.double()), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("speed", [0.0, 2.0])
def test_the_block_trains_as_one_operation(monkeypatch, speed, statistics, dtype):
    """Result, all gradients and running statistics, with the kernels' products and with PyTorch's."""
    monkeypatch.setattr(calibration, "product_speeds", lambda *_: Speeds(speed, speed, speed))
    block, exact = (randomize(I2RMB(48, 3, out_dim=40)).to(kind) for kind in (dtype, torch.float64))
    exact.load_state_dict({name: tensor.double() for name, tensor in block.state_dict().items()})
    for module in (block, exact):
        module.conv_norm.train(statistics == "batch")
    hidden = torch.randn(2, 16, 16, 48).to(dtype).requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    with use_backend("native"):
        out = block(hidden)
    with use_backend("reference"):
        expected = exact(exact_hidden)
    assert "train_block" in type(out.grad_fn).__name__
    assert_close(out, expected, dtype)
    grad = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, [hidden, *block.parameters()], grad)
    wanted = torch.autograd.grad(expected, [exact_hidden, *exact.parameters()], grad.double())
    for actual, want in zip(grads, wanted, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, want, dtype)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(block.conv_norm, name), getattr(exact.conv_norm, name), dtype)


def test_the_training_operators_are_registered_as_pytorch_wants_them():
    windows, own = Windows(8, 2, 4, 4), [True, False] * 3
    for bias in (None, torch.randn(48)):
        x, expansion, projection = torch.randn(2, 8, 8, 8), torch.randn(48, 8), torch.randn(6, 32)
        weight, gamma, beta = torch.randn(32, 1, 3, 3), torch.randn(32), torch.randn(32)
        for tensor in (x, expansion, projection, weight, gamma, beta, *([] if bias is None else [bias])):
            tensor.requires_grad_()
        parts = (x, expansion, bias, projection)
        statistics = (torch.zeros(32), torch.ones(32))
        arguments = (*parts, own, *windows, weight, gamma, beta, *statistics, True, 1e-5)
        torch.library.opcheck(training._train_block, arguments)
        with torch.no_grad():
            out, *kept = training._train_block(*arguments)
            given = [None if tensor is None else tensor.detach() for tensor in (*parts, weight, gamma, beta)]
            torch.library.opcheck(training._train_block_backward, (out, *given, *kept, own, *windows, True, 1e-5))


def test_a_block_with_frozen_parameters_trains_the_others():
    block = randomize(I2RMB(16, 2))
    hidden = torch.randn(2, 8, 8, 16)
    names = [name for name, _ in block.named_parameters() if name != "conv.weight"]
    whole = torch.autograd.grad(block(hidden).sum(), [block.get_parameter(name) for name in names])
    block.conv.requires_grad_(False)
    out = block(hidden)
    assert "train_block" not in type(out.grad_fn).__name__
    out.sum().backward()
    assert block.conv.weight.grad is None
    for name, wanted in zip(names, whole, strict=True):
        assert_close(block.get_parameter(name).grad, wanted, torch.float32)


def test_hooked_modules_are_called():
    block = randomize(I2RMB(16, 2)).eval()
    hidden = torch.randn(1, 8, 8, 16)
    with torch.no_grad():
        expected = block(hidden)
    calls = []
    for name in ("attn", "attn.to_qkv", "conv", "conv_norm", "proj_out"):
        block.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with torch.no_grad():
        torch.testing.assert_close(block(hidden), expected, atol=1e-5, rtol=1e-5)
    assert calls == ["attn.to_qkv", "attn", "conv", "conv_norm", "proj_out"]


def test_another_norm_in_place_of_batch_norm_is_used():
    block = randomize(I2RMB(16, 2))
    block.conv_norm = nn.GroupNorm(4, 64)
    hidden = torch.randn(1, 8, 8, 16)
    with use_backend("reference"):
        expected = block(hidden)
    torch.testing.assert_close(block(hidden), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"dilation": 2}, {"padding": 0}, {"bias": True}, {"groups": 1}, {"kernel_size": 9},
                {"kernel_size": (3, 5)}, {"padding_mode": "circular"}]
)  # fmt: skip
def test_other_convolutions_are_left_to_pytorch(options):
    hidden, _, norm = local_case((1, 8, 8, 4), 3, torch.float32)
    usual = {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False}
    assert local.fusible(hidden, nn.Conv2d(4, 4, **usual), norm)
    assert not local.fusible(hidden, nn.Conv2d(4, 4, **{**usual, **options}), norm)


def test_one_pixel_a_channel_has_no_variance():
    block = randomize(I2RMB(16, 2)).train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        block(torch.randn(1, 1, 1, 16))


def test_cumulative_batch_norm_average():
    hidden, conv, norm = local_case((2, 4, 4, 8), 3, torch.float32)
    norm.momentum = None
    norm.reset_running_stats()
    other = nn.BatchNorm2d(8, momentum=None)
    other.load_state_dict(norm.state_dict())
    for _ in range(3):
        local.local_branch(hidden, conv, norm)
        local.reference(hidden, conv, other)
        hidden = hidden + 1
    torch.testing.assert_close(norm.running_mean, other.running_mean)
    torch.testing.assert_close(norm.running_var, other.running_var)


@pytest.mark.parametrize(
    ("training", "compiler", "speed"), [(True, "inductor", 2.0), (True, "aot_eager", 0.0), (False, "aot_eager", 2.0)]
)
def test_a_block_compiles_into_one_graph(monkeypatch, training, compiler, speed):
    monkeypatch.setattr(
        calibration, "product_speeds", lambda *_: Speeds(speed, speed, speed)
    )  # of the kernels' own products
    model = tiny_model().train(training)
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([3.0, 500.0]), torch.tensor([1, 2]))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> list[torch.Tensor]:
        with torch.set_grad_enabled(training):
            sample = model(*inputs).sample
        grads = torch.autograd.grad(sample.square().mean(), parameters, allow_unused=True) if training else ()
        return [sample, *(grad for grad in grads if grad is not None)]

    expected = run()
    for block in model.blocks:
        block.compile(fullgraph=True, backend=compiler)
    for actual, want in zip(run(), expected, strict=True):
        assert_close(actual, want, torch.float32)


@pytest.mark.parametrize("speed", [0.0, 2.0])
def test_multiply_adds_are_counted_with_kernels_too(monkeypatch, speed):
    monkeypatch.setattr(calibration, "product_speeds", lambda *_: Speeds(speed, speed, speed))
    model = create_model("D-EMOv2-N-2", num_classes=10)
    with use_backend("reference"):
        expected = count_macs(model)
    with use_backend("native"):
        assert count_macs(model) == expected


def test_backends_can_be_chosen(monkeypatch):
    with pytest.raises(ValueError, match="'cuda' are unknown; use one of auto, reference, native"):
        set_backend("cuda")
    with use_backend("reference"):
        assert backend_report("cpu") == "plain PyTorch, as chosen"
    assert backend_report("cpu") == "C++"
    with use_backend("native"), pytest.raises(RuntimeError, match=r"no native kernels here: torch\.float16"):
        attention.window_attention(*attention_case("remote", torch.float16)[:2], WINDOWS["remote"][1])


@pytest.mark.parametrize(
    ("compiler", "message"), [("/nonexistent/c++", "no C++ compiler was found"), ("false", "returned non-zero")]
)
def test_without_a_working_compiler_plain_pytorch_runs(monkeypatch, tmp_path, compiler, message):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("D_EMO_CACHE", str(tmp_path))
    for function in (cpu.obstacle, cpu._libraries):
        function.cache_clear()
    try:
        model, inputs = tiny_model(), (torch.randn(1, 4, 16, 16), 0, torch.tensor([1]))
        with torch.no_grad():
            assert torch.isfinite(model(*inputs).sample).all()
        assert message in backend_report("cpu")
        assert not list(tmp_path.iterdir())
    finally:
        for function in (cpu.obstacle, cpu._libraries):
            function.cache_clear()


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_kernels_that_fail_their_check_are_not_used(monkeypatch, fault):
    def broken(library, function, *arguments):
        call(library, function, *arguments)
        if function == "local_backward":
            if fault == "raises":
                raise OSError("illegal instruction")
            arguments[-1].mul_(float("nan") if fault == "nan" else 1.1)

    call = cpu.call
    monkeypatch.setattr(cpu, "call", broken)
    backend._failure.cache_clear()
    try:
        with torch.no_grad():
            tiny_model()(torch.randn(1, 4, 16, 16), 0, torch.tensor([1]))
        reason = "OSError: illegal instruction" if fault == "raises" else "the local branch is off by"
        assert f"plain PyTorch (their check failed, {reason}" in backend_report("cpu")
    finally:
        backend._failure.cache_clear()
    monkeypatch.undo()
    assert backend_report("cpu") == "C++"


def test_the_check_leaves_the_callers_random_numbers_alone():
    before = torch.get_rng_state()
    assert selfcheck.failure("cpu") == ""
    assert torch.equal(torch.get_rng_state(), before)
