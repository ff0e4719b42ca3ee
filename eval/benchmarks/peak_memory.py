"""The most memory that a piece of work holds, above what was held before it."""

import ctypes
import gc
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMemory:
    """A `with` block whose peak is in `mib` afterwards; None where it cannot be read.

    CUDA: bytes of tensors. CPU (Linux): resident memory of the process, after freed memory went back to the system.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.mib: float | None = None

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        elif STATUS.exists():
            ctypes.CDLL(None).malloc_trim(0)
            try:
                CLEAR_REFS.write_text("5")  # resets the peak (proc(5))
                self._before = _resident("VmRSS")
            except OSError:
                self._before = 0
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.mib = (torch.cuda.max_memory_allocated(self.device) - self._before) / 2**20
        elif STATUS.exists() and self._before:
            self.mib = (_resident("VmHWM") - self._before) / 2**10


def _resident(field: str) -> int:
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))  # in KiB
