"""What the kernels refuse, so that no size makes them read past an end, and what they leave alone."""

import contextlib

import pytest
import torch
from helpers.kernel_cases import local_case
from helpers.models import randomize, tiny_model
from torch import nn

from d_emo.kernels import local_branch, use_backend, window_attention
from d_emo.kernels.attention import attention_backward_operator, attention_operator
from d_emo.kernels.cpp import build
from d_emo.kernels.fused import infer_operator
from d_emo.kernels.linear import linear_backward_operator, linear_operator
from d_emo.kernels.local import local_backward_operator, local_operator
from d_emo.models import I2RMB

pytestmark = pytest.mark.skipif(bool(build.obstacle()), reason=f"no C++ kernels here: {build.obstacle()}")
WINDOWS = [16, 2, 4, 4, 1, 1]
QKV, GRID = (1, 8, 8, 64), (1, 8, 8, 16)  # 16 query channels, 16 key channels, 32 value channels

# Arguments that each operator takes; tensors by shape.
OPERATORS = {
    "window_attention": (attention_operator, {"qkv": QKV, "windows": WINDOWS}),
    "window_attention_backward": (attention_backward_operator, {"grad": (1, 8, 8, 32), "qkv": QKV, "windows": WINDOWS}),
    "local_branch": (
        local_operator,
        {"x": GRID, "weight": (16, 1, 3, 3), "gamma": (16,), "beta": (16,), "mean": (16,), "variance": (16,),
         "batch": True, "eps": 1e-5},
    ),
    "local_branch_backward": (
        local_backward_operator,
        {"grad": GRID, "x": GRID, "kept": GRID, "weight": (16, 1, 3, 3), "gamma": (16,), "beta": (16,),
         "mean": (16,), "variance": (16,), "batch": True, "eps": 1e-5},
    ),
    "linear": (linear_operator, {"x": (64, 16), "weight": (8, 16), "bias": (8,)}),
    "linear_backward": (linear_backward_operator, {"grad": (64, 8), "x": (64, 16), "weight": (8, 16)}),
    "infer_block": (
        infer_operator,
        {"x": GRID, "expansion": (64, 16), "bias": (64,), "projection": (16, 32), "windows": WINDOWS, "taps": (9, 32),
         "summand": (32,)},
    ),
}  # fmt: skip


def made(value):
    return torch.rand(value) + 0.1 if isinstance(value, tuple) else value


def wrong_tensors(tensor):
    """The same tensor with every kind of mistake."""
    yield "shape", torch.rand(*tensor.shape[:-1], tensor.shape[-1] + 1)
    yield "shape", torch.rand(*tensor.shape[:-1], 1) if tensor.shape[-1] > 1 else tensor[..., :0]
    yield "dimensions", tensor[0]
    yield "dimensions", tensor[None]
    yield "empty", torch.empty(0)
    yield "device", tensor.to("meta")
    yield "layout", tensor.to_sparse()
    yield "numbers", tensor.long()
    yield "numbers", tensor.to(torch.complex64)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_refuse_what_does_not_fit(name):
    operator, shapes = OPERATORS[name]
    arguments = {key: made(value) for key, value in shapes.items()}
    operator(*arguments.values())
    for key, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        for _, wrong in wrong_tensors(value):
            with contextlib.suppress(ValueError, RuntimeError, NotImplementedError, IndexError):
                result = operator(*{**arguments, key: wrong}.values())
                # Right without an error: another batch's product, shapes of a tensor of shapes alone, nothing kept.
                other_batch = key == "x" and wrong.shape[-1] == value.shape[-1] and wrong.device == value.device
                only_shapes = key == "qkv" and wrong.is_meta and result.is_meta
                nothing_kept = key == "kept" and wrong.shape == (0,)
                assert other_batch or only_shapes or nothing_kept, (key, wrong.shape, wrong.dtype, wrong.device, result)


