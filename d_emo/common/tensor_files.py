"""Reading files of tensors that others wrote, without running any code that they may hold."""

import argparse
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from d_emo.common.messages import first_line


def read_state(path: Path, parts: Sequence[str], chosen: str) -> dict[str, torch.Tensor]:
    """The tensors of a .pt or .pth file by their published names.

    Args:
        path: a bare state dictionary, or a trainer's full checkpoint.
        parts: names under which full checkpoints of this kind hold state dictionaries.
        chosen: which of them is wanted, where the file has any.

    Raises:
        ValueError: no such file, no file of tensors, or the weights asked for are not in it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file.")
    try:
        # Full checkpoints also hold the trainer's options.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = first_line(error)
        raise ValueError(f"{path}: not a file of tensors ({reason}).") from error
    if isinstance(content, dict) and set(parts) & set(content):
        if chosen not in content:
            raise ValueError(f"{path}: there are no {chosen!r} weights in it, but {', '.join(content)}; see --weights.")
        content = content[chosen]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path}: it holds no state dictionary.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}
