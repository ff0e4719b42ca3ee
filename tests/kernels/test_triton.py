"""The Triton kernels' results (on the GPU if there is one, else in Triton's interpreter), compilation and choice."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import TESTS
from torch._subclasses import FakeTensorMode

from d_emo.kernels import dispatch, selfcheck, use_backend
from d_emo.kernels import triton as backend
from d_emo.kernels.local import local_backward_operator, local_operator
from d_emo.kernels.reference import Windows
from d_emo.models.i2rmb import SpanningWindowAttention

pytest.importorskip("triton")


# Interpreting is slow: attention's windows but for the largest grid and the smallest images in float32, and elsewhere
# every case.
@pytest.mark.parametrize(
    "cases", ["(float32 and not large and not published) or join", pytest.param("", marks=pytest.mark.slow)]
)
def test_triton_kernels_equal_the_reference(cases):
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    tests = TESTS / "helpers" / "triton_cases.py"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", cases, str(tests)]
    done = subprocess.run(command, env={**os.environ, **interpret}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.fixture
def compiled_for(monkeypatch):
    """A function that takes a compute capability; from then on, launches compile for it, and are collected, not run."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    kernels, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        kernels[self.__name__] = run(self, *args, grid=grid, warmup=True, **options)

    def choose(capability: int) -> dict:
        target = GPUTarget("cuda", capability, 32)
        state = {
            "get_current_device": lambda: capability,
            "get_current_stream": lambda _: 0,
            "get_current_target": lambda: target,
        }
        monkeypatch.setattr(driver, "_active", SimpleNamespace(**state))
        monkeypatch.setattr(JITFunction, "run", compile_only)
        return kernels

    return choose


def local_memory(kernel) -> int:
    """Bytes a thread keeps in memory since registers do not suffice, as NVIDIA's cuobjdump tells."""
    from triton import knobs

    path = Path(kernel.metadata_group[f"{kernel.metadata.name}.cubin"])
    usage = subprocess.run(
        [knobs.nvidia.cuobjdump.path, "-res-usage", path], capture_output=True, text=True, check=True
    )
    return int(re.search(r"STACK:(\d+)", usage.stdout)[1])


@pytest.mark.parametrize("capability", [90, pytest.param(80, marks=pytest.mark.slow)])
def test_triton_kernels_fit_gpus_that_are_not_here(monkeypatch, compiled_for, capability):
    """Hopper and Ampere, at the sizes of D-EMOv2-XL-2 in bfloat16, launched as for training."""
    from d_emo.kernels.triton import attention, local

    kernels = compiled_for(capability)
    windows = Windows(1152, 16, 8, 8)
    qkv = torch.zeros(1, 16, 16, 2 * 1152 + 4608, dtype=torch.bfloat16)
    out = attention.forward(qkv, windows)
    attention.backward(out, qkv, windows)
    before = {name: kernel.hash for name, kernel in kernels.items()}
    monkeypatch.setattr(attention, "WANTED_PROGRAMS", 1)  # several pieces for a program
    other = torch.zeros(3, 8, 24, 2 * 1152 + 4608, dtype=torch.bfloat16)
    attention.forward(other, windows)
    attention.backward(torch.zeros(3, 8, 24, 4608, dtype=torch.bfloat16), other, windows)
    assert {name: kernel.hash for name, kernel in kernels.items()} == before, "one code for all batches and grids"
    # RTX cards of capability 8.6 and 8.9 have 99 KiB, others more; the launch fails where it is too little.
    assert set(kernels) == {"_forward_kernel", "_backward_kernel"}
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= 99 * 1024, name
        assert local_memory(kernel) <= 128, name

    kernels.clear()
    parameters = local.Parameters(torch.zeros(25, 4608), *torch.zeros(4, 4608))
    local.forward(out, parameters, True, 1e-5)
    local.backward(out, out, out, parameters, True, 1e-5)
    assert len(kernels) == 7
    before = {name: kernel.hash for name, kernel in kernels.items()}
    other = torch.zeros(3, 1, 7, 4608, dtype=torch.bfloat16)
    local.forward(other, parameters, True, 1e-5)
    local.backward(other, other, other, parameters, True, 1e-5)
    assert {name: kernel.hash for name, kernel in kernels.items()} == before, "one code for all batches and grids"
    local.forward(out, parameters, False, 1e-5)
    assert len(kernels) == 8
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= 48 * 1024, name
        assert local_memory(kernel) == 0, name


