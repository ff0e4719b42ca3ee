"""The power-function averages that a run follows: in checkpoints whole, in snapshots thin."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from d_emo.common.messages import first_line, readable_size
from d_emo.common.snapshots import FOLDER, thin_bytes, write_snapshot
from d_emo.train.engine.checkpoints import CheckpointError
from d_emo.train.engine.run import AnyRun

STATE_FILE = "power_averages.safetensors"


def save_followed(run: AnyRun, folder: Path) -> None:
    """Write them into a checkpoint's folder of state; every process calls this."""
    tensors = {f"{a.length:g}/{name}": value for a in run.followed for name, value in a.whole_state().items()}
    if run.followed and run.accelerator.is_main_process:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, folder / STATE_FILE)


def load_followed(run: AnyRun, folder: Path) -> None:
    """Take them from a checkpoint's folder of state; every process calls this.

    Raises:
        CheckpointError: it has none of a length.
    """
    if not run.followed:
        return
    try:
        stored = load_file(folder / STATE_FILE)
        for average in run.followed:
            prefix = f"{average.length:g}/"
            state = {name[len(prefix) :]: value for name, value in stored.items() if name.startswith(prefix)}
            if not state:
                raise ValueError(f"none of length {average.length:g}")
            average.load_whole_state(state)
    except (OSError, SafetensorError, ValueError, LookupError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder.parent} does not have the averages of --snapshot-lengths ({first_line(error)}), which begin with "
            "a run; go on with --snapshot-every 0, or start a new run."
        ) from error


def write_followed(run: AnyRun) -> None:
    """Write a snapshot of this step into the run's folder; every process calls this."""
    states = {average.length: average.whole_state() for average in run.followed}
    if run.accelerator.is_main_process:
        write_snapshot(run.output_dir, run.step, states)
    run.accelerator.wait_for_everyone()


def snapshot_steps(every: int, steps: int) -> int:
    """How many snapshots a run of `steps` leaves: one every so many steps and one at its end."""
    return -(-steps // every)


def describe_snapshots(model: torch.nn.Module, lengths: Sequence[float], every: int, steps: int) -> str:
    """What a run's snapshots are and take, for people; the model may be on the meta device."""
    size, count = len(lengths) * thin_bytes(model.state_dict()), snapshot_steps(every, steps)
    named = " and ".join(f"{length:g}" for length in lengths)
    return (
        f"averages of relative length {named} every {every:,} steps: {count:,} files of {readable_size(size)} in "
        f"{FOLDER}/, {readable_size(size * count)} of disk at the end"
    )
