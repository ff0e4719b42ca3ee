"""Locks of folders: held by the system, and gone with the process that holds them, however it ends.

POSIX record locks on a file `.lock` in the folder. Unlike those of flock, processes that are forked for loading data do
not inherit them, so a killed trainer leaves its folder free at once. A file system without locks has none.
"""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from d_emo.common.files import LOCK_FILE, check_writable, holds_something, remove, remove_partial

# Seconds between two attempts of those who wait.
_PAUSE = 0.2
# Folders that this process has locked; the system does not tell a process from itself.
_held: set[str] = set()


class LockedError(ValueError):
    """Another process works in the folder; the message names both."""


class FolderLock:
    """A lock of a folder, held until `release`, the end of a `with`, or of the process.

    Args:
        folder: is made if it is not there.
        option: how the user named it, for the message: "--output-dir".
        remedy: what else to do, for the message.
        wait: wait for it, with a line on the screen, instead of giving up.

    Raises:
        LockedError: another process has it.
        OSError: the file cannot be made, as in a read-only folder; a link at its name is not followed.
    """

    def __init__(self, folder: Path, option: str = "", remedy: str = "choose another folder", *, wait: bool = False):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder.resolve() / LOCK_FILE
        self._descriptor: int | None = None
        said = False
        while not self._acquire():
            if not wait:
                named = f"{option} {folder}".strip()
                raise LockedError(f"{named} is in use by {self._holder()}; wait until it is done, or {remedy}.")
            if not said:
                print(f"waiting for {self._holder()}, which works in {folder} ...", file=sys.stderr, flush=True)
                said = True
            time.sleep(_PAUSE)

    def _acquire(self) -> bool:
        if str(self.path) in _held:
            return False
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        try:
            descriptor = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        if not _lock(descriptor) or not _lies_at(descriptor, self.path):
            os.close(descriptor)
            return False
        with contextlib.suppress(OSError):  # a full disk takes the lock, and no name
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._descriptor = descriptor
        _held.add(str(self.path))
        return True

    def _holder(self) -> str:
        if str(self.path) in _held:
            return "this process"
        with contextlib.suppress(OSError):
            if text := self.path.read_text(encoding="utf-8", errors="replace").strip():
                return text[:80]
        return "another process"

    def release(self) -> None:
        """Give the folder free."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            _held.discard(str(self.path))

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def _lies_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that name: who had locked it may have removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _lock(descriptor: int) -> bool:
    """Lock an open file for this process; False if another one has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks
        return True
    return True


@contextlib.contextmanager
def output_folder(folder: Path, option: str = "--output-dir") -> Iterator[None]:
    """Make a folder of results and keep others out of it; what was not there and stays empty is removed again.

    Args:
        folder: what the user named.
        option: how, for messages.

    Raises:
        LockedError: another process works in it.
        ValueError: a file lies there, or nothing may be written there.
    """
    check_writable(folder, option, folder=True)
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    with FolderLock(folder, option, "name another"):
        remove_partial(folder)
        try:
            yield
        finally:
            if new and not holds_something(folder):
                remove(folder)
                with contextlib.suppress(OSError):  # one is not empty by now
                    for place in new[1:]:
                        place.rmdir()
