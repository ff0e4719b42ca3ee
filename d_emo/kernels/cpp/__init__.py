"""The CPU's backend, in C++: compiled for the processor on first use, called through ctypes.

    vectors.h      vectors of the processor's width, exp, GELU      products.h   products of operands in the cache
    attention.h    window attention                                 linear.h     linear layers
    local.h        the local branch                                 fused.h      a block in inference
    kernels.cpp    the C interface; build.py compiles it, binding.py calls it

The row of docs/speed.md that says what a kernel gains stands at the top of its header.
"""

import functools

import torch

from ..dispatch import Backend, told
from ..reference import Windows
from ..selfcheck import attention_check, block_check, first_failure, linear_check, local_check
from . import binding, build


@functools.cache
def _obstacle(dtype: torch.dtype) -> str:
    if unavailable := build.obstacle(dtype):
        return unavailable
    attention = attention_check(dtype, (2, 8, 8, 2 * 32 + 48), Windows(32, 2, 4, 4))
    checks = [attention, local_check(dtype, (2, 8, 8, 48), 5), linear_check(dtype), block_check(dtype)]
    return told(f"the CPU kernels in {dtype}", first_failure("cpu", checks))


def slower(operator: str, dtype: torch.dtype) -> bool:
    """Whether PyTorch's products are faster: oneDNN's with AMX, MKL's in float32 on Intel's processors (about as fast).

    MKL keeps its fastest code for those, and without instructions for bfloat16 PyTorch's products in it crawl.
    """
    processor = build.processor()
    if dtype == torch.bfloat16 and "amx_bf16" in processor.get("flags", "").split():
        return operator in ("linear", "infer_block")
    return operator == "linear" and dtype != torch.bfloat16 and processor.get("vendor_id") == "GenuineIntel"


BACKEND = Backend(
    name="C++",
    dtypes=tuple(build.STORAGE),
    obstacle=_obstacle,
    size_obstacle=None,
    slower=slower,
    keeps_convolution=False,
    operators={
        "window_attention": binding.attend,
        "window_attention_backward": binding.attend_backward,
        "local_branch": binding.convolve,
        "local_branch_backward": binding.convolve_backward,
        "linear": binding.multiply,
        "linear_backward": binding.multiply_backward,
        "infer_block": binding.infer,
    },
)
