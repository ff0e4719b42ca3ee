"""The fast kernels against plain PyTorch: C++ on the CPU here, Triton in its interpreter in test_triton.py."""

import ast
import copy
import dataclasses
import graphlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.kernel_cases import TOLERANCE, WINDOWS, assert_close, attention_case, local_case
from helpers.models import randomize, tiny_model
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from d_emo import create_model, models
from d_emo.kernels import backend_report, cpp, dispatch, fused, reference, set_backend, use_backend
from d_emo.kernels.attention import attention_backward_operator, attention_operator
from d_emo.kernels.cpp import binding, build
from d_emo.kernels.local import fusible, local_backward_operator, local_branch, local_operator
from d_emo.kernels.reference import Windows
from d_emo.models import I2RMB
from d_emo.models.flops import count_macs

pytestmark = pytest.mark.skipif(bool(build.obstacle()), reason=f"no C++ kernels here: {build.obstacle()}")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", WINDOWS)
def test_attention_and_its_gradient_equal_the_reference(name, dtype):
    qkv, grad, windows = attention_case(name, dtype)
    exact = qkv.double().requires_grad_()
    out = attention_operator(qkv.requires_grad_(), windows)
    expected = reference.window_attention(exact, windows)
    assert_close(out, expected, dtype)
    (actual,) = torch.autograd.grad(out, qkv, grad)
    assert_close(actual, torch.autograd.grad(expected, exact, grad.double())[0], dtype)


@pytest.mark.parametrize("windows", [Windows(8, 2, 0, 4), Windows(8, 2, -4, 4), Windows(8, 3, 4, 4),
                                     Windows(8, 2, 3, 4), Windows(0, 2, 4, 4), Windows(8, 0, 4, 4),
                                     Windows(16, 2, 4, 4)])  # fmt: skip
def test_windows_that_do_not_divide_the_grid_are_refused(windows):
    qkv = torch.randn(1, 8, 8, 32)
    for call in (lambda: attention_operator(qkv, windows), lambda: attention_backward_operator(qkv, qkv, windows)):
        with pytest.raises((ValueError, ZeroDivisionError, RuntimeError)) as caught:
            call()
        assert "do not divide a grid of (1, 8, 8)" in str(caught.value)


def test_gelu_is_as_close_as_pytorchs():
    """A window of one token attends to itself, so the result is GELU of its value; far from zero, too."""
    values = torch.cat([torch.linspace(-12, 12, 64 * 64 * 15), torch.linspace(-1e4, 1e4, 64 * 64)]).view(1, 64, 64, 16)
    qkv = torch.cat([torch.zeros(1, 64, 64, 2), values], dim=-1).requires_grad_()
    out = attention_operator(qkv, Windows(1, 1, 1, 1, 1, 0))
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
        out = local_branch(hidden, conv, norm)
    expected = reference.local_branch(exact[0], exact_conv, exact_norm)
    assert_close(out, expected, dtype)
    grads = torch.autograd.grad(out, inputs, grad)
    for actual, wanted in zip(grads, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_close(actual, wanted, dtype)
    assert norm.num_batches_tracked == exact_norm.num_batches_tracked
    assert_close(norm.running_mean, exact_norm.running_mean, dtype)
    assert_close(norm.running_var, exact_norm.running_var, dtype)


def test_gradients_equal_finite_differences():
    qkv = torch.randn(1, 4, 4, 2 * 4 + 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention_operator(x, Windows(4, 2, 2, 2)), qkv)
    hidden, conv, norm = local_case((2, 3, 4, 3), 3, torch.float64)
    hidden.requires_grad_()
    for batch_statistics in (True, False):
        arguments = (norm.running_mean, norm.running_var, batch_statistics, 1e-5)
        assert torch.autograd.gradcheck(
            lambda *x, given=arguments: local_operator(*x, *given)[0],
            (hidden, conv.weight, norm.weight, norm.bias),
        )


def test_operators_are_registered_as_pytorch_wants_them():
    """Shapes, strides and types that compilers are told, mutation, gradients; for inputs in any memory order."""
    qkv, grad, windows = attention_case("remote", torch.float32)
    hidden, conv, norm = local_case((1, 4, 4, 8), 3, torch.float32)
    weights = tuple(tensor.detach() for tensor in (conv.weight, norm.weight, norm.bias))
    statistics = (norm.running_mean, norm.running_var)
    channels = grad.shape[-1]
    folded = (torch.rand(9, channels), torch.rand(channels))
    for order in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)):
        x, g, h = order(qkv), order(grad), order(hidden)
        torch.library.opcheck(attention_operator, (x.clone().requires_grad_(), windows))
        torch.library.opcheck(attention_backward_operator, (g, x, windows))
        torch.library.opcheck(local_operator, (h.clone().requires_grad_(), *weights, *statistics, True, 1e-5))
        torch.library.opcheck(local_backward_operator, (h, h, h.new_empty(0), *weights, *statistics, True, 1e-5))
        products = (torch.rand(qkv.shape[-1], windows.dim), torch.rand(qkv.shape[-1]), torch.rand(10, channels))
        pixels = torch.rand(*qkv.shape[:3], windows.dim)
        torch.library.opcheck(fused.infer_operator, (order(pixels), *products, windows, *folded))


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


