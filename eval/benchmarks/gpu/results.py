"""What the parts of a run on a GPU share: results as lines of JSON, written as they come, and how times are taken."""

import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from d_emo.common.messages import kind_and_line
from d_emo.common.output import say
from d_emo.common.processes import default_device
from d_emo.eval.benchmarks.gpu.parts import write_result


class Results:
    """The results of one part.

    Args:
        folder: gets `results.jsonl`; several processes may write into it.
        tiny: whether this is a rehearsal, which every part makes as small as it can.
        shard: (i, n): of what `attempt` is given, every n-th from the i-th on is run.
        seconds: that the part has.
    """

    def __init__(
        self, folder: Path, *, tiny: bool = False, shard: tuple[int, int] = (0, 1), seconds: float = float("inf")
    ):
        self.folder, self.tiny, self.shard = folder, tiny, shard
        self.device = default_device()
        self.ends = time.monotonic() + seconds
        self.attempts = 0

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU of NVIDIA's (or one that PyTorch calls so)."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds left."""
        return self.ends - time.monotonic()

    def add(self, kind: str, **values: Any) -> None:
        """Write and print a line."""
        say(write_result(self.folder, kind=kind, **{key: _rounded(value) for key, value in values.items()}))

    def attempt(self, kind: str, name: str, work: Callable[[], dict[str, Any] | None], least: float = 0) -> None:
        """Do some work and write what it answers; what it raises is a result, too.

        Args:
            kind, name: of the line.
            work: answers more values of the line; `ok` among them, if it judges itself.
            least: seconds, with less of which it is not begun.
        """
        turn, self.attempts = self.attempts, self.attempts + 1
        if turn % self.shard[1] != self.shard[0]:
            return
        if self.left() < least:
            self.add(kind, name=name, ok=False, error="no time left")
            return
        began = time.monotonic()
        try:
            found = {"ok": True, **(work() or {})}
        except Exception as error:  # whatever a compiler, a driver or a full memory raises
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}, line {where.lineno}"
            found = {"ok": False, "error": kind_and_line(error), "where": place}
        self.add(kind, name=name, s=time.monotonic() - began, **found)
        if not found["ok"] and self.cuda:
            torch.cuda.synchronize()  # raises where the context is lost, which ends the part: nothing would work in it
            torch.cuda.empty_cache()

    def seconds_of(self, work: Callable[[], Any], repeats: int = 7, budget: float = 1.5) -> float:
        """Median seconds of some work after two runs of it, by the GPU's own clock; `budget` seconds at most or so."""
        for _ in range(1 if self.tiny else 2):
            work()
        self.synchronize()
        began, times = time.monotonic(), []
        for _ in range(2 if self.tiny else repeats):
            times.append(self._timed(work))
            if time.monotonic() - began > budget:
                break
        return statistics.median(times)

    def _timed(self, work: Callable[[], Any]) -> float:
        if not self.cuda:
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def synchronize(self) -> None:
        """Wait for the GPU, if there is one."""
        if self.cuda:
            torch.cuda.synchronize()


def _rounded(value: Any) -> Any:
    return round(value, 5) if isinstance(value, float) else value


@torch.no_grad()
def relative_error(actual: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    """The norm of the difference, over that of what was expected, or of `scale`."""
    difference = (actual.double() - expected.double()).norm()
    return float(difference / (expected if scale is None else scale).double().norm())


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; one that was cut off in the middle is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
