"""Folders and files that nobody else can have changed, for what is run as code.

Owned by this user or root, and writable by nobody else, up to the root of the file system. A parent that everybody may
write is fine where its sticky bit keeps them off others' files, as in /tmp, and a group of this user's own is nobody
else.
"""

import os
import stat
from pathlib import Path


def private_folder(path: Path, remedy: str) -> Path:
    """The folder with every link resolved, made with mode 0700 if it is not there.

    Args:
        path: of the folder; links on the way are followed if this user or root made them.
        remedy: what to do instead, for the message.

    Raises:
        PermissionError: somebody else owns it or may write it, or a folder above it; the message says which.
        OSError: it is no folder, or cannot be made.
    """
    path = path.absolute()
    _check_way(path, remedy)
    for part in (*reversed(path.parents), path):
        if not part.is_dir():
            part.mkdir(mode=0o700, exist_ok=True)  # each: `parents=True` would leave theirs to the umask
    resolved = path.resolve()
    _check_way(resolved, remedy)
    if _written_by_others(resolved.stat()):  # sticky or not: others could put files here
        raise PermissionError(f"{resolved} is writable by others; chmod go-w {resolved}, or {remedy}")
    return resolved


def _check_way(path: Path, remedy: str) -> None:
    for part in reversed((path, *path.parents)):
        try:
            status = part.lstat()
        except FileNotFoundError:
            return  # made by us, from here on
        if not _ours(status):
            raise PermissionError(f"{part} belongs to another user; {remedy}")
        sticky = status.st_mode & stat.S_ISVTX
        if not stat.S_ISLNK(status.st_mode) and _written_by_others(status) and not sticky:
            raise PermissionError(f"{part} is writable by others; chmod go-w {part}, or {remedy}")


def read_private(path: Path) -> bytes | None:
    """A file's content; None if it is not there, is a link or no file, or another user owns it or may write it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or not _ours(status) or _written_by_others(status):
        os.close(descriptor)
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def _ours(status: os.stat_result) -> bool:
    return status.st_uid in (os.geteuid(), 0)


def _written_by_others(status: os.stat_result) -> bool:
    by_group = status.st_mode & stat.S_IWGRP and not _own_group(status.st_gid)
    return bool(by_group or status.st_mode & stat.S_IWOTH)


def _own_group(group: int) -> bool:
    """Whether a group is this user's alone, as systems with a umask of 002 make one for each."""
    import grp
    import pwd

    try:
        entry, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return group == user.pw_gid and entry.gr_name == user.pw_name and set(entry.gr_mem) <= {user.pw_name}
