"""Hashes of networks' weights, to know later which ones made a file."""

import hashlib

import torch


def weights_digest(module: torch.nn.Module | None) -> str | None:
    """SHA-256 over a module's names, shapes, types and values; None for no module."""
    if module is None:
        return None
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
