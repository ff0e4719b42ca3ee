"""Work on tensors that have shapes, types and a device, but no content: what it would hold in memory, in a second.

Operations, ours too, are asked for the shape of their result and compute nothing, so a network of any size passes on
any machine. What is chosen by device and type is chosen as in the run: a kernel of ours where one would run.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class HeldBytes(TorchDispatchMode):
    """Within it, counts the bytes of tensors that operations make, as long as they exist.

    Views count with what they look at, and what was there before does not count. Nor do tensors that an operation uses
    inside of itself, as kernels do.

    Attributes:
        now: bytes held.
        most: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors_in((args, kwargs)):
            self._see(tensor, made=False)
        result = function(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._see(tensor, made=True)
        return result

    def _see(self, tensor: torch.Tensor, made: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = size = storage.nbytes() if made else 0
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors in tables and lists."""
    return (value for value in tree_iter(values) if isinstance(value, torch.Tensor))


@contextlib.contextmanager
def shapes_only(device: torch.device, *modules: torch.nn.Module) -> Iterator[None]:
    """Within it, new tensors have no content and lie on `device`, and so do the modules' own; afterwards all is back.

    Raises:
        RuntimeError: an operation needs to know content, `tensor.item()` for example.
    """
    parts = [part for module in modules for part in module.modules()]
    tables: list[dict[str, Any]] = [table for part in parts for table in (part._parameters, part._buffers)]
    own = [{**table} for table in tables]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.device(device):
            stand_ins: dict[int, torch.Tensor] = {}
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and id(tensor) not in stand_ins:
                        stand_ins[id(tensor)] = _stand_in(tensor)
                    table[name] = None if tensor is None else stand_ins[id(tensor)]
            yield
    finally:
        for table, tensors in zip(tables, own, strict=True):
            table.update(tensors)


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    return torch.nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else empty


def held_at_most(work: Callable[[], object]) -> int:
    """The most bytes that tensors made by `work` take at once."""
    with HeldBytes() as held:
        work()
    return held.most


def size_of(tensors: Any) -> int:
    """Bytes of tensors, and of tensors in tables and lists."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(tensors))


# Of the functions that CUDA's autocast does in float32, those that networks here call.
_IN_FLOAT32 = ("layer_norm", "group_norm", "softmax")


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Within it, the processor's autocast does norms and softmax in float32, as CUDA's does.

    No mode of PyTorch's: checkpointed blocks, computed again in the backward pass, would not see it.
    """
    own = {name: getattr(F, name) for name in _IN_FLOAT32}

    def in_float32(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(values: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return function(values.float() if torch.is_autocast_enabled("cpu") else values, *args, **kwargs)

        return run

    try:
        for name, function in own.items():
            setattr(F, name, in_float32(function))
        yield
    finally:
        for name, function in own.items():
            setattr(F, name, function)
