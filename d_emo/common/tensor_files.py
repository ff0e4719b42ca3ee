"""Reading files of tensors that others wrote, without running any code that they may hold."""

import argparse
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from d_emo.common.messages import first_line
from d_emo.common.saved_folders import LOADING_ERRORS

# What wrappers put before a network's names: PyTorch's own (compilation, sharding, activation checkpointing) wherever a
# module of the network is wrapped, those of trainers (parallel and averaged networks) before all names at once.
INNER_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
OUTER_WRAPPERS = ("module", "model", "ema", "ema_model", "network", "net", "state_dict")
# What averaging counts beside the weights (torch.optim.swa_utils, ema_pytorch); no weights of any network.
COUNTERS = ("n_averaged", "num_updates", "initted", "step")
# Where checkpoints hold a state dictionary that is not named after what it is.
HOLDERS = ("state_dict", "model_state_dict", "module")


def strip_wrappers(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dictionary under the network's own names, whatever it was wrapped in and in whichever order.

    Args:
        state: tensors by name, perhaps as `_orig_mod.module.blocks.0._fsdp_wrapped_module.weight`.

    Returns:
        The same tensors by names without wrappers (`blocks.0.weight`), in the same order; averaging's counters are
        left out where a wrapper stood beside them.

    Raises:
        ValueError: two tensors would have one name: two networks in one file.
    """
    names = {name: _without(name.split("."), INNER_WRAPPERS) for name in state}
    while prefix := _shared_wrapper(names.values()):
        names = {name: parts[1:] for name, parts in names.items() if parts[0] == prefix}
    stripped: dict[str, Any] = {}
    for name, parts in names.items():
        plain = ".".join(parts)
        if plain in stripped:
            raise ValueError(f"{name} and another tensor are both {plain}; keep one network's weights in the file.")
        stripped[plain] = state[name]
    return stripped


def _without(parts: Sequence[str], wrappers: Sequence[str]) -> list[str]:
    return [part for part in parts if part not in wrappers]


def _shared_wrapper(names: Any) -> str:
    """The wrapper that all names begin with, counters aside; empty if there is none."""
    first = {parts[0] if len(parts) > 1 else "" for parts in names if not _is_counter(parts)}
    found = first.pop() if len(first) == 1 else ""
    return found if found in OUTER_WRAPPERS else ""


def _is_counter(parts: Sequence[str]) -> bool:
    return len(parts) == 1 and parts[0] in COUNTERS


def read_state(path: Path, parts: Sequence[str], *chosen: str) -> dict[str, torch.Tensor]:
    """The tensors of a .pt, .pth, .bin or .safetensors file by the network's own names (`strip_wrappers`).

    Args:
        path: a bare state dictionary, or a trainer's full checkpoint.
        parts: names under which full checkpoints of this kind hold state dictionaries.
        chosen: which of them is wanted, where the file has any; of several names, the first that the file has.

    Raises:
        ValueError: no such file, no file of tensors, or the weights asked for are not in it.
    """
    content = read_tensors(path)
    try:
        content = _held(content, parts, chosen)
        if not _is_state(content):
            raise ValueError("it holds no state dictionary; pass a file of a network's tensors by name.")
        state = strip_wrappers(content)
        begun = {part: {name: state[name] for name in state if name.startswith(f"{part}.")} for part in parts}
        if sum(map(bool, begun.values())) > 1:  # several networks, side by side
            state = strip_wrappers(_part({part: named for part, named in begun.items() if named}, chosen))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return state


def read_tensors(path: Path) -> Any:
    """What a file of tensors holds, on the CPU; nothing in it is run.

    Raises:
        ValueError: there is no such file, or it is none of tensors.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Full checkpoints also hold the trainer's options.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch's message advises to switch its safety off.
        raise ValueError(
            f"{path}: not a file of tensors: it is damaged, or holds Python objects, which could run code; save the "
            "network's state_dict() alone, where it comes from."
        ) from error
    except LOADING_ERRORS as error:
        raise ValueError(f"{path}: not a file of tensors ({first_line(error)}); copy it again.") from error


def _held(content: Any, parts: Sequence[str], chosen: Sequence[str]) -> Any:
    """The state dictionary in a checkpoint, however deep."""
    while isinstance(content, dict):
        if set(parts) & {name for name, value in content.items() if isinstance(value, dict)}:
            content = _part(content, chosen)
        elif held := [name for name in HOLDERS if isinstance(content.get(name), dict)]:
            content = content[held[0]]
        else:
            break
    return content


def _part(content: Mapping[str, Any], chosen: Sequence[str]) -> Any:
    if (found := next((name for name in chosen if name in content), None)) is None:
        raise ValueError(f"there are no {chosen[0]!r} weights in it, but {', '.join(content)}; see --weights.")
    return content[found]


def _is_state(content: Any) -> bool:
    """Whether it is tensors by name."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items())
    )
