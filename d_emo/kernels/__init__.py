"""Faster implementations of the block's two operators, and of a block in inference, beside their definition.

    reference.py             the operators in plain PyTorch: definition and fallback
    dispatch.py              the table of backends, and what is chosen from it
    inputs.py                what every operator refuses before a backend reads memory
    attention.py, local.py   the operators: window attention, and x + SiLU(BatchNorm(convolution of x))
    fused.py, linear.py      a block's forward pass, and its products with weights
    selfcheck.py             whether a backend is right on this machine, asked before its first use
    cpp/                     the CPU's backend in C++, compiled on first use
    triton/                  the backend of CUDA GPUs

Models call the two operators and decorate their block with `use_fused_forward`; nothing else knows of kernels. A file
imports only from those above it, and the backends from all of them. A new backend is an entry in the table here.
"""

from . import cpp, triton
from .attention import window_attention
from .dispatch import BACKENDS, backend_report, register, set_backend, use_backend
from .fused import use_fused_forward
from .local import local_branch

register("cpu", cpp.BACKEND)
register("cuda", triton.BACKEND)

__all__ = [
    "BACKENDS",
    "backend_report",
    "local_branch",
    "set_backend",
    "use_backend",
    "use_fused_forward",
    "window_attention",
]
