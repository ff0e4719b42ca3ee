"""Steps whose loss or gradient is not finite: they change nothing, and the run ends.

Asking a GPU for a number makes it wait for the processor, and the processor for it. So on an accelerator a step is
judged there: the optimizer leaves the weights and its moments as they were, BatchNorm's statistics are put back, the
average does not move. Log lines, checkpoints and the end ask whether there was such a step. On a CPU, and with
optimizers that cannot leave a step out, every step is asked for at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer


@dataclass(frozen=True)
class Judged:
    """A step that was not asked for yet.

    Attributes:
        step: its number, from 1.
        losses: (micro batches,), of this process.
        norm: of the gradient over all processes.
        positions: of its samples in this process.
    """

    step: int
    losses: torch.Tensor
    norm: torch.Tensor
    positions: Sequence[int]

    @property
    def finite(self) -> torch.Tensor:
        """Whether its losses and gradients are, on the device."""
        return torch.isfinite(self.losses).all() & torch.isfinite(self.norm)


class FiniteSteps:
    """Judges steps; see the module.

    Args:
        model, optimizer: of the run.
        deferred: whether steps are judged on the device and asked for later; None for what suits both.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, deferred: bool | None = None):
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        device = next(model.parameters()).device
        # PyTorch's name for optimizers that take `found_inf`, as its GradScaler gives it to the fused ones.
        can = bool(getattr(inner, "_step_supports_amp_scaling", False))
        self.deferred = can and (device.type != "cpu" if deferred is None else deferred)
        self.optimizer: Any = inner
        norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        self.statistics = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
        self.counters = [buffer for norm in norms for buffer in norm.buffers() if not buffer.is_floating_point()]
        self._before: list[torch.Tensor] = []
        self._waiting: list[Judged] = []

    def begin(self) -> None:
        """Call before a step's first forward pass."""
        if self.deferred:
            self._before = [_flat(buffers) for buffers in (self.statistics, self.counters) if buffers]

    def leave_out_unless(self, judged: Judged) -> None:
        """Make the optimizer's next step change nothing unless the step is finite."""
        if self.deferred:
            self._waiting.append(judged)
            self.optimizer.found_inf = (~judged.finite).float()
            self.optimizer.grad_scale = None

    def put_back_unless(self, finite: torch.Tensor) -> None:
        """Put BatchNorm's statistics back where the step that moved them is not finite."""
        if not self.deferred:
            return
        buffers = [part for part in (self.statistics, self.counters) if part]
        for part, before in zip(buffers, self._before, strict=True):
            kept = torch.where(finite, _flat(part), before)
            pieces = kept.split([buffer.numel() for buffer in part])
            torch._foreach_copy_(part, [piece.view_as(buffer) for piece, buffer in zip(pieces, part, strict=True)])

    def first_bad(self) -> Judged | None:
        """The first step since the last call that is not finite; waits for the device."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return None
        finite = torch.stack([judged.finite for judged in waiting]).tolist()
        return next((judged for judged, good in zip(waiting, finite, strict=True) if not good), None)


def _flat(buffers: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([buffer.detach().flatten() for buffer in buffers])
