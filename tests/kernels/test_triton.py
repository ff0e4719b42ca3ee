"""The Triton kernels' results (on the GPU if there is one, else in Triton's interpreter), compilation and choice."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.paths import TESTS

from d_emo.kernels import dispatch, selfcheck, use_backend
from d_emo.kernels import triton as backend
from d_emo.kernels.reference import Windows
from d_emo.models.i2rmb import SpanningWindowAttention

pytest.importorskip("triton")


# Interpreting is slow: all of attention's windows and the smallest images in float32, and elsewhere every case.
@pytest.mark.parametrize("cases", ["float32 and not large", pytest.param("", marks=pytest.mark.slow)])
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
def test_triton_kernels_fit_gpus_that_are_not_here(compiled_for, capability):
    """Hopper and Ampere, at the sizes of D-EMOv2-XL-2 in bfloat16, launched as for training."""
    from d_emo.kernels.triton import attention, local

    kernels = compiled_for(capability)
    windows = Windows(1152, 16, 8, 8)
    qkv = torch.zeros(1, 16, 16, 2 * 1152 + 4608, dtype=torch.bfloat16)
    out = attention.forward(qkv, windows)
    attention.backward(out, qkv, windows)
    # RTX cards of capability 8.6 and 8.9 have 99 KiB, others more; the launch fails where it is too little.
    assert set(kernels) == {"_forward_kernel", "_backward_kernel"}
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= 99 * 1024, name
        assert local_memory(kernel) <= 128, name

    kernels.clear()
    parameters = local.Parameters(torch.zeros(25, 4608), *torch.zeros(4, 4608))
    local.forward(out, parameters, True, 1e-5)
    local.backward(out, out, parameters, True, 1e-5)
    assert len(kernels) == 7
    for name, kernel in kernels.items():
        assert kernel.metadata.shared <= 48 * 1024, name
        assert local_memory(kernel) == 0, name


@pytest.mark.parametrize(
    ("dtype", "failure", "message"),
    [
        (torch.float32, "", "attention in float32"),
        (torch.bfloat16, "OutOfResources: shared memory", "their check failed, OutOfResources"),
        (torch.bfloat16, "", None),
    ],
)
def test_attention_on_a_gpu_falls_back_size_by_size(monkeypatch, caplog, dtype, failure, message):
    asked = []
    monkeypatch.setattr(backend, "first_failure", lambda device, checks: asked.append(checks[0][3:]) or failure)
    monkeypatch.setattr(dispatch, "_obstacle", lambda *_: "")
    backend._attention_failure.cache_clear()
    windows = Windows(32, 2, 4, 4)
    tensor = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, is_meta=False, shape=(1, 8, 8, 112))
    assert dispatch.takes("local_branch", tensor), "other kernels are not concerned"
    assert not dispatch.takes("infer_block", tensor), "which Triton does not have"
    for _ in range(2):
        assert dispatch.takes("window_attention", tensor, windows) == (message is None)
    assert asked == ([(dtype, [(2, 8, 8, 112)])] if dtype != torch.float32 else [])
    if message is not None:
        with use_backend("native"), pytest.raises(RuntimeError, match=message):
            dispatch.takes("window_attention", tensor, windows)
    backend._attention_failure.cache_clear()


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_graph_asks_once_for_a_size_of_attention(monkeypatch, dynamic):
    def block(hidden_states):
        qkv, grid = attention.to_qkv(hidden_states), hidden_states.shape[1:3]
        windows = Windows.of("spanning", 32, 2, attention.window(*grid), grid)
        return -qkv if dispatch._attention_obstacle("cuda", qkv.dtype, qkv.shape[-1], *windows) else qkv

    asked = []
    monkeypatch.setattr(backend, "first_failure", lambda *checks: asked.append(checks) or "")
    backend._attention_failure.cache_clear()
    attention = SpanningWindowAttention(32, 2).bfloat16()
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=dynamic)
    for shape in ((2, 8, 8, 32), (3, 16, 16, 32)):
        hidden_states = torch.randn(shape, dtype=torch.bfloat16)
        assert torch.equal(compiled(hidden_states), attention.to_qkv(hidden_states))
    assert len(asked) == 2  # one window and four
    backend._attention_failure.cache_clear()


def test_the_check_of_a_size_finds_what_is_wrong_with_it(monkeypatch):
    def failure() -> str:
        return selfcheck.first_failure("cpu", [selfcheck.attention_check(torch.bfloat16, 112, Windows(32, 2, 4, 4))])

    assert failure() == ""
    fast = selfcheck.attention_operator
    monkeypatch.setattr(selfcheck, "attention_operator", lambda *inputs: fast(*inputs) * 1.05)
    assert "window attention is off by" in failure()

    def out_of_memory(*_):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(selfcheck, "attention_operator", out_of_memory)
    assert failure() == "RuntimeError: out of resource: shared memory"
