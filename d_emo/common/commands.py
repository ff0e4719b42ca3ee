"""How every command ends: with what it made, or with one line that says why not."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from d_emo.common.messages import describe_os_error, first_line

P = ParamSpec("P")
# Set to show where an error came from, in place of its line alone.
TRACEBACK = "D_EMO_TRACEBACK"


class CommandError(Exception):
    """Ends a command with its line, though it is no wrong value that was given."""


def command(name: str, kept: str = "", extra: str = "") -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a function the `main` of a command: what a user can mend, Ctrl-C and a closed pipe end it with one line.

    That is every ValueError and CommandError, every refusal of the system (OSError) and want of memory; other errors
    are ours and keep their traceback. With $D_EMO_TRACEBACK set, all of them do.

    Args:
        name: begins the line.
        kept: what an interruption leaves, for its line.
        extra: of the package's extras, the one that brings modules that are missing.
    """

    def decorate(main: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                try:
                    main(*args, **kwargs)
                finally:
                    sys.stdout.flush()  # where a closed pipe shows, as early as here
            except BrokenPipeError:
                leave_closed_pipe()
            except KeyboardInterrupt:
                print(f"\n{name}: interrupted" + (f"; {kept}" if kept else ""), file=sys.stderr)
                sys.exit(128 + signal.SIGINT)
            except Exception as error:
                reason = explanation(error)
                if isinstance(error, ModuleNotFoundError) and extra:
                    reason = f"{error.name} is not installed: pip install 'd-emo[{extra}]'"
                if reason is None or os.environ.get(TRACEBACK):
                    raise
                sys.exit(f"{name}: {reason}")

        return run

    return decorate


def explanation(error: BaseException) -> str | None:
    """One line for an error that a user can mend; None for others."""
    if isinstance(error, OSError):
        return describe_os_error(error)
    # torch.OutOfMemoryError, and what PyTorch says on a CPU; it need not be imported for that.
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or "not enough memory" in str(error):
        return f"the memory does not suffice ({first_line(error)}); use smaller batches or pictures, or fewer processes"
    if isinstance(error, ValueError | CommandError) or type(error) is ImportError:
        return first_line(error)
    return None


def leave_closed_pipe() -> None:
    """End quietly, as programs do whose output nobody reads any more, such as that of `COMMAND | head`."""
    with Path(os.devnull).open("w") as nothing:
        for stream in (sys.stdout, sys.stderr):
            try:
                os.dup2(nothing.fileno(), stream.fileno())  # or the interpreter complains once more at its end
            except (OSError, ValueError, AttributeError):
                continue
    sys.exit(128 + getattr(signal, "SIGPIPE", 13))
