"""What a checkpoint holds of a run besides the averaged model: weights, optimizer, random numbers. Nothing is pickled.

`model.safetensors` and `optimizer.safetensors` hold whole tensors under the parameters' names, whether or not they were
sharded, so that a run goes on with another number of processes, with FSDP2 or without. `optimizer.json` has the numbers
among the optimizer's state, `random-RANK.json` each process's generators. The learning rate follows from the step and
the options. Checkpoints of older versions (pickles that Accelerate wrote) are read with PyTorch's safe loader, all but
their schedule's, which is not opened.
"""

import json
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import load as load_safely
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from d_emo.common.commands import CommandError
from d_emo.common.files import write_json
from d_emo.common.messages import first_line
from d_emo.common.processes import is_sharded
from d_emo.train.engine.run import AnyRun
from d_emo.train.engine.sharding import shared_out, whole

MODEL_FILE, OPTIMIZER_FILE, NUMBERS_FILE, RANDOM_FILE = (
    "model.safetensors", "optimizer.safetensors", "optimizer.json", "random-{}.json"
)  # fmt: skip
OLD_OPTIMIZER_FILE, OLD_RANDOM_FILE = "optimizer.bin", "random_states_{}.pkl"
# Of an optimizer's groups: these come from the run's options, which may be others than before.
HYPERPARAMETERS = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum", "params")


class StateError(ValueError):
    """A checkpoint's state that does not fit the run; the message says what."""


def save_state(run: AnyRun, folder: Path) -> None:
    """Write the state of a run; every process calls this."""
    model = run.accelerator.unwrap_model(run.model)
    if run.accelerator.is_main_process or is_sharded(run.accelerator):  # all take part in gathering shards
        tensors, numbers = _optimizer_state(model, run.optimizer)
        weights = {name: _on_cpu(tensor) for name, tensor in model.state_dict().items()}
    if run.accelerator.is_main_process:
        save_file(_apart(weights), folder / MODEL_FILE)
        save_file(_apart(tensors), folder / OPTIMIZER_FILE)
        write_json(folder / NUMBERS_FILE, numbers)
    write_json(folder / RANDOM_FILE.format(run.accelerator.process_index), _random_state())


def load_state(run: AnyRun, folder: Path, step: int, processes: int) -> None:
    """Bring a run to where a checkpoint was; every process calls this.

    Args:
        run: with fresh parts, made of the options that shall hold from now on.
        folder: of the state.
        step: of the checkpoint, from which the learning rate follows.
        processes: that wrote it; with another number each process goes on with its own fresh random numbers.

    Raises:
        StateError: files are damaged or of another network or optimizer.
    """
    model = run.accelerator.unwrap_model(run.model)
    try:
        _load_model(model, folder / MODEL_FILE)
        if (folder / OPTIMIZER_FILE).is_file():
            _load_optimizer(model, run.optimizer, folder)
        else:
            _load_old_optimizer(run.optimizer, folder / OLD_OPTIMIZER_FILE)
        if processes == run.accelerator.num_processes:
            _load_random_state(folder, run.accelerator.process_index)
    except (SafetensorError, RuntimeError, ValueError, LookupError, TypeError, OverflowError, AttributeError) as error:
        if isinstance(error, StateError):
            raise
        raise StateError(f"{folder}: its state does not fit this run ({first_line(error)}).") from error
    set_schedule(run.lr_schedule, step)


def set_schedule(schedule: torch.optim.lr_scheduler.LRScheduler, step: int) -> None:
    """Bring a schedule whose rate is a function of the step (a LambdaLR) to a step."""
    # Its count of calls only serves a warning, of a first call that comes too early.
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step - 1, "_step_count": step + 1})
    schedule.step()


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return whole(tensor.detach()).cpu()


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors, none of which shares its memory with another."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        result[name] = tensor.contiguous().clone() if place in seen else tensor.contiguous()
        seen.add(place)
    return result


