"""Which implementation of the kernels runs.

"auto" (the default) takes the fast one where it is available: C++ on the CPU, Triton on CUDA GPUs. "reference" always
takes plain PyTorch. "native" takes the fast one and raises where it is not available. The environment variable
D_EMO_KERNELS sets the initial choice; it is read at the first forward pass. Fast kernels have first derivatives; for
second ones, `torch.func` transforms and sums that match plain PyTorch's bit for bit, choose "reference".
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from diffusers.utils import logging
from torch import nn

from . import cpu, selfcheck

if TYPE_CHECKING:
    from .attention import Windows

logger = logging.get_logger(__name__)

BACKENDS = ("auto", "reference", "native")

CPU_TYPES = (torch.float32, torch.bfloat16, torch.float64)
TRITON_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_choice: str | None = None


def set_backend(name: str) -> None:
    """Choose an implementation for this process, one of `BACKENDS`.

    Compiled models (`torch.compile`) are compiled again at the next call.

    Raises:
        ValueError: the name is unknown.
    """
    global _choice
    if name not in BACKENDS:
        raise ValueError(f"kernels {name!r} are unknown; use one of {', '.join(BACKENDS)}.")
    _choice = name


def chosen_backend() -> str:
    """The choice in force."""
    if _choice is None:
        set_backend(os.environ.get("D_EMO_KERNELS", "auto"))
    assert _choice is not None
    return _choice


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose an implementation for a `with` block."""
    previous = chosen_backend()
    set_backend(name)
    try:
        yield
    finally:
        set_backend(previous)


def fast_path(tensor: torch.Tensor, windows: "Windows | None" = None) -> bool:
    """Whether the fast implementation takes this tensor, for attention in windows if these are given.

    Raises:
        RuntimeError: the choice is "native" and there is none; the message says what is missing.
    """
    choice = chosen_backend()
    # Meta tensors only have shapes; exported graphs should hold operators that other programs know.
    if choice == "reference" or tensor.is_meta or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return False
    obstacle = _obstacle(tensor.device.type, tensor.dtype)
    if not obstacle and windows and tensor.device.type == "cuda":
        obstacle = _attention_obstacle(tensor.dtype, tensor.shape[-1], *windows)
    if obstacle and choice == "native":
        raise RuntimeError(f"there are no native kernels here: {obstacle}. Use the backend 'auto' or 'reference'.")
    return not obstacle


@torch.compiler.assume_constant_result
def _obstacle(device: str, dtype: torch.dtype) -> str:
    """Why there is no fast implementation for tensors of this kind; empty if there is one."""
    if device == "cpu":
        if dtype not in CPU_TYPES:
            return f"{dtype} on the CPU is not supported"
        return cpu.obstacle() or _failure(device)
    if device == "cuda":
        if dtype not in TRITON_TYPES:
            return f"{dtype} on a GPU is not supported"
        return _failure(device)
    return f"the device {device!r} has none"


@torch.compiler.assume_constant_result
def _attention_obstacle(dtype: torch.dtype, channels: int, *windows: float) -> str:
    """Why a GPU's attention kernel does not take tensors of this size; empty if it does."""
    if dtype == torch.float32:
        return "attention in float32 on a GPU is left to PyTorch's products"  # a tile fills the registers several times
    return _attention_failure(dtype, channels, *windows)


@functools.cache
def _attention_failure(dtype: torch.dtype, channels: int, *windows: float) -> str:
    """What the check of this size on a GPU says, asked once."""
    from .attention import Windows

    failure = selfcheck.attention_failure("cuda", dtype, channels, Windows(*windows))  # type: ignore[arg-type]
    return _told(f"window attention with {channels} channels in {dtype} on the GPU", failure)


def _told(what: str, failure: str) -> str:
    """A failed check as an obstacle, after a warning; empty if nothing failed."""
    if not failure:
        return ""
    logger.warning(f"Plain PyTorch runs in place of {what}, since the check before its first use failed: {failure}")
    return f"their check failed, {failure}"


@functools.cache
def _failure(device: str) -> str:
    """What the kernels' check on this device says, asked once; empty if they passed."""
    if device == "cuda" and not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    return _told(f"the kernels on {device}", selfcheck.failure(device))


def backend_report(device: torch.device | str) -> str:
    """One line for a log: which kernels a model in float32 or bfloat16 on `device` uses, and why."""
    device = torch.device(device)
    if chosen_backend() == "reference":
        return "plain PyTorch, as chosen"
    obstacle = _obstacle(device.type, torch.float32)
    if obstacle:
        return f"plain PyTorch ({obstacle})"
    return "C++" if device.type == "cpu" else "Triton (attention in bfloat16 and float16)"


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does no more than `kind` does, so that its parameters may be used directly.

    False for adapters, quantised and synchronised layers, and for modules with hooks (offloading, pruning).
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks and "forward" not in module.__dict__
