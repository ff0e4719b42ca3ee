"""BatchNorm's running statistics when several processes train one model."""

import torch
from accelerate import Accelerator

STATISTICS = ("running_mean", "running_var")


def average_statistics(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Replace each process's running means and variances by the mean over processes.

    Each process normalises with its own micro batch. Running statistics are linear in those of the batches, so that
    averaging them once a step is the same as averaging over the micro batches of all processes: no process's share
    counts more than another's, and all of them hold, and save, the same. DDP must not broadcast buffers (its default),
    which would overwrite the others' by the first process's.
    """
    if accelerator.num_processes == 1:
        return
    buffers = [buffer for name, buffer in model.named_buffers() if name.rsplit(".", 1)[-1] in STATISTICS]
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    mean = accelerator.reduce(flat, reduction="mean")
    for buffer, values in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))
