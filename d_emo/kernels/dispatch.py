"""The table of backends, and which of them runs.

"auto" (the default) takes the backend of a tensor's device where there is one: C++ on the CPU, Triton on CUDA GPUs.
"reference" always takes plain PyTorch. "native" takes the backend and raises where there is none. The environment
variable D_EMO_KERNELS sets the initial choice; it is read at the first forward pass. Backends have first derivatives;
for second ones and sums that match plain PyTorch's bit for bit, choose "reference". Under forward-mode differentiation
(`torch.func.jvp`) plain PyTorch runs by itself.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _modules  # holds the hooks of all modules

from d_emo.common.messages import shown

from .inputs import LARGEST

logger = logging.get_logger(__name__)

BACKENDS = ("auto", "reference", "native")
# Values from which on the programs of a GPU have several pieces of work each. That is checked by itself, on some
# millions of values.
MANY = 2**20


@dataclass(frozen=True)
class Backend:
    """Implementations for one type of device.

    Attributes:
        name: for people.
        dtypes: of the tensors that it takes.
        obstacle: why it cannot be used for a type on this machine; empty if it can. Makes the check before first use.
        size_obstacle: the same for one size of an operator, where each is code of its own: name, type, channels,
            whether there are `MANY` values, and the numbers of `Windows` or the convolution's side. None: the code is
            one for all sizes.
        slower: whether plain PyTorch is faster than an operator in a type on this machine.
        keeps_convolution: whether the local branch's backward pass wants the convolution's result, made with a batch's
            statistics, kept for it.
        operators: by the names of `OPERATORS`, with the signatures of the operators of that name; any may be missing.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    obstacle: Callable[[torch.dtype], str]
    size_obstacle: Callable[[str, torch.dtype, int, bool, tuple[int, ...]], str] | None
    slower: Callable[[str, torch.dtype], bool]
    keeps_convolution: bool
    operators: Mapping[str, Callable[..., Any]]


OPERATORS = (
    *("window_attention", "window_attention_backward", "local_branch", "local_branch_backward"),
    *("linear", "linear_backward", "infer_block"),
)
_table: dict[str, Backend] = {}
_warned: set[str] = set()
_choice: str | None = None  # None until somebody sets one
_planned_device: str | None = None


def register(device: str, backend: Backend) -> None:
    """Enter the backend of a device type into the table.

    Raises:
        ValueError: it has an operator that is none of `OPERATORS`.
    """
    if unknown := set(backend.operators) - set(OPERATORS):
        raise ValueError(f"backend {backend.name}: {', '.join(sorted(unknown))} is none of {', '.join(OPERATORS)}.")
    _table[device] = backend


def operator(name: str, schema: str, check: Callable[..., None]) -> torch.library.CustomOpDef:
    """PyTorch's operator `d_emo::name`: runs what the table has for the device of its first tensor.

    Args:
        name: of `OPERATORS`.
        schema: its arguments and results.
        check: called with the arguments before a backend is; raises ValueError where one would read past an end.
    """

    def run(*arguments: Any) -> Any:
        first = arguments[0]
        backend = _table.get(first.device.type)
        if backend is None or name not in backend.operators or first.dtype not in backend.dtypes:
            raise ValueError(f"d_emo::{name} has no backend for {first.dtype} on {first.device}; use plain PyTorch.")
        check(*arguments)
        return backend.operators[name](*arguments)

    made = torch.library.custom_op(f"d_emo::{name}", run, mutates_args=(), schema=schema)
    if name.endswith("_backward"):
        made.register_autograd(_no_second_derivative)
    return made


def _no_second_derivative(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "the kernels have first derivatives only; for second ones run the model's forward pass under "
        'd_emo.kernels.use_backend("reference").'
    )


def set_backend(name: str) -> None:
    """Choose an implementation for this process, one of `BACKENDS`.

    Compiled models (`torch.compile`) are compiled again at the next call.

    Raises:
        ValueError: the name is unknown.
    """
    global _choice
    _choice = _known(name)


def _known(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"kernels {shown(name)} are unknown; use one of {', '.join(BACKENDS)}.")
    return name


def chosen_backend() -> str:
    """The choice in force."""
    return _initial() if _choice is None else _choice


# Not written to `_choice`: a graph compiled before that would be compiled again for the second block.
@torch.compiler.assume_constant_result
def _initial() -> str:
    return _environments()


