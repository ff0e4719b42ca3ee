"""Ctrl-C, a scheduler's SIGTERM and a lost terminal: save after the step in progress, then stop."""

import signal
import threading
from typing import Any

import torch
from accelerate import Accelerator

from d_emo.common.output import say
from d_emo.common.processes import leave_interrupts

# Ctrl-C, a scheduler's or launcher's wish, a terminal that is closed. Those that are ignored (nohup) stay ignored.
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopRequest:
    """Turns Ctrl-C, SIGTERM and SIGHUP into "save and stop after this step"; a second Ctrl-C stops at once.

    Other signals may come twice for one wish: of a scheduler, and of a launcher that passes it on. A context manager:
    the signals' former handlers are put back at its end.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, Any] = {}
        self._asked: bool | torch.Tensor = False

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python hands signals to the main thread alone, as of a notebook's server
        wanted = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._former = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: Any) -> None:
        if self.received is not None:
            if number != signal.SIGINT:
                return
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        say("stopping: saving a checkpoint after this step (Ctrl-C again: at once, without it)")

    def because_nobody_reads(self) -> None:
        """Stop like that, too, when what is printed goes into a pipe that was closed."""
        self.received = self.received or getattr(signal, "SIGPIPE", 13)

    @property
    def exit_code(self) -> int:
        """The shell's code for the signal."""
        return 128 + (self.received or signal.SIGTERM)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all of them get the same answer.

        On accelerators it is that of a step before, which is there by now: nothing waits for this one's.
        """
        if accelerator.num_processes == 1:
            return self.received is not None
        flag = torch.tensor(float(self.received is not None), device=accelerator.device)
        answer = accelerator.reduce(flag, reduction="sum") > 0
        if accelerator.device.type != "cpu":
            answer, self._asked = self._asked, answer
        return bool(answer)


def leave_stops_to_the_trainer(worker: int) -> None:
    """Start of a loader's process: Ctrl-C and SIGTERM, which reach a whole group, are for the process that saves."""
    leave_interrupts(worker, STOP_SIGNALS)