def infers(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs of all calls of a block as one operation, from now on."""
    calls, run = [], fused.infer_operator
    monkeypatch.setattr(fused, "infer_operator", lambda x, *rest: (calls.append(tuple(x.shape)), run(x, *rest))[1])
    return calls


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("dim", "heads", "expansion", "out_dim", "grid"),
    [(48, 3, 4, 48, (16, 16)), (72, 1, 5, 100, (8, 24)), (400, 2, 4, 400, (8, 16)), (20, 2, 1.5, 14, (8, 8))],
)
@torch.no_grad()
def test_fused_inference_equals_the_plain_forward(monkeypatch, dim, heads, expansion, out_dim, grid, dtype):
    """Also where heads fill no whole vector or panel, and sums go beyond one piece of the depth."""
    monkeypatch.setattr(dispatch, "_has", lambda *_: True)
    block = randomize(I2RMB(dim, heads, expansion, out_dim=out_dim)).to(dtype).eval()
    hidden, calls = torch.randn(5, *grid, dim).to(dtype), infers(monkeypatch)
    with use_backend("native"):
        out = block(hidden)
    assert calls == [tuple(hidden.shape)]
    with use_backend("reference"):
        assert_close(out, block.double()(hidden.double()), dtype)


def test_fused_inference_is_chosen_by_itself(monkeypatch):
    """Without gradients and in eval mode only; by copies, too, and never by a block with another part or a hook."""
    monkeypatch.setattr(dispatch, "_has", lambda *_: True)
    block, hidden = randomize(I2RMB(16, 2)).eval(), torch.randn(2, 8, 8, 16)
    calls = infers(monkeypatch)
    block(hidden)
    assert calls == []
    with torch.no_grad():
        expected = block(hidden)
        copied = copy.deepcopy(block)
        assert torch.equal(copied(hidden), expected)
        assert len(calls) == 2
        copied.proj_out.weight.mul_(2)
        torch.testing.assert_close(copied(hidden), 2 * expected)
        calls.clear()
        block.train()(hidden)
        block.eval()(torch.randn(2, 9, 8, 16))  # padded
        block.attn.register_forward_hook(lambda *_: None)
        block(hidden)
        assert calls == []


def test_a_forward_mode_derivative_is_plain_pytorchs():
    block, hidden = randomize(I2RMB(16, 2)).eval(), torch.randn(2, 8, 8, 16)
    tangent = torch.randn_like(hidden)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            actual = torch.func.jvp(block, (hidden,), (tangent,))[1]
            with use_backend("reference"):
                expected = torch.func.jvp(block, (hidden,), (tangent,))[1]
                difference = block.double()(hidden.double() + 1e-6 * tangent) - block(hidden.double() - 1e-6 * tangent)
            block.float()
        torch.testing.assert_close(actual, expected)
        assert_close(actual, difference / 2e-6, torch.float32)


@pytest.mark.parametrize("looking_on", ["checkpoint", "flops", "fake"])
def test_the_check_before_first_use_is_not_seen_by_what_looks_on(looking_on):
    """Neither recomputed by activation checkpointing, nor counted, nor run on tensors without values."""
    block, hidden = randomize(I2RMB(16, 2)), torch.randn(2, 8, 8, 16, requires_grad=True)

    def run():
        if looking_on == "checkpoint":
            checkpoint(block, hidden, use_reentrant=False).sum().backward()
            return None
        if looking_on == "flops":
            with FlopCounterMode(display=False) as counter:
                block(hidden)
            return counter.get_total_flops()
        with FakeTensorMode(allow_non_fake_inputs=True):
            return block(hidden).shape

    cpp.BACKEND.obstacle.cache_clear()
    first = run()
    assert backend_report("cpu") == "C++"
    assert first == run()


def test_gradients_by_torch_func_are_those_of_autograd():
    """`torch.func.grad`, and `vmap` of it: the gradients of each sample, of input and parameters."""
    block, hidden = randomize(I2RMB(16, 2)).eval(), torch.randn(3, 8, 8, 16)
    parameters = dict(block.named_parameters())

    def loss(parameters, sample):
        return torch.func.functional_call(block, parameters, (sample[None],)).square().sum()

    loss(parameters, hidden[0]).backward()  # the kernels' check before first use, which no transform may look on
    detached = {name: value.detach() for name, value in parameters.items()}
    of_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, 0))(detached, hidden)
    for index, sample in enumerate(hidden):
        sample = sample.clone().requires_grad_()
        expected = torch.autograd.grad(block(sample[None]).square().sum(), [*parameters.values(), sample])
        actual = [*(of_sample[0][name][index] for name in parameters), of_sample[1][index]]
        torch.testing.assert_close(actual, list(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("slower", [True, False])
def test_a_block_trains_as_the_reference_does(monkeypatch, slower, statistics, dtype):
    """Result, all gradients and running statistics, with the kernels' products and with PyTorch's."""
    monkeypatch.setattr(dispatch, "_has", lambda operator, *_: not slower or operator != "linear")
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
    assert ("d_emo_linear" in type(out.grad_fn).__name__) == (not slower)
    assert_close(out, expected, dtype)
    grad = torch.randn(out.shape).to(dtype)
    grads = torch.autograd.grad(out, [hidden, *block.parameters()], grad)
    wanted = torch.autograd.grad(expected, [exact_hidden, *exact.parameters()], grad.double())
    for actual, want in zip(grads, wanted, strict=True):
        assert actual.dtype == dtype
        assert_close(actual, want, dtype)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(block.conv_norm, name), getattr(exact.conv_norm, name), dtype)


def test_a_block_with_frozen_parameters_trains_the_others():
    block = randomize(I2RMB(16, 2))
    hidden = torch.randn(2, 8, 8, 16)
    names = [name for name, _ in block.named_parameters() if name != "conv.weight"]
    whole = torch.autograd.grad(block(hidden).sum(), [block.get_parameter(name) for name in names])
    block.conv.requires_grad_(False)
    block(hidden).sum().backward()
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
    assert fusible(nn.Conv2d(4, 4, **usual), norm, hidden, 4)
    assert not fusible(nn.Conv2d(4, 4, **{**usual, **options}), norm, hidden, 4)


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
        local_branch(hidden, conv, norm)
        reference.local_branch(hidden, conv, other)
        hidden = hidden + 1
    torch.testing.assert_close(norm.running_mean, other.running_mean)
    torch.testing.assert_close(norm.running_var, other.running_var)


@pytest.mark.parametrize(
    ("training", "compiler"),
    [pytest.param(True, "inductor", marks=pytest.mark.slow), (True, "aot_eager"), (False, "aot_eager")],
)
def test_a_block_compiles_into_one_graph(training, compiler):
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


def test_multiply_adds_are_counted_with_kernels_too():
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
        local_branch(*local_case((1, 4, 4, 8), 3, torch.float16))


@pytest.mark.parametrize(
    ("compiler", "message"), [("/nonexistent/c++", "no C++ compiler was found"), ("false", "returned non-zero")]
)
def test_without_a_working_compiler_plain_pytorch_runs(monkeypatch, tmp_path, compiler, message):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("D_EMO_CACHE", str(tmp_path))
    caches = (build.obstacle, build.library, cpp._obstacle)
    for function in caches:
        function.cache_clear()
    try:
        model, inputs = tiny_model(), (torch.randn(1, 4, 16, 16), 0, torch.tensor([1]))
        with torch.no_grad():
            assert torch.isfinite(model(*inputs).sample).all()
        assert message in backend_report("cpu")
        assert not list(tmp_path.iterdir())
    finally:
        for function in caches:
            function.cache_clear()


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises"])
def test_kernels_that_fail_their_check_are_not_used(monkeypatch, fault):
    def broken(function, *arguments):
        call(function, *arguments)
        if function == "local_backward":
            if fault == "raises":
                raise OSError("illegal instruction")
            arguments[-1].mul_(float("nan") if fault == "nan" else 1.1)

    call = binding.call
    monkeypatch.setattr(binding, "call", broken)
    cpp._obstacle.cache_clear()
    try:
        with torch.no_grad():
            tiny_model()(torch.randn(1, 4, 16, 16), 0, torch.tensor([1]))
        reason = "OSError: illegal instruction" if fault == "raises" else "the local branch is off by"
        assert f"plain PyTorch (their check failed, {reason}" in backend_report("cpu")
    finally:
        cpp._obstacle.cache_clear()
    monkeypatch.undo()
    assert backend_report("cpu") == "C++"


def test_the_check_leaves_the_callers_random_numbers_alone():
    before = torch.get_rng_state()
    cpp._obstacle.cache_clear()
    assert cpp._obstacle(torch.float32) == ""
    assert torch.equal(torch.get_rng_state(), before)


# ---- the folder itself ---------------------------------------------------------------------------------------------


def imported(path: Path) -> set[str]:
    """Modules of the kernels that a module imports, functions' own imports left out."""
    package = Path(reference.__file__).parent
    parts = path.relative_to(package).with_suffix("").parts
    name, found = ".".join(part for part in parts if part != "__init__"), set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.ImportFrom) or not node.level or node.level > len(parts):
            continue
        base = ".".join([*parts[: len(parts) - node.level], *(node.module or "").split(".")]).strip(".")
        for alias in node.names:
            inner = f"{base}.{alias.name}".strip(".")
            is_module = (package / inner.replace(".", "/")).is_dir() or (
                package / f"{inner.replace('.', '/')}.py"
            ).exists()
            found.add(inner if is_module else base)
    return found - {name}


