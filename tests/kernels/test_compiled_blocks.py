"""What compiled and exported blocks hold: the kernels in a compiled graph, PyTorch's operators alone in a file."""

import collections
import dataclasses

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers.kernel_cases import assert_close
from helpers.models import randomize, tiny_model
from torch._dynamo.backends.common import aot_autograd

from d_emo.kernels import cpp, dispatch
from d_emo.kernels import triton as gpu
from d_emo.kernels.cpp import build
from d_emo.models import I2RMB

pytestmark = pytest.mark.skipif(bool(build.obstacle()), reason=f"no C++ kernels here: {build.obstacle()}")

BOTH = ("window_attention", "local_branch")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The choice that is made for CUDA, with C++ to run what Triton has; all checks pass."""
    operators = {name: cpp.BACKEND.operators[name] for name in gpu.BACKEND.operators}
    monkeypatch.setattr(gpu, "first_failure", lambda *_: "")
    monkeypatch.setattr(gpu, "_failures", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    entry = dataclasses.replace(gpu.BACKEND, operators=operators, dtypes=cpp.BACKEND.dtypes, keeps_convolution=False)
    monkeypatch.setattr(dispatch, "_table", {"cpu": entry})


def compiled_operators(model: torch.nn.Module) -> collections.Counter:
    """Compile every block; what is counted are our operators in the graphs that compilers get, and "graphs"."""
    seen: collections.Counter = collections.Counter()

    def keep(graph, _):
        seen["graphs"] += 1
        names = (str(node.target).removesuffix(".default") for node in graph.graph.nodes if node.op == "call_function")
        seen.update(name.removeprefix("d_emo.") for name in names if name.startswith("d_emo."))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep, inference_compiler=keep)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    return seen


def run(model: torch.nn.Module, training: bool, autocast: bool) -> list[torch.Tensor]:
    """The sample, and in training the gradients."""
    inputs = (torch.randn(2, 4, 16, 16), torch.tensor([3.0, 500.0]), torch.tensor([1, 2]))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sample = model(*inputs).sample.float()
    grads = torch.autograd.grad(sample.square().mean(), parameters, allow_unused=True) if training else ()
    return [sample, *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_compiled_blocks_hold_the_kernels(request, monkeypatch, device, training, autocast):
    """One graph for all blocks (two with the backward pass), and in it what runs without compilation."""
    if device == "gpu":
        request.getfixturevalue("as_on_a_gpu")
        expected = BOTH if autocast else BOTH[1:]  # attention in float32 is left to PyTorch
    else:
        expected = BOTH if training or autocast else ("infer_block",)
    torch._dynamo.reset()
    monkeypatch.setattr(dispatch, "_choice", None)  # as in a process that has asked for nothing yet
    model = tiny_model(num_layers=3).train(training)
    torch.manual_seed(0)
    want = run(model, training, autocast)
    seen = compiled_operators(model)
    torch.manual_seed(0)
    for actual, wanted in zip(run(model, training, autocast), want, strict=True):
        assert_close(actual, wanted, torch.bfloat16 if autocast else torch.float32)
    counted = {"graphs": 1 + training, **dict.fromkeys(expected, 1)}
    if training:
        counted |= {f"{name}_backward": 1 for name in expected}
    assert {name: count for name, count in seen.items() if not name.startswith("linear")} == counted


def test_a_compiled_graph_follows_a_choice_made_later(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(dispatch, "_choice", None)
    model = tiny_model(num_layers=1).eval()
    seen = compiled_operators(model)
    run(model, False, False)
    assert seen == {"graphs": 1, "infer_block": 1}
    with dispatch.use_backend("reference"):
        run(model, False, False)
    run(model, False, False)
    assert seen == {"graphs": 2, "infer_block": 1}


def test_a_compiled_transform_is_plain_pytorchs():
    """`torch.func.grad` within a compiled function, where no kernel takes part."""
    block, hidden = randomize(I2RMB(16, 2)).eval(), torch.randn(2, 8, 8, 16)

    def gradient(hidden):
        return torch.func.grad(lambda x: block(x).square().sum())(hidden)

    want = gradient(hidden)
    torch.testing.assert_close(torch.compile(gradient, backend="eager")(hidden), want, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # and the kernels afterwards
        torch.testing.assert_close(torch.compile(block, backend="eager")(hidden), block(hidden))


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_block_holds_pytorchs_operators_only(strict):
    block, hidden = randomize(I2RMB(16, 2)).eval(), torch.randn(2, 8, 8, 16)
    with torch.no_grad():
        program = torch.export.export(block, (hidden,), strict=strict)
        assert "d_emo" not in program.graph_module.code
        torch.testing.assert_close(program.module()(hidden), block(hidden), atol=1e-5, rtol=1e-5)
