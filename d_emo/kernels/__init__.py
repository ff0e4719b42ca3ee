"""The block's two hot operations, each with a fast implementation and plain PyTorch beside it.

    attention.py, local.py   the operations: plain PyTorch as reference and fallback, and the choice between them
    backend.py               what is chosen, and how to choose otherwise
    cpu.py, *.cpp, *.h       C++ for the CPU, compiled on first use
    triton_*.py              Triton for CUDA GPUs

Models call `window_attention` and `local_branch`; nothing else in the package knows that there are kernels.
"""

from .attention import ATTENTION_TYPES, linear_and_bias, window_attention
from .backend import BACKENDS, backend_report, set_backend, use_backend
from .local import local_branch

__all__ = [
    "ATTENTION_TYPES",
    "BACKENDS",
    "backend_report",
    "linear_and_bias",
    "local_branch",
    "set_backend",
    "use_backend",
    "window_attention",
]