def test_no_module_imports_itself_by_way_of_others():
    package = Path(reference.__file__).parent
    graph = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        graph[".".join(part for part in parts if part != "__init__")] = imported(path)
    assert {"dispatch", "reference"} <= graph["attention"] and "cpp" in graph[""]
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_model_knows_two_operators_and_the_decorator():
    source = (Path(models.__file__).parent / "i2rmb.py").read_text(encoding="utf-8")
    names = [
        (node.module, alias.name)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and "kernels" in (node.module or "")
        for alias in node.names
    ]
    assert names == [("kernels", name) for name in ("local_branch", "use_fused_forward", "window_attention")]


def test_every_operator_has_a_definition_in_plain_pytorch():
    for name in ("window_attention", "local_branch"):
        assert callable(getattr(reference, name))
    assert {name.removesuffix("_backward") for name in dispatch.OPERATORS} == {
        *("window_attention", "local_branch", "linear", "infer_block")
    }
    for backend in dispatch._table.values():
        assert set(backend.operators) <= set(dispatch.OPERATORS)


def test_a_backend_is_an_entry_in_the_table(monkeypatch):
    """A backend for another device is chosen for its tensors; what it lacks is left to plain PyTorch."""
    monkeypatch.setattr(dispatch, "_table", dict(dispatch._table))
    entry = dataclasses.replace(cpp.BACKEND, name="other", operators={"window_attention": lambda qkv, windows: qkv})
    dispatch.register("privateuseone", entry)
    tensor = SimpleNamespace(
        device=torch.device("privateuseone"), dtype=torch.float32, is_meta=False, shape=(1, 4, 4, 8), numel=lambda: 128
    )
    assert dispatch.takes("window_attention", tensor, Windows(2, 1, 2, 2))
    assert not dispatch.takes("local_branch", tensor)
    assert backend_report("privateuseone") == "other"
    with pytest.raises(ValueError, match="backend other: attention is none of window_attention"):
        dispatch.register("privateuseone", dataclasses.replace(entry, operators={"attention": print}))
