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
    """Leave running statistics and batch counters of `module` untouched; outputs stay those of the current mode."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    tracking = [norm.track_running_stats for norm in norms]
    try:
        for norm in norms:
            # In training mode this alone makes BatchNorm use the batch and skip the update; eval mode ignores it.
            norm.track_running_stats = False
        yield
    finally:
        for norm, tracked in zip(norms, tracking, strict=True):
            norm.track_running_stats = tracked


def checkpoint_block(block: nn.Module, *args: torch.Tensor) -> torch.Tensor:
    """Run `block(*args)` without keeping its activations; the recomputation updates no statistics.

    The signature is that of Diffusers' `gradient_checkpointing_func`.
    """

    def contexts():
        return contextlib.nullcontext(), frozen_batch_norm_statistics(block)

    return checkpoint(block.__call__, *args, use_reentrant=False, context_fn=contexts)
