"""One process or many, on a CPU or GPUs: starting Accelerate and ending loaders without their silent traps."""

import ctypes
import multiprocessing
import multiprocessing.queues
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, broadcast_object_list
from torch.distributed.fsdp import MixedPrecisionPolicy

from d_emo.common import commands
from d_emo.common.messages import describe_os_error, first_line

# Scripts and modules that launch others, as Python is told them.
_LAUNCHER = re.compile(r"accelerate(-launch)?|torchrun|accelerate\.commands\.\w+|torch\.distributed\.\w+")
_WATCH_SECONDS = 0.5
# What they set for the processes that they start.
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class LaunchError(ValueError):
    """The launched processes do not know of each other."""


def start_processes(cpu_threads: int | None = None, **options: Any) -> Accelerator:
    """An Accelerator that uses all that was launched.

    Args:
        cpu_threads: threads a process on a CPU; by default the cores are shared out evenly.
        options: of `accelerate.Accelerator`.

    Raises:
        LaunchError: the processes do not know of each other.
        ValueError, ImportError: Accelerate's, for an option that it refuses.
    """
    _end_with_launcher()  # before the processes wait for each other, at a store that may be the launcher's
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise LaunchError(
            "DeepSpeed is not supported: its engine would change the weights before a non-finite gradient is seen. "
            "FSDP2 shards as it does: accelerate launch --config_file train/configs/accelerate/fsdp2.yaml ..."
        )
    if asked_for_fsdp():
        options["fsdp_plugin"] = _fsdp_plugin()
    # Without `cpu`, Accelerate lets each process of a CPU launch work on its own, in silence.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **options)
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise LaunchError(
            f"{launched} processes were launched, but Accelerate joined {accelerator.num_processes}; "
            "check the launch command (several CPU processes start with torchrun)."
        )
    if accelerator.device.type == "cpu":
        # `accelerate launch` sets one thread a process unless told otherwise, which wastes the other cores.
        torch.set_num_threads(cpu_threads or max(1, cores() // accelerator.num_processes))
    return accelerator


def asked_for_fsdp() -> bool:
    """Whether the launch configuration shards the model, which one process alone does not."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _end_with_launcher() -> None:
    """Where a launcher started this process, be asked to stop (SIGTERM) once that is gone.

    `accelerate launch` passes no signal on, and no launcher does when it is killed: its processes would go on unseen.
    A process that something else started (a shell, nohup, tmux) outlives it.
    """
    parent = os.getppid()
    if commands.started_by not in (None, parent) and any(name in os.environ for name in _LAUNCHED):
        raise LaunchError("its launcher ended while it started; nothing was begun.")
    try:
        if not is_launcher(psutil.Process(parent).cmdline()):
            return
    except psutil.Error:
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="launcher watch").start()


def is_launcher(words: Sequence[str]) -> bool:
    """Whether a command line is a launcher's: Python's, with the script or module of one.

    A shell is none, whatever the script or the folders that it names are called.
    """
    program, *rest = words or [""]
    named = next((word for word in rest if not word.startswith("-")), "")
    return Path(program).name.lower().startswith("python") and bool(_LAUNCHER.fullmatch(Path(named).name))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_processes(asked: int | None, default: int) -> int:
    """Processes that read data for this one: as many as were asked for, or the default, at most the cores to share.

    Args:
        asked: by the user; None for the default.
        default: where there are cores enough for each process of this machine (`LOCAL_WORLD_SIZE`).
    """
    if asked is not None:
        return asked
    return min(default, max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def _fsdp_plugin() -> FullyShardedDataParallelPlugin:
    """FSDP2 as `accelerate launch` was told, with what this package's models need."""
    version = os.environ.get("FSDP_VERSION", "1")  # Accelerate's default
    if version != "2":
        raise LaunchError(f"FSDP version {version} is not supported; set fsdp_version: 2.")
    return FullyShardedDataParallelPlugin(
        # Gathered weights stay float32 and autocast computes: BatchNorm's and the loss's arithmetic is as in DDP.
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,  # weights come from a seed or --init-from in every process
    )


T = TypeVar("T")


def agreed(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """What the main process decides, or its ValueError or OSError, on all of them."""
    answer: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            answer[0] = decide()
        except (ValueError, OSError) as error:
            answer[1] = error
    first = answer[1]
    if accelerator.num_processes > 1:
        answer[1] = first and (describe_os_error(first) if isinstance(first, OSError) else str(first))
        broadcast_object_list(answer)
    if first is not None:
        raise first
    if answer[1] is not None:
        raise ValueError(answer[1])
    return answer[0]


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the processes share one copy of the model."""
    return bool(accelerator.is_fsdp2)


def use_tf32(accelerator: Accelerator) -> None:
    """On a GPU, have float32's products in TF32, as the scripts of DiT and SiT have."""
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True


def keep_freed_memory() -> None:
    """Keep freed memory for the next allocation, on Linux with glibc; elsewhere nothing happens.

    A training step on a CPU frees and allocates the same large tensors again and again. glibc gives each above 32 MiB
    back to the system, which then clears new pages for the next: a fifth of a step of DiT-S-2 at batch 32.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_mmap_max, m_trim_threshold = -4, -1  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def is_dead_worker(error: BaseException) -> bool:
    """Whether an error is torch's word that a loader process died.

    It may come up in any line of the main process: a signal handler raises it.
    """
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")


def end_workers(spared: Collection[BaseProcess] = ()) -> None:
    """End the loader processes that are left: they ignore polite signals, and the interpreter would wait for them.

    Args:
        spared: children of this process that are none of ours, such as were there before.
    """
    ours = hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread()
    former = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if ours else None
    for process in (process for process in multiprocessing.active_children() if process not in spared):
        process.kill()
        process.join()
    if former is not None:
        signal.signal(signal.SIGCHLD, former)


def leave_interrupts(_worker: int, signals: Sequence[int] = (signal.SIGINT,)) -> None:
    """Start of a loader's process: Ctrl-C, which reaches the whole group, is for the process that it works for.

    And where that one ends, multiprocessing's thread here, which hands tensors over, would print that nobody took them.
    """
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
    report = sys.excepthook

    def quietly(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        if not issubclass(kind, OSError | EOFError):
            report(kind, error, traceback)

    sys.excepthook = quietly
    # Its thread that hands batches over prints what stops it, such as shared memory that is full, and goes on; who
    # waits for the batch would wait for ever. The death of the process is noticed at once.
    queue_class: Any = multiprocessing.queues.Queue
    queue_class._on_queue_feeder_error = staticmethod(_end_this_process)


def _end_this_process(error: BaseException, _batch: Any) -> None:
    if not isinstance(error, BrokenPipeError):  # the other side ended: so does this one, by itself
        os._exit(1)


def hardware(device: torch.device, count: int = 1) -> str:
    """What is computed on, for people: the accelerator's or the CPU's name, and how many.

    Args:
        device: of a process.
        count: of processes, each on such a device, or all on the cores of one CPU.
    """
    if device.type != "cpu":
        return (f"{count} x " if count > 1 else "") + device_name(device)
    return f"{cores()} cores of {device_name(device)}" + (f" in {count} processes" if count > 1 else "")


def device_name(device: torch.device) -> str:
    """What an accelerator or the CPU is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "a CPU")


def default_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device or torch.device("cpu")


def device_named(name: str | None) -> torch.device:
    """The device of a --device option; None: the accelerator, or the CPU where there is none.

    Raises:
        ValueError: PyTorch knows no such device, or this machine has none.
    """
    if name is None:
        return default_device()
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"--device {name}: {first_line(error)}; choose another, such as cpu.") from error
    return device