@pytest.mark.parametrize("batch", [70_000, 2**31 - 1])
@pytest.mark.parametrize("heads", [1, 4])
def test_grids_end_where_a_gpus_do(monkeypatch, batch, heads):
    """Only the first axis goes beyond 65,535; every image has its programs, in as many launches as it takes."""
    from triton.runtime.jit import JITFunction

    from d_emo.kernels.triton import attention, local

    launches = {}
    monkeypatch.setattr(
        JITFunction,
        "run",
        lambda self, *_, grid, first_image=0, **__: launches.setdefault(self, []).append((grid, first_image)),
    )
    channels = 128 * heads  # so that the local branch, too, has `heads` programs an image
    hidden, affine = torch.empty(batch, 1, 2, channels, device="meta"), torch.empty(4, channels, device="meta")
    parameters = local.Parameters(torch.empty(25, channels, device="meta"), *affine)
    local.forward(hidden, parameters, True, 1e-5)
    local.backward(hidden, hidden, hidden, parameters, True, 1e-5)
    qkv, windows = torch.empty(batch, 1, 2, channels + 2 * 16 * heads, device="meta"), Windows(16 * heads, heads, 1, 2)
    attention.forward(qkv, windows)
    attention.backward(hidden, qkv, windows)
    assert len(launches) == 9
    for kernel, made in launches.items():
        images = 0
        for grid, first in made:
            (programs,) = grid
            assert first == images
            assert 0 < programs < 2**31
            images += programs // heads
        # What goes by value does chunks of the two pixels of each image; statistics are joined by channel, and weights'
        # gradients are parts of some thousands of programs.
        chunks = math.ceil(2 * batch / local.CHUNK)
        assert images in (batch, chunks) or kernel in (local._join_kernel, local._weight_gradient_kernel)


@pytest.mark.parametrize("batch_statistics", [True, False])
def test_what_a_gpu_keeps_for_the_backward_pass_is_foretold(batch_statistics):
    """As plans of memory and compilers ask, on tensors without content."""
    with FakeTensorMode():
        hidden = torch.empty(2, 4, 4, 8, device="cuda", dtype=torch.bfloat16)
        weight, vector = torch.empty(8, 1, 3, 3, device="cuda"), torch.empty(8, device="cuda")
        parameters = (weight, *[vector] * 4, batch_statistics, 1e-5)
        out, *_, kept = local_operator(hidden, *parameters)
        assert kept.shape == (hidden.shape if batch_statistics else (0,))
        grads = local_backward_operator(out, hidden, kept, *parameters)
        assert [grad.shape for grad in grads] == [hidden.shape, weight.shape, vector.shape, vector.shape]


@pytest.fixture
def asked(monkeypatch):
    """Types and shapes of the checks that a GPU would make; they find `asked.failure`."""
    asked = SimpleNamespace(checks=[], failure="", capturing=False)

    def first_failure(device, checks):
        asked.checks += [(name, dtype, shapes[0]) for name, _, _, dtype, shapes in checks]
        return asked.failure

    monkeypatch.setattr(backend, "first_failure", first_failure)
    monkeypatch.setattr(backend, "_failures", {})
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: asked.capturing)
    return asked


def on_gpu(dtype: torch.dtype, *shape: int) -> SimpleNamespace:
    """What is asked of a tensor there."""
    return SimpleNamespace(
        device=torch.device("cuda"), dtype=dtype, is_meta=False, shape=shape, numel=lambda: math.prod(shape)
    )


WINDOWS = Windows(32, 2, 4, 4)


@pytest.mark.parametrize(
    ("dtype", "failure", "message"),
    [
        (torch.float32, "", "attention in float32"),
        (torch.bfloat16, "OutOfResources: shared memory", "their check failed, OutOfResources"),
        (torch.bfloat16, "", None),
    ],
)
def test_attention_on_a_gpu_falls_back_size_by_size(asked, dtype, failure, message):
    tensor = on_gpu(dtype, 1, 8, 8, 112)
    assert dispatch.takes("local_branch", tensor, (5,)), "other kernels are not concerned"
    assert not dispatch.takes("infer_block", tensor), "which Triton does not have"
    asked.checks, asked.failure = [], failure
    for _ in range(2):
        assert dispatch.takes("window_attention", tensor, WINDOWS) == (message is None)
    assert asked.checks == ([("window attention", dtype, (2, 8, 8, 112))] if dtype != torch.float32 else [])
    if message is not None:
        with use_backend("native"), pytest.raises(RuntimeError, match=message):
            dispatch.takes("window_attention", tensor, WINDOWS)


def test_an_image_beyond_32_bit_places_is_left_to_pytorch(asked):
    largest = (1, 2**10, 2**10, 2**11 - 1)
    for shape in ((4, 2**10, 2**10, 2**11), (1, 2**20, 2**12, 8)):
        assert not dispatch.takes("local_branch", on_gpu(torch.bfloat16, *shape), (5,))
        assert not dispatch.takes("window_attention", on_gpu(torch.bfloat16, *shape), WINDOWS)
    with use_backend("native"), pytest.raises(RuntimeError, match="an image has more than 2,147,483,647 values"):
        dispatch.takes("local_branch", on_gpu(torch.bfloat16, *shape), (5,))
    assert dispatch.takes("local_branch", on_gpu(torch.bfloat16, *largest), (5,))
    assert dispatch.takes("local_branch", on_gpu(torch.bfloat16, 2**20, 16, 16, 4608), (5,)), "however many there are"


