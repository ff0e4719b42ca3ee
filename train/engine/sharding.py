"""Tensors that FSDP2 shares out, whole and back."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; of a sharded one every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shared_out(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor that every process has, sharded as `like` is: this process's part; as it is where that is whole.

    What has another shape than `like`, such as an optimizer's counter, stays whole.
    """
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
