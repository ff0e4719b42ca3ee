"""BatchNorm's running statistics over the micro batches and processes of an optimizer step."""

import torch
from accelerate import Accelerator

STATISTICS = ("running_mean", "running_var")


class StepStatistics:
    """Makes running statistics move once a step, however many micro batches it has.

    With momentum m the statistics after a step are (1 - m) times those before plus m times the mean over the step's
    micro batches. Left alone they would move by m at each micro batch, and the same run would get others on another
    number of processes.

    Args:
        model: its norms' present momentum is m.
        constant: use one momentum for all micro batches of a step, as compiled blocks want, which are compiled again
            for every new one. The step still moves by m; later micro batches then count up to 1 / (1 - m) times more.
    """

    def __init__(self, model: torch.nn.Module, constant: bool = False):
        self.constant = constant
        # Of lines, images and volumes, synchronised ones too.
        norms = [norm for norm in model.modules() if isinstance(norm, torch.nn.modules.batchnorm._BatchNorm)]
        self.norms = [(norm, norm.momentum) for norm in norms if norm.momentum is not None]

    def begin_micro_batch(self, index: int, count: int) -> None:
        """Call before the forward pass of micro batch `index` (from 0) of the `count` that a process has in a step."""
        for norm, momentum in self.norms:
            if self.constant:
                norm.momentum = 1 - (1 - momentum) ** (1 / count)
                continue
            share = momentum / count
            # Chosen so that what the later ones fade of this one leaves exactly `share` of it.
            norm.momentum = share / (1 - share * (count - 1 - index))


def moving_statistics(model: torch.nn.Module) -> list[torch.Tensor]:
    """Running means and variances of the norms that are in training, which frozen ones are not."""
    return [
        buffer
        for module in model.modules()
        if module.training
        for name, buffer in module.named_buffers(recurse=False)
        if name in STATISTICS
    ]


def average_statistics(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Replace each process's running means and variances by the mean over processes.

    Each process normalises with its own micro batch. Running statistics are linear in those of the batches, so that
    averaging them once a step is the same as averaging over the micro batches of all processes: no process's share
    counts more than another's, and all of them hold, and save, the same. DDP must not broadcast buffers (its default),
    which would overwrite the others' by the first process's. Statistics that are fixed are the same everywhere, and a
    mean would round them.
    """
    if accelerator.num_processes == 1:
        return
    buffers = moving_statistics(model)
    if not buffers:
        return
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    mean = accelerator.reduce(flat, reduction="mean")
    for buffer, values in zip(buffers, mean.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))