@pytest.mark.parametrize("name", [name for name in OPERATORS if "windows" in OPERATORS[name][1]])
@pytest.mark.parametrize(
    "windows",
    [
        [16, 2, 0, 4, 1, 1], [16, 2, -4, 4, 1, 1], [16, 2, 4, -4, 1, 1], [16, 0, 4, 4, 1, 1], [16, -2, 4, 4, 1, 1],
        [16, 3, 4, 4, 1, 1], [0, 2, 4, 4, 1, 1], [-16, 2, 4, 4, 1, 1], [32, 2, 4, 4, 1, 1], [16, 2, 3, 4, 1, 1],
        [16, 2, 16, 16, 1, 1], [16, 2, 4, 4, 0, 0], [16, 2, 4, 4, -1, 1], [16, 2, 4, 4], [], [2**40, 2, 4, 4, 1, 1],
    ],
    ids=str,
)  # fmt: skip
def test_windows_that_do_not_divide_are_refused(name, windows):
    operator, shapes = OPERATORS[name]
    with pytest.raises(ValueError, match=r"windows=|do not divide a grid"):
        operator(*{**{key: made(value) for key, value in shapes.items()}, "windows": windows}.values())


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": (0, 4)}, "window height=0 is not a whole number"),
        ({"window": (-4, 4)}, "window height=-4 is not a whole number"),
        ({"window": (3, 4)}, "do not divide a grid of"),
        ({"window": (4.0, 4)}, "window height=4.0 is not a"),
        ({"window": 4}, "window=4 is not"),
        ({"num_heads": 0}, "num_heads=0 is not a whole number"),
        ({"num_heads": 3}, "do not divide"),
        ({"num_heads": "2"}, "num_heads='2' is not a"),
        ({"dim": 0}, "dim=0 is not a whole number"),
        ({"dim": 32}, "do not divide"),
        ({"attention_type": "none"}, "attention_type='none' is not one of"),
        ({"attention_type": None}, "attention_type=None is not one of"),
        ({"qkv": torch.zeros(8, 8, 64)}, r"is \(8, 8, 64\), not a tensor"),
        ({"qkv": torch.ones(QKV, dtype=torch.long)}, "is torch.int64"),
        ({"qkv": None}, "is NoneType"),
    ],
    ids=str,
)
def test_window_attention_names_what_is_wrong(backend, change, message):
    arguments = {"qkv": torch.rand(QKV), "attention_type": "spanning", "dim": 16, "num_heads": 2, "window": (4, 4)}
    with use_backend(backend), pytest.raises(ValueError, match=message):
        window_attention(**{**arguments, **change})


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_local_branch_takes_no_other_channels(backend):
    hidden, conv, norm = local_case((1, 8, 8, 16), 3, torch.float32)
    with use_backend(backend):
        for wrong, error in ((hidden[0], ValueError), (hidden.long(), ValueError), (hidden[..., :8], RuntimeError),
                             (torch.cat([hidden, hidden], -1), RuntimeError), (None, ValueError)):  # fmt: skip
            with pytest.raises(error):
                local_branch(wrong, conv, norm)
        with pytest.raises((RuntimeError, ValueError)):
            local_branch(hidden, conv, nn.BatchNorm2d(8))


@pytest.mark.parametrize("backend", ["auto", "reference", "native"])
@pytest.mark.parametrize("family", ["D-EMOv2", "DiT"])
@pytest.mark.parametrize("grad", [False, True])
def test_no_samples_give_no_samples(family, backend, grad):
    model = tiny_model(family)
    inputs = torch.zeros(0, 4, 16, 16), torch.zeros(0), torch.zeros(0, dtype=torch.long)
    with use_backend(backend), torch.set_grad_enabled(grad):
        assert model(*inputs).sample.shape == (0, 8, 16, 16)


def test_second_derivatives_say_what_to_do():
    block = randomize(I2RMB(16, 2, 2.0, 4, 3)).eval()
    tokens = torch.randn(1, 8, 8, 16, requires_grad=True)
    (first,) = torch.autograd.grad(block(tokens).square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match=r"first derivatives only; .*use_backend\(\"reference\"\)"):
        first.sum().backward()
    with use_backend("reference"):
        (first,) = torch.autograd.grad(block(tokens).square().sum(), tokens, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), tokens)
    assert second.abs().max() > 0


def watched_by_all(seen):
    return nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(type(module)))


def watched_before_by_all(seen):
    return nn.modules.module.register_module_forward_pre_hook(lambda module, *_: seen.add(type(module)))


class ReplacedForward:
    """A class's forward, replaced for all its modules, as profilers and quantizers do."""

    def __init__(self, seen):
        self.forward = nn.Linear.forward
        nn.Linear.forward = lambda module, *inputs: (seen.add(type(module)), self.forward(module, *inputs))[1]

    def remove(self):
        nn.Linear.forward = self.forward


@pytest.mark.parametrize("watch", [watched_by_all, watched_before_by_all, ReplacedForward])
@pytest.mark.parametrize("grad", [False, True])
def test_who_watches_every_module_sees_every_module(watch, grad):
    block = randomize(I2RMB(16, 2, 2.0, 4, 3)).eval()
    tokens, seen = torch.randn(8, 8, 8, 16), set()
    with torch.set_grad_enabled(grad):
        expected = block(tokens)
        handle = watch(seen)
        try:
            found = block(tokens)
        finally:
            handle.remove()
        wanted = {nn.Linear} if watch is ReplacedForward else {nn.Linear, nn.Conv2d, nn.BatchNorm2d}
        assert wanted <= seen
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
