"""What commands say on their way: lines, bars on a terminal, and lines in place of bars where there is none.

Everything that shows progress comes through here, so that a log file holds lines and no bars, whoever draws them.
"""

import contextlib
import errno
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

# Without a terminal, long work says how far it is after so many seconds, and again when a share of the time so far has
# passed since: some lines in an hour, and not thousands in a week.
FIRST_LINE, PACE = 20.0, 0.1
# Warnings of libraries that a user can do nothing more about, each by how it begins.
NOISE = (
    r"This DataLoader will create \d+ worker",  # the default is at most the cores: more were asked for
    r"`broadcast_buffers` is deprecated",  # Accelerate has no name for what PyTorch takes instead, nor old PyTorch
    r"The `local_dir_use_symlinks` argument is deprecated",  # Diffusers passes it to the Hub's client
)

# What to do when nobody reads any more, the innermost last; see `reader_gone`.
_when_gone: list[Callable[[], None]] = []


def say(message: str, file: TextIO | None = None) -> None:
    """Print a line at once, above a bar if one is shown. A terminal that vanished changes nothing.

    Args:
        message: the line.
        file: where to; standard output by default.

    Raises:
        BrokenPipeError: nobody reads any more, and no `reader_gone` waits for that.
    """
    from tqdm import tqdm  # after `quiet_libraries`, whose switch tqdm reads when it is imported

    file = file or sys.stdout
    try:
        tqdm.write(message, file=file)
        file.flush()
    except RuntimeError as error:
        # A signal's handler speaks in the middle of another line, where Python's buffers take nothing.
        if "reentrant" not in str(error):
            raise
        with contextlib.suppress(OSError):
            os.write(file.fileno(), f"\n{message}\n".encode())
    except BrokenPipeError:
        if not _when_gone:
            raise
        discard(file)
        _when_gone[-1]()
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        discard(file)


@contextlib.contextmanager
def reader_gone(action: Callable[[], None]) -> Iterator[None]:
    """Within it, a closed pipe (`COMMAND | head`) raises nothing: the action is called, what is said goes nowhere."""
    _when_gone.append(action)
    try:
        yield
    finally:
        _when_gone.pop()


def discard(*streams: TextIO) -> None:
    """Let what is still printed go nowhere; the interpreter would complain of it once more at its end."""
    with Path(os.devnull).open("w") as nothing:
        for stream in streams:
            try:
                os.dup2(nothing.fileno(), stream.fileno())
            except (OSError, ValueError, AttributeError):
                continue


def has_terminal() -> bool:
    """Whether standard error, where bars go, is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """How far long work is: a bar on a terminal, elsewhere a line now and then. A context manager.

    Args:
        total: units of work in all.
        unit: one of them, "image".
        about: what is done, for people.
        done: units that were there before.
        shown: whether this process shows anything.
        lines: whether to print lines where there is no terminal; a trainer has its own.
        leave: whether the bar stays when it is full.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        about: str = "",
        *,
        done: int = 0,
        shown: bool = True,
        lines: bool = True,
        leave: bool = True,
    ):
        bar = shown and has_terminal()
        self.total, self.done, self.unit, self.about = total, done, unit, about
        self.lines = lines and shown and not bar
        self.bar: Any = None
        if bar:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit=unit, desc=about or None, leave=leave, disable=False)
        self.before, self.started = done, time.monotonic()
        self.next_line = self.started + FIRST_LINE

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, count: int = 1, **shown: Any) -> None:
        """So many more units are done, at most all; `shown` stands beside the bar."""
        count = min(count, self.total - self.done)
        self.done += count
        if self.bar is not None:
            if shown:
                self.bar.set_postfix(shown, refresh=False)
            self.bar.update(count)
        elif self.lines and self.done < self.total and (now := time.monotonic()) >= self.next_line:
            self.next_line = now + max(FIRST_LINE, PACE * (now - self.started))
            say(self.line(now - self.started), sys.stderr)

    def line(self, seconds: float) -> str:
        """How far, how fast and how long, after so many seconds."""
        speed = (self.done - self.before) / max(seconds, 1e-9)
        left = f", {duration((self.total - self.done) / speed)} left" if speed > 0 else ""
        about = f"{self.about}: " if self.about else ""
        return (
            f"{time_stamp()} {about}{self.done:,} of {self.total:,} {self.unit}s, {speed:.1f} {self.unit}s/s, "
            f"{duration(seconds)} elapsed{left}"
        )


def time_stamp() -> str:
    """The time of day, with its date."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """Seconds as 0:05, 12:05, 3:12:05 or 4 days 3:12:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days:,} day{'s' if days > 1 else ''} {hour}:{minute:02d}:{second:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


@contextlib.contextmanager
def unsaid(logger: str, begins: str) -> Iterator[None]:
    """Within it, a library's logger says nothing that begins so: for what it says of its own files.

    Args:
        logger: its name.
        begins: how the messages begin.
    """

    def passes(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(begins)

    speaker = logging.getLogger(logger)
    speaker.addFilter(passes)
    try:
        yield
    finally:
        speaker.removeFilter(passes)


def quiet_libraries() -> None:
    """Show no bars of libraries where there is no terminal, and no warnings that a user can do nothing about.

    By the libraries' own switches: for those that are not imported yet in the environment, which started processes
    inherit; what the user set there stands.
    """
    for begins in NOISE:
        warnings.filterwarnings("ignore", message=begins)
    if has_terminal():
        return
    for name in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    for name in ("huggingface_hub.utils", "datasets.utils"):
        if name in sys.modules:
            sys.modules[name].disable_progress_bars()
    for name in ("transformers.utils.logging", "diffusers.utils.logging"):
        if name in sys.modules:
            sys.modules[name].disable_progress_bar()
