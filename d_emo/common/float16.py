"""Saving in float16, half as large, with what float16 would spoil in float32.

What stays: modules with running statistics (BatchNorm) as a whole, since variances of activations know no bounds, and
float16 ends at 65,504 and loses digits below 6e-5; fixed positions, which are computed, not learned, the same for every
model of a size; and any tensor with a number that float16 cannot hold. What is no floating point number stays as it is.
A folder that is loaded without a type gives a model in float32: its other weights are rounded, by one part in 2,048 at
most.
"""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from d_emo.common.checks import text
from d_emo.common.files import check_writable, holds_something, written_folder, written_whole

# The parameter with fixed positions, as the transformers call it; they keep it in float32 when loaded as another type.
POSITIONS = "pos_embed"
# Buffers that tell a module with running statistics.
_STATISTICS = ("running_mean", "running_var")


def save_float16(model: Any, folder: str | os.PathLike) -> None:
    """Save a model or pipeline in float16, with BatchNorm and fixed positions in float32.

    The folder is loaded like any other: `from_pretrained(folder)` gives float32, `dtype=torch.float16` float16.

    Args:
        model: what has `save_pretrained` and writes safetensors: a `DEMOPipeline`, a network of this package, of
            Diffusers or of transformers.
        folder: a new or empty one; it appears whole or not at all.

    Raises:
        ValueError: the model cannot be saved, or the folder holds something.
    """
    target = Path(text(folder, "folder"))
    check_writable(target, "folder", folder=True)
    if not callable(save := getattr(model, "save_pretrained", None)):
        raise ValueError(f"model is a {type(model).__name__} without save_pretrained; pass a pipeline or a model.")
    if holds_something(target):
        raise ValueError(f"folder={str(target)!r} is not empty; choose a new one.")
    with written_folder(target) as partial:
        save(partial)
        files = sorted(partial.rglob("*.safetensors"))
        if not files:
            raise ValueError(f"model={type(model).__name__} saved no safetensors; pass a pipeline or a model.")
        for place in sorted({file.parent for file in files}):  # a network each
            _halve([file for file in files if file.parent == place])
        for index in partial.rglob("*.safetensors.index.json"):
            _count_again(index)


def stays_float32(name: str, names: Collection[str]) -> bool:
    """Whether a tensor is of a module with running statistics, or fixed positions.

    Args:
        name: of the tensor in its network.
        names: of all tensors of the network.
    """
    module, _, last = name.rpartition(".")
    prefix = f"{module}." if module else ""
    return last == POSITIONS or any(f"{prefix}{statistic}" in names for statistic in _STATISTICS)


def _halve(files: list[Path]) -> None:
    """Write the files of one network again."""
    opened = [safe_open(file, "pt") for file in files]
    names = {name for one in opened for name in one.keys()}  # noqa: SIM118  # no mapping
    for file, one in zip(files, opened, strict=True):
        tensors = {name: as_saved(one.get_tensor(name), stays_float32(name, names)) for name in one.keys()}  # noqa: SIM118
        with written_whole(file) as partial:
            save_file(tensors, partial, one.metadata())


def as_saved(tensor: torch.Tensor, stays: bool) -> torch.Tensor:
    """A tensor in the type that it is saved in: float32 if it stays so or does not fit into float16."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.to(torch.float16)
    return tensor.to(torch.float32) if stays or not torch.equal(half.isfinite(), tensor.isfinite()) else half


def _count_again(index: Path) -> None:
    """Put the bytes of all tensors into the list of a model in several files."""
    content = json.loads(index.read_text(encoding="utf-8"))
    if "total_size" in content.get("metadata", {}):
        content["metadata"]["total_size"] = sum(
            _tensor_bytes(index.parent / name) for name in sorted(set(content["weight_map"].values()))
        )
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tensor_bytes(file: Path) -> int:
    """Bytes of the tensors of a file, without what describes them."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