def _load_model(model: torch.nn.Module, path: Path) -> None:
    own = model.state_dict()
    with safe_open(path, framework="pt") as file:
        # DDP's prefix, in checkpoints of older versions.
        names = {name.removeprefix("module."): name for name in list(file.keys())}
        if names.keys() != own.keys():
            different = sorted(names.keys() ^ own.keys())
            raise StateError(f"{path}: of another network ({len(different)} names differ, first {different[:3]}).")
        for name, stored in names.items():
            value = file.get_tensor(stored)
            if value.shape != own[name].shape:
                raise StateError(
                    f"{path}: {name} is {tuple(value.shape)} there and {tuple(own[name].shape)} in this run."
                )
            own[name].copy_(shared_out(value, own[name]))


def _optimizer_state(model: torch.nn.Module, optimizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by "KEY/PARAMETER"; numbers of parameters and groups."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names[parameter]
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{key}/{name}"] = _on_cpu(value)
            elif _is_plain(value):
                numbers.setdefault(name, {})[key] = value
            else:
                raise CommandError(
                    f"--optimizer {type(optimizer).__name__} keeps a {type(value).__name__} ({key}), which no "
                    "checkpoint can hold; choose another optimizer."
                )
    groups = [
        {key: value for key, value in group.items() if key not in HYPERPARAMETERS and _is_plain(value)}
        for group in optimizer.param_groups
    ]
    return tensors, {"parameters": numbers, "groups": groups}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _load_optimizer(model: torch.nn.Module, optimizer: Any, folder: Path) -> None:
    numbers = json.loads((folder / NUMBERS_FILE).read_text(encoding="utf-8"))
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Any]] = {name: dict(values) for name, values in numbers["parameters"].items()}
    with safe_open(folder / OPTIMIZER_FILE, framework="pt") as file:
        for entry in list(file.keys()):
            key, _, name = entry.partition("/")
            states.setdefault(name, {})[key] = _laid_out(file.get_tensor(entry), parameters[name])
    content = optimizer.state_dict()
    if len(numbers["groups"]) != len(content["param_groups"]):
        raise StateError(f"{folder / NUMBERS_FILE}: of another optimizer.")
    names = {parameter: name for name, parameter in parameters.items()}
    flat = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    groups = [
        {**group, **{key: value for key, value in stored.items() if key not in HYPERPARAMETERS}}
        for group, stored in zip(content["param_groups"], numbers["groups"], strict=True)
    ]
    if unknown := states.keys() - {*flat}:
        raise StateError(f"{folder / OPTIMIZER_FILE}: of another network ({sorted(unknown)[:3]}).")
    state = {index: states[name] for index, name in enumerate(flat) if name in states}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _laid_out(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """State of a parameter, as that lies in memory (channels last, say): fused optimizers go through both at once."""
    value = shared_out(value, parameter)
    if value.shape != parameter.shape or isinstance(value, DTensor):
        return value
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _load_old_optimizer(optimizer: Any, path: Path) -> None:
    stored = _read_pickle(path)
    own = optimizer.state_dict()["param_groups"]
    groups = [
        {**old, **{key: group[key] for key in HYPERPARAMETERS if key in group}}
        for old, group in zip(stored["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({"state": stored["state"], "param_groups": groups})


def _read_pickle(path: Path) -> Any:
    """A file of an older version, by PyTorch's loader that runs nothing."""
    try:
        return load_safely(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise StateError(f"{path}: damaged, or it holds more than tensors; it is not loaded.") from error


def _random_state() -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)  # type: ignore[misc]
    state = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def _load_random_state(folder: Path, rank: int) -> None:
    old, path = folder / OLD_RANDOM_FILE.format(rank), folder / RANDOM_FILE.format(rank)
    if old.is_file():
        stored = _read_pickle(old)
        random.setstate(stored["random_state"])
        np.random.set_state(stored["numpy_random_seed"])
        torch.set_rng_state(stored["torch_manual_seed"])
        if torch.cuda.is_available() and "torch_cuda_manual_seed" in stored:
            torch.cuda.set_rng_state_all(stored["torch_cuda_manual_seed"])
        return
    state = json.loads(path.read_text(encoding="utf-8"))
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_bytes(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(_bytes(state["cuda"]))


def _bytes(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
