"""Activation checkpointing that leaves BatchNorm statistics exact.

A checkpointed block runs forward twice, so plain checkpointing updates its running statistics twice in a step.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def frozen_batch_norm_statistics(module: nn.Module) -> Iterator[None]:
    """Leave running statistics and batch counters of `module` as they are; outputs stay those of the current mode."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    saved = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    counts = [None if count is None else count.clone() for _, _, count in saved]
    try:
        for norm in norms:
            # running = (1 - 0) * running + 0 * batch. Switching tracking off instead would save fewer tensors than
            # the first forward did, which checkpointing refuses.
            norm.momentum = 0.0
        yield
    finally:
        for (norm, momentum, tracked), count in zip(saved, counts, strict=True):
            norm.momentum = momentum
            if tracked is not None and count is not None:
                tracked.copy_(count)


def checkpoint_block(block: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """Run `block(*args)` without keeping its activations; the recomputation updates no statistics.

    The signature is that of Diffusers' `gradient_checkpointing_func`.
    """

    def contexts():
        return contextlib.nullcontext(), frozen_batch_norm_statistics(block)

    return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=contexts)
