"""Snapshots of a run's power-function averages: thin files in its folder, of which other averages are made.

`RUN/snapshots/step-STEP.safetensors` holds each followed average of that step, parameters in float16, statistics of
BatchNorm and fixed positions in float32; whole numbers are left out. A file appears whole or not at all.
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from d_emo.common.files import make_folder, refuse_pipe, written_whole
from d_emo.common.float16 import as_saved, stays_float32
from d_emo.common.messages import first_line
from d_emo.common.power_averages import Combination, Profile, combine

FOLDER = "snapshots"
_NAME = re.compile(r"step-(\d+)\.safetensors")
_LENGTHS = "lengths"


class Snapshot(NamedTuple):
    """A file, the step that it is of, and the relative lengths of its averages as texts."""

    path: Path
    step: int
    lengths: tuple[str, ...]


class Chosen(NamedTuple):
    """An average made of snapshots.

    Attributes:
        profile: the average.
        sources: (file, length) of each summand.
        combination: their coefficients.
    """

    profile: Profile
    sources: list[tuple[Snapshot, str]]
    combination: Combination

    @property
    def rounding(self) -> float:
        """Root mean square of what float16's rounding, even within half of a last bit, adds to a weight of 1."""
        return float(np.linalg.norm(self.combination.coefficients)) * 2.0**-11 / 3**0.5


def snapshot_path(folder: Path, step: int) -> Path:
    """Where a run's snapshot of a step is."""
    return folder / FOLDER / f"step-{step:07d}.safetensors"


def thin(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's tensors as snapshots hold them."""
    return {
        name: as_saved(tensor.detach(), stays_float32(name, state.keys())).cpu().contiguous()
        for name, tensor in state.items()
        if tensor.is_floating_point()
    }


def thin_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """Bytes of `thin`, of tensors of any device, where all numbers fit into float16."""
    return sum(
        tensor.numel() * (4 if stays_float32(name, state.keys()) else 2)
        for name, tensor in state.items()
        if tensor.is_floating_point()
    )


def write_snapshot(folder: Path, step: int, averages: Mapping[float, Mapping[str, torch.Tensor]]) -> None:
    """Write a step's averages.

    Args:
        folder: of the run.
        step: optimizer steps done.
        averages: state dictionaries by relative length.
    """
    tensors = {f"{length:g}/{name}": value for length, state in averages.items() for name, value in thin(state).items()}
    path = snapshot_path(folder, step)
    make_folder(path.parent)
    with written_whole(path) as partial:
        save_file(tensors, partial, {_LENGTHS: ",".join(f"{length:g}" for length in averages)})


def delete_after(folder: Path, step: int) -> None:
    """Delete a run's snapshots of later steps: it goes on from this one."""
    for path in (folder / FOLDER).glob("step-*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) > step:
            path.unlink()


def list_snapshots(folder: Path) -> list[Snapshot]:
    """A run's snapshots by step.

    Raises:
        ValueError: there are none, or one is damaged.
    """
    found = []
    for path in sorted((folder / FOLDER).glob("step-*.safetensors")):
        if (match := _NAME.fullmatch(path.name)) is None:
            continue
        try:
            refuse_pipe(path)
            with safe_open(path, framework="pt") as file:
                lengths = tuple((file.metadata() or {})[_LENGTHS].split(","))
            [float(length) for length in lengths]
        except (SafetensorError, OSError, LookupError, ValueError) as error:
            raise _damaged(path, error) from error
        found.append(Snapshot(path, int(match[1]), lengths))
    if not found:
        raise ValueError(f"{folder} has no {FOLDER}; only a run that was trained with --snapshot-every has some.")
    return found


def choose(snapshots: list[Snapshot], length: float, step: int | None = None) -> Chosen:
    """An average of a relative length.

    Args:
        snapshots: of the run.
        length: of the average.
        step: that it is of; None for the last snapshot's.

    Raises:
        ValueError: the length is out of range, or there is no snapshot of that step.
    """
    steps = sorted({snapshot.step for snapshot in snapshots})
    if step is not None and step not in steps:
        raise ValueError(f"step={step}: there is no snapshot of it, but of {steps[0]} to {steps[-1]}.")
    profile = Profile(steps[-1] if step is None else step, length)
    sources = [(snapshot, text) for snapshot in snapshots if snapshot.step <= profile.step for text in snapshot.lengths]
    kept = [Profile(snapshot.step, float(text)) for snapshot, text in sources]
    return Chosen(profile, sources, combine(kept, profile))


@torch.no_grad()
def put_into(model: torch.nn.Module, chosen: Chosen) -> None:
    """Give a model the weights and statistics of an average; summed in float64, whole numbers left as they are.

    Raises:
        ValueError: a snapshot is damaged or of another model.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    sums = {name: torch.zeros(tensor.shape, dtype=torch.float64) for name, tensor in own.items()}
    with ExitStack() as opened:
        files = {}
        for (snapshot, text), coefficient in zip(chosen.sources, chosen.combination.coefficients, strict=True):
            try:
                if snapshot.path not in files:
                    files[snapshot.path] = opened.enter_context(safe_open(snapshot.path, framework="pt"))
                for name, total in sums.items():
                    value = files[snapshot.path].get_tensor(f"{text}/{name}")
                    if value.shape != total.shape:
                        raise ValueError(f"{name} is {tuple(value.shape)} there and {tuple(total.shape)} in the model")
                    total.add_(value.double(), alpha=float(coefficient))
            except (SafetensorError, OSError, ValueError) as error:
                raise _damaged(snapshot.path, error) from error
    for name, total in sums.items():
        # Coefficients may be negative, variances may not.
        own[name].copy_(total.clamp_(min=0) if name.endswith("running_var") else total)


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: damaged, or of another model ({first_line(error)}); delete it, and averages are made of the others."
    )
