"""Runs the Triton kernels' cases: on the GPU if there is one, else in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")


def test_triton_kernels_equal_the_reference():
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    cases = Path(__file__).with_name("triton_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env={**os.environ, **interpret}, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def compile_for(kernel: object, target: object, floats: tuple[str, ...], scalars: tuple[str, ...], constants: dict):
    """Compile a kernel as if called with bfloat16 tensors, float32 tensors `floats` and float scalars `scalars`."""
    import triton

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in ("height", "width"):
            return "i32"
        return "fp32" if name in scalars else "*fp32" if name in floats else "*bf16"

    signature = {name: kind(name) for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
    return triton.compile(source, target=target)


@pytest.mark.parametrize(
    ("capability", "kernel"),
    [(90, 3), pytest.param(90, 5, marks=pytest.mark.slow), pytest.param(80, 5, marks=pytest.mark.slow)],
)
def test_triton_kernels_compile_for_gpus_that_are_not_here(capability, kernel):
    """Ampere and Hopper, at the sizes of D-EMOv2-XL-2; the binary must fit in Hopper's shared memory.

    The models' convolution is 5 wide; one of 3 compiles in a fraction of the time.
    """
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    from d_emo.kernels import triton_attention, triton_local

    target = GPUTarget("cuda", capability, 32)
    attention = {"HEADS": 16, "D": 72, "E": 288, "DP": 128, "EB": triton_attention.VALUE_BLOCK, "WH": 8, "WW": 8,
                 "TP": 64, "NEIGHBORHOOD": True, "REMOTE": True, "HAS_BIAS": True, "DOT": tl.bfloat16,
                 "PRECISION": "ieee"}  # fmt: skip
    local = {"E": 4608, "K": kernel, "TB": triton_local.TOKEN_BLOCK, "CB": triton_local.CHANNEL_BLOCK}
    parts = ("weight", "gamma", "beta", "mean", "deviation", "scale", "shift", "means", "squares", "drop",
             "drop_normed", "grad_gamma", "grad_beta", "grad_weight")  # fmt: skip
    for module, floats, scalars, constants in (
        (triton_attention, ("bias",), ("scale", "weight"), attention),
        (triton_local, parts, (), local),
    ):
        kernels = [value for name, value in vars(module).items() if name.endswith("_kernel")]
        assert len(kernels) >= 2
        for function in kernels:
            compiled = compile_for(function, target, floats, scalars, constants)
            assert "cubin" in compiled.asm
            assert compiled.metadata.shared <= 227 * 1024
