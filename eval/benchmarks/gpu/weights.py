"""Weights in files that come back from a machine which hands out few and small ones, and what a run goes on from.

Groups: `ema/` the averaged weights and statistics, `raw/` the trained ones, `m/` and `v/` the optimizer's moments, the
latter as square roots. Matrices are float16, vectors as they are, moments bfloat16.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from d_emo.common.files import read_json, remove, write_json
from d_emo.common.tensor_files import read_tensors

Groups = Mapping[str, Mapping[str, torch.Tensor]]
STATE, FILES = "state.json", "weights-*.safetensors"
# Of a file; machines hand out 16 MiB at most, and the header takes some.
FILE_BYTES = 15_500_000
HEADER_BYTES = 200
# What is kept together or not at all, the most needed first: one moment without the other is of no use.
TOGETHER = (("ema",), ("raw",), ("m", "v"))


def compact(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors on the CPU, matrices and kernels in float16."""
    return {
        name: (tensor.half() if tensor.is_floating_point() and tensor.ndim > 1 else tensor).contiguous().cpu()
        for name, tensor in tensors.items()
    }


def bytes_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """What they take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def chosen(groups: Groups, budget: float) -> list[str]:
    """The groups that fit into so many bytes; the averaged weights always, unless the budget is 0."""
    kept: list[str] = []
    for names in TOGETHER if budget else ():
        present = [name for name in names if name in groups]
        needed = sum(bytes_of(groups[name]) for name in present)
        if len(present) == len(names) and (needed <= budget or names == ("ema",)):
            kept += present
            budget -= needed
    return kept


def write_groups(folder: Path, groups: Groups, budget: float) -> list[str]:
    """Write what fits as files of at most `FILE_BYTES`; which groups that were. Older files go."""
    kept = chosen(groups, budget)
    pieces: list[dict[str, torch.Tensor]] = [{}]
    used = 0
    for group in kept:
        for name, tensor in groups[group].items():
            size = tensor.numel() * tensor.element_size() + HEADER_BYTES
            if used + size > FILE_BYTES and pieces[-1]:
                pieces.append({})
                used = 0
            pieces[-1][f"{group}/{name}"] = tensor
            used += size
    for path in folder.glob(FILES):
        remove(path)
    for number, piece in enumerate(pieces if kept else []):
        save_file(piece, folder / f"weights-{number}.safetensors")
    return kept


def read_groups(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The groups that a folder's files hold, on the CPU.

    Raises:
        ValueError: there are no files, or one holds something else.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for path in sorted(folder.glob(FILES)):
        for name, tensor in read_tensors(path).items():
            group, slash, rest = name.partition("/")
            if not slash:
                raise ValueError(f"{path}: {name} is in no group; name a folder that `train` of this package wrote.")
            groups.setdefault(group, {})[rest] = tensor
    if "ema" not in groups:
        raise ValueError(f"{folder}: there are no averaged weights; name a folder that `train` of this package wrote.")
    return groups


def read_network_state(folder: Path) -> dict[str, Any]:
    """What a run left beside its weights: model, overrides, step, images, runs, seconds.

    Raises:
        ValueError: it is missing or damaged.
    """
    path = folder / STATE
    if not path.is_file():
        raise ValueError(f"{folder}: there is no {STATE}; name a folder that `train` of this package wrote.")
    state = read_json(path, "take the run's other copy")
    if missing := [name for name in ("model", "overrides", "step", "images", "runs", "seconds") if name not in state]:
        raise ValueError(f"{path} says nothing of {', '.join(missing)}; name a folder that `train` wrote.")
    return state


def write_network_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write what `read_network_state` reads."""
    write_json(folder / STATE, dict(state))


def load_into(network: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a network these weights, in its own types.

    Raises:
        ValueError: they are another network's.
    """
    own = network.state_dict()
    if different := sorted(set(own) ^ set(tensors)):
        raise ValueError(f"the weights are another network's: {different[0]} and {len(different) - 1} more differ.")
    network.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in tensors.items()})