@functools.cache
def _environments() -> str:
    return _known(os.environ.get("D_EMO_KERNELS", "auto"))


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Choose an implementation for a `with` block; None leaves the choice as it is."""
    global _choice
    previous = _choice
    set_backend(chosen_backend() if name is None else name)
    try:
        yield
    finally:
        _choice = previous


@contextlib.contextmanager
def planned_on(device: str) -> Iterator[None]:
    """Treat tensors without content, on the processor, as if on a device whose machine is not this one.

    Within it operators are those of that device's backend, which is taken to be there and right.
    """
    global _planned_device
    previous, _planned_device = _planned_device, device
    try:
        yield
    finally:
        _planned_device = previous


def is_planned() -> bool:
    """Whether this is within `planned_on`: checks of the machine would be of the wrong one."""
    return _planned_device is not None


def takes(name: str, tensor: torch.Tensor, size: Sequence[int] = ()) -> bool:
    """Whether a backend runs an operator on this tensor; `size` is as `Backend.size_obstacle` takes it.

    Raises:
        RuntimeError: the choice is "native" and there is none; the message says what is missing.
    """
    choice = chosen_backend()
    # Meta tensors only have shapes; exported graphs should hold operators that other programs know.
    if choice == "reference" or tensor.is_meta or _exporting() or torch.onnx.is_in_onnx_export():
        return False
    if torch.jit.is_tracing():  # a trace is a file for other programs, too
        return False
    if forward_ad._current_level >= 0:  # no backend has tangents, and autograd would drop them without a word
        return False
    if _transformed():  # torch.func: no backend's gradient takes part
        return False
    if 0 in tensor.shape:  # no samples: nothing to be fast at
        return False
    device = _planned_device or tensor.device.type
    obstacle = _obstacle(device, tensor.dtype)
    if not obstacle and tensor.numel() > tensor.shape[0] * LARGEST:  # places in an image are 32-bit numbers, too
        obstacle = f"an image has more than {LARGEST:,} values"
    if not obstacle and size and _by_size(device):
        many = True if tensor.numel() >= MANY else False  # noqa: SIM210 - a graph may leave the size open
        obstacle = _size_obstacle(device, name, tensor.dtype, tensor.shape[-1], many, *size)
    if obstacle and choice == "native":
        raise RuntimeError(f"there are no native kernels here: {obstacle}. Use the backend 'auto' or 'reference'.")
    return not obstacle and _has(name, device, tensor.dtype)


# Asked while Dynamo traces, not traced: its models of these two say yes in every compiled graph (PyTorch 2.11 of the
# first, all up to 2.14 of the second), and compiled blocks would never hold a kernel.
@torch.compiler.assume_constant_result
def _exporting() -> bool:
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result
def _has(name: str, device: str, dtype: torch.dtype) -> bool:
    return name in _table[device].operators and not _table[device].slower(name, dtype)


@torch.compiler.assume_constant_result
def _obstacle(device: str, dtype: torch.dtype) -> str:
    """Why there is no backend for tensors of this kind; empty if there is one."""
    if device not in _table:
        return f"the device {device!r} has none"
    if dtype not in _table[device].dtypes:
        return f"{dtype} on the device {device!r} is not supported"
    return "" if is_planned() else _table[device].obstacle(dtype)


@torch.compiler.assume_constant_result
def _by_size(device: str) -> bool:
    return _table[device].size_obstacle is not None


@torch.compiler.assume_constant_result
def _size_obstacle(device: str, name: str, dtype: torch.dtype, channels: int, many: bool, *size: int) -> str:
    """Why an operator of this size is left to plain PyTorch; empty if it is not."""
    ask = _table[device].size_obstacle
    return ask(name, dtype, channels, many, size) if ask else ""


def keeps_convolution(tensor: torch.Tensor) -> bool:
    """Whether the backend of a tensor's device keeps the local branch's convolution."""
    backend = _table.get(_planned_device or tensor.device.type)
    return backend is not None and backend.keeps_convolution


def told(what: str, failure: str) -> str:
    """A failed check as an obstacle, after a warning (one for all that fail alike); empty if nothing failed."""
    if not failure:
        return ""
    if failure not in _warned:
        _warned.add(failure)
        logger.warning(f"Plain PyTorch runs in place of {what}, since the check before its first use failed: {failure}")
    return f"their check failed, {failure}"


def backend_report(device: torch.device | str) -> str:
    """One line for a log: which kernels a model in float32 or bfloat16 on `device` uses, and why."""
    device = torch.device(device)
    if chosen_backend() == "reference":
        return "plain PyTorch, as chosen"
    obstacle = _obstacle(device.type, torch.float32)
    return f"plain PyTorch ({obstacle})" if obstacle else _table[device.type].name


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The type that backends compute in, and take parameters in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does no more than `kind` does, so that its parameters may be used directly.

    False for adapters, quantised and synchronised layers, for modules with hooks (offloading, pruning), and where
    somebody watches every module or has replaced what the whole class does.
    """
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if type(module) is not kind or hooks or "forward" in module.__dict__ or kind.forward is not _forwards[kind]:
        return False
    return not (
        _modules._global_forward_hooks
        or _modules._global_forward_pre_hooks
        or _modules._global_backward_hooks
        or _modules._global_backward_pre_hooks
    )


def remember(kind: type[nn.Module]) -> None:
    """Take down what a class does, so that `is_plain` sees when that has been replaced."""
    _forwards[kind] = kind.forward


_forwards: dict[type[nn.Module], Any] = {}
for _kind in (nn.Linear, nn.Conv2d, nn.BatchNorm2d):
    remember(_kind)
