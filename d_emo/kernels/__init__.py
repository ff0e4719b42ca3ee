"""The block's hot operations, each with a fast implementation and plain PyTorch beside it.

    attention.py, local.py, modulation.py
                             the operations: plain PyTorch as reference and fallback, and the choice between them
    backend.py               what is chosen, and how to choose otherwise
    selfcheck.py             whether the fast ones are right on this machine, asked before their first use
    block.py                 the block from end to end
    fused.py, training.py    the block as one operation on the CPU, for inference and for training
    cpu.py, *.cpp, *.h       C++ for the CPU, compiled on first use
    linear.py                products with weights, the kernels' own or PyTorch's
    calibration.py           which of them are faster on this machine, measured once
    triton_*.py              Triton for CUDA GPUs

Models call these functions; nothing else in the package knows that there are kernels.
"""

from .attention import (
    ATTENTION_TYPES,
    Windows,
    merge_windows,
    split_windows,
    window_attention,
)
from .backend import BACKENDS, backend_report, is_plain, set_backend, use_backend
from .block import whole_block
from .linear import apply_linear, linear_and_bias
from .local import local_branch
from .modulation import gated_sum, modulated_norm

__all__ = [
    "ATTENTION_TYPES",
    "BACKENDS",
    "Windows",
    "apply_linear",
    "backend_report",
    "gated_sum",
    "is_plain",
    "linear_and_bias",
    "local_branch",
    "merge_windows",
    "modulated_norm",
    "set_backend",
    "split_windows",
    "use_backend",
    "whole_block",
    "window_attention",
]
