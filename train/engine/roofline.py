"""How long a step takes on a GPU that is not here: every operator at its bytes or its products.

The step is gone through on tensors without content (`rehearsal`), and each operator takes what its FLOPs or the bytes
of its tensors, read or written once, take at the card's rates, whichever is longer. By its kind it takes so many times
that (`Shares`): measured on an H100, and taken to be the same on other cards.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from d_emo.common.gpus import Gpu
from d_emo.train.engine.rehearsal import tensors_in

# Bytes that a trained value moves in float32: AdamW reads it, its gradient and two moments and writes all but the
# gradient; an average reads both and writes one.
OPTIMIZER_BYTES, AVERAGE_BYTES = 7 * 4, 3 * 4


@dataclass(frozen=True)
class Shares:
    """How many times what the card's rates allow an operator takes, by its kind; and what its launch takes.

    Attributes:
        products: of PyTorch: matrices, convolutions, attention.
        kernels: of this package.
        rest: what is added, multiplied, normalised, copied; below 1 where a compiler joins several into one.
        launch: seconds that the processor takes for one of PyTorch's operators.
        kernel_launch: the same for one of this package's.
        joined: whether a compiler joins the rest to others, so that only products and kernels are launched.
    """

    products: float
    kernels: float
    rest: float
    launch: float = 0.0
    kernel_launch: float = 0.0
    joined: bool = False


# `python -m d_emo.eval.benchmarks.gpu.planned docs/data/h100` fits them, but for the launches of compiled blocks: no
# step was measured that they were the limit of, and a plain operator's is a guess.
COMPILED = Shares(products=1.37, kernels=3.73, rest=0.815, launch=36e-6, kernel_launch=36e-6, joined=True)
# All of it is launched at once.
GRAPHS = replace(COMPILED, launch=0.0, kernel_launch=0.0)
UNCOMPILED = Shares(products=1.37, kernels=3.73, rest=1.89, launch=36e-6, kernel_launch=700e-6)


@dataclass
class Work:
    """What the operators of a pass, or of several, do.

    Attributes:
        products, kernels, rest: pairs of FLOPs and bytes, an operator each, by the kinds of `Shares`.
    """

    products: list[tuple[float, float]]
    kernels: list[tuple[float, float]]
    rest: list[tuple[float, float]]

    def least(self, gpu: Gpu, flops: float) -> tuple[float, float, float]:
        """Seconds at the card's rates, by kind.

        Args:
            gpu: the card.
            flops: a second, of products.
        """
        kinds = (self.products, self.kernels, self.rest)
        products, kernels, rest = (
            sum(max(work / flops, size / gpu.bandwidth) for work, size in operators) for operators in kinds
        )
        return products, kernels, rest

    def seconds(self, gpu: Gpu, flops: float, shares: Shares) -> float:
        """What they take; on small work, what their launches take."""
        products, kernels, rest = self.least(gpu, flops)
        on_card = shares.products * products + shares.kernels * kernels + shares.rest * rest
        launched = len(self.products) + (0 if shares.joined else len(self.rest))
        launches = launched * shares.launch + len(self.kernels) * shares.kernel_launch
        return max(on_card, launches)


class CountedWork(TorchDispatchMode):
    """Within it, what operators do is added to `work`."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work([], [], [])

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given, made = list(tensors_in((args, kwargs))), list(tensors_in(result))
        if _moves_nothing(function, given, made):
            return result
        size = sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        flops = _flops(function, args, kwargs, result)
        ours = function.namespace == "d_emo"
        kind = self.work.kernels if ours else self.work.rest if flops is None else self.work.products
        kind.append((flops or 0.0, size))
        return result


def _moves_nothing(function: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
    """Whether an operator is a view, makes an empty tensor, or answers with what it was given."""
    if not made or "empty" in function.__name__:
        return True
    there = {tensor.untyped_storage()._cdata for tensor in given}
    old = all(tensor.untyped_storage()._cdata in there for tensor in made)
    return old and not function._schema.is_mutable


def _flops(function: Any, args: Any, kwargs: Any, result: Any) -> float | None:
    """FLOPs of an operator; None for one that makes no products."""
    packet = function._overloadpacket
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=result)
    # The processor's attention stands for a GPU's; PyTorch's counter knows that one only.
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    return None


def count_work(passes: Callable[[], object]) -> Work:
    """What the operators in `passes` do."""
    with CountedWork() as counted:
        passes()
    return counted.work
