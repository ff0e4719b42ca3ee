"""How every command ends: with what it made, or with one line that says why not."""

import contextlib
import functools
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, ParamSpec

from d_emo.common.messages import describe_os_error, first_line, one_line, own_line
from d_emo.common.output import discard, quiet_libraries
from d_emo.common.typed import as_typed, name_of

P = ParamSpec("P")
# Set to show where an error came from, in place of its line alone.
TRACEBACK = "D_EMO_TRACEBACK"

_LOST_PROCESS = re.compile(
    r"/gloo/.*Connection (closed|reset)|Connection reset by peer|remote process exited", re.DOTALL
)


# The process that started the command that runs; it may end while PyTorch is still being imported.
started_by: int | None = None


class CommandError(Exception):
    """Ends a command with its line, though it is no wrong value that was given."""


def command(name: str, kept: str = "", extra: str = "") -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a function the `main` of a command: what a user can mend, Ctrl-C and a closed pipe end it with one line.

    That is every ValueError and CommandError, every refusal of the system (OSError) and want of memory; other errors
    are ours and keep their traceback. With $D_EMO_TRACEBACK set, all of them do.

    Args:
        name: begins the line, unless the user typed another (`typed.py`).
        kept: what an interruption leaves, for its line.
        extra: of the package's extras, the one that brings modules that are missing.
    """

    def decorate(main: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            global started_by
            started_by = os.getppid()
            _open_streams()
            quiet_libraries()
            print_any_name()
            with _remembered_ctrl_c() as interrupted:
                try:
                    try:
                        main(*args, **kwargs)
                    finally:
                        sys.stdout.flush()  # where a closed pipe shows, as early as here
                except BrokenPipeError:
                    leave_closed_pipe()
                except KeyboardInterrupt:
                    _leave_interrupted(name, kept)
                except Exception as error:
                    if interrupted:  # in the middle of an import it comes out as whatever that raises then
                        _leave_interrupted(name, kept)
                    reason = explanation(error)
                    if isinstance(error, ModuleNotFoundError) and extra:
                        reason = f"{error.name} is not installed: pip install 'd-emo[{extra}]'"
                    elif kept and isinstance(error, OSError):
                        reason = f"{reason}; {kept}"
                    if reason is None or os.environ.get(TRACEBACK):
                        raise
                    sys.exit(one_line(f"{name_of(name)}: {as_typed(reason)}"))

        return run

    return decorate


def _open_streams() -> None:
    """Let a command that was started without output, as by a daemon, print into nothing."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # for good


def print_any_name() -> None:
    """Let file names be printed that are not UTF-8, or not what the terminal can show, in place of an error there."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _remembered_ctrl_c() -> Iterator[list[int]]:
    """A list that holds something once Ctrl-C was pressed, which raises KeyboardInterrupt as ever.

    Ctrl-C reaches forked processes, too, such as a loader's in the moment before they leave it to the command: it ends
    them, and they have nothing to say.
    """
    pressed: list[int] = []
    command = os.getpid()

    def press(number: int, frame: Any) -> None:
        if os.getpid() != command:
            return
        pressed.append(number)
        signal.default_int_handler(number, frame)

    usual = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if usual:
        signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave_interrupted(name: str, kept: str) -> NoReturn:
    print(f"\n{name_of(name)}: interrupted" + (f"; {kept}" if kept else ""), file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def explanation(error: BaseException) -> str | None:
    """One line for an error that a user can mend; None for others."""
    if isinstance(error, OSError):
        return describe_os_error(error)
    # torch.OutOfMemoryError, and what PyTorch says on a CPU; it need not be imported for that.
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "not enough memory" in str(error):
        return f"the memory does not suffice ({first_line(error)}); use smaller batches or pictures, or fewer processes"
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
        return (
            f"a loader's process died ({first_line(error)}); use fewer --num-workers, or 0, if memory ran out, or the "
            "shared memory (docker run --shm-size)"
        )
    # What PyTorch raises in a process that waits for another one, once that has ended.
    if isinstance(error, RuntimeError) and _LOST_PROCESS.search(str(error)):
        return "another process of this run has ended; its line says why"
    if isinstance(error, ValueError | CommandError) or type(error) is ImportError:
        return own_line(error)
    return None


def leave_closed_pipe() -> None:
    """End quietly, as programs do whose output nobody reads any more, such as that of `COMMAND | head`."""
    discard(sys.stdout, sys.stderr)
    sys.exit(128 + getattr(signal, "SIGPIPE", 13))