def test_what_is_checked_is_what_will_run(asked):
    """Type, channels and side of the convolution; and batches in which a program has more than one piece of work."""
    for dtype, side in ((torch.bfloat16, 5), (torch.float16, 5), (torch.float16, 3)):
        for batch in (1, 4, 1024, 4096):
            assert dispatch.takes("local_branch", on_gpu(dtype, batch, 16, 16, 384), (side,))
    many = (2 * math.ceil(2048 / (2 * 3)), 3, 5, 384)  # programs: two strips of columns, three blocks of channels
    shapes = [(2, 6, 9, 384), many]
    assert [check[2] for check in asked.checks] == shapes * 3
    assert [check[1] for check in asked.checks] == [torch.bfloat16] * 2 + [torch.float16] * 4
    asked.checks.clear()
    for batch in (1, 1024, 2048):
        assert dispatch.takes("window_attention", on_gpu(torch.float16, batch, 8, 8, 2 * 32 + 320), WINDOWS)
    # Two heads of 160 values, which are three pieces: from 128 images on, 256 programs do two of them each.
    assert [check[2] for check in asked.checks] == [(2, 8, 8, 384), (128, 4, 4, 384)]


def test_a_failure_of_one_size_or_type_is_not_remembered_for_another(asked, caplog):
    asked.failure = "the local branch is off by 1.0e+00"
    tensor = on_gpu(torch.bfloat16, 2, 8, 8, 64)
    for _ in range(2):
        assert not dispatch.takes("local_branch", tensor, (5,))
    assert not dispatch.takes("local_branch", tensor, (7,))
    assert caplog.text.count("Plain PyTorch runs in place of the local branch with 64 channels in torch.bfloat16") == 1
    asked.failure = ""
    assert not dispatch.takes("local_branch", tensor, (5,)), "a failure is remembered"
    assert dispatch.takes("local_branch", tensor, (3,))
    assert dispatch.takes("local_branch", on_gpu(torch.float16, 2, 8, 8, 64), (5,))
    assert dispatch.takes("local_branch", on_gpu(torch.bfloat16, 2, 8, 8, 128), (5,))


@pytest.mark.parametrize(("operator", "size"), [("local_branch", (5,)), ("window_attention", WINDOWS)])
def test_nothing_is_checked_while_a_cuda_graph_is_captured(asked, operator, size):
    tensor = on_gpu(torch.bfloat16, 2, 8, 8, 112)
    asked.capturing = True
    assert not dispatch.takes(operator, tensor, size)
    with use_backend("native"), pytest.raises(RuntimeError, match="run it once before the capture"):
        dispatch.takes(operator, tensor, size)
    assert asked.checks == []
    asked.capturing = False
    assert dispatch.takes(operator, tensor, size)
    asked.capturing = True
    assert dispatch.takes(operator, tensor, size), "checked before the capture"
    assert len(asked.checks) == 1


@pytest.mark.parametrize(
    ("dtype", "side", "many"),
    [
        (torch.bfloat16, 5, False),
        (torch.float32, 1, True),
        *(pytest.param(torch.bfloat16, *case, marks=pytest.mark.slow) for case in ((5, True), (1, False), (1, True))),
        *(pytest.param(torch.float32, *case, marks=pytest.mark.slow) for case in ((5, True), (5, False), (1, False))),
    ],
)
def test_the_checks_of_a_gpu_pass_on_what_is_right(dtype, side, many):
    """With the C++ kernels in place of Triton's."""
    checks = [backend._local_check(dtype, 256, many, (side,)), backend._attention_check(dtype, 704, many, WINDOWS)]
    assert selfcheck.first_failure("cpu", checks) == ""


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_graph_asks_once_for_a_size_of_attention(asked, dynamic):
    def block(hidden_states):
        qkv, grid = attention.to_qkv(hidden_states), hidden_states.shape[1:3]
        windows = Windows.of("spanning", 32, 2, attention.window(*grid), grid)
        many = True if qkv.numel() >= dispatch.MANY else False  # noqa: SIM210
        missing = dispatch._size_obstacle("cuda", "window_attention", qkv.dtype, qkv.shape[-1], many, *windows)
        return -qkv if missing else qkv

    attention = SpanningWindowAttention(32, 2).bfloat16()
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=dynamic)
    for shape in ((2, 8, 8, 32), (3, 16, 16, 32)):
        hidden_states = torch.randn(shape, dtype=torch.bfloat16)
        assert torch.equal(compiled(hidden_states), attention.to_qkv(hidden_states))
    assert len(asked.checks) == 2  # one window and four


def test_the_check_of_a_size_finds_what_is_wrong_with_it(monkeypatch):
    def failure() -> str:
        return selfcheck.first_failure("cpu", [selfcheck.attention_check(torch.bfloat16, (2, 8, 8, 112), WINDOWS)])

    assert failure() == ""
    fast = selfcheck.attention_operator
    monkeypatch.setattr(selfcheck, "attention_operator", lambda *inputs: fast(*inputs) * 1.05)
    assert "window attention is off by" in failure()

    def out_of_memory(*_):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(selfcheck, "attention_operator", out_of_memory)
    assert failure() == "RuntimeError: out of resource: shared memory"
