"""The folder of compiled kernels: what is loaded from it, what is made again, what is left alone."""

import logging
import os
import shutil
from pathlib import Path

import pytest
import torch

from d_emo.kernels.cpp import build

pytestmark = pytest.mark.skipif(bool(build.obstacle()), reason=f"no C++ kernels here: {build.obstacle()}")
KIND = torch.float32


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, a compiler that copies a library made before, and a count of its runs."""
    library = Path(build.library(KIND)._name)
    runs = []

    def copied(command, **options):
        if "-o" in command:
            runs.append(command)
            shutil.copy(library, command[-1])
            command = ["true"]
        return real(command, **options)

    real = build.subprocess.run
    monkeypatch.setattr(build.subprocess, "run", copied)
    monkeypatch.setenv("D_EMO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "library", build.library.__wrapped__)
    monkeypatch.setattr(build, "obstacle", build.obstacle.__wrapped__)
    return tmp_path / "cache", runs


def libraries(folder):
    return [path for path in folder.iterdir() if path.suffix == ".so"]


def test_a_library_is_made_once_for_its_owner_alone(cache):
    folder, runs = cache
    before = os.umask(0)
    try:
        build.library(KIND)
        build.library(KIND)
    finally:
        os.umask(before)
    assert len(runs) == 1
    (path,) = libraries(folder)
    assert folder.stat().st_mode & 0o777 == path.stat().st_mode & 0o777 == 0o700


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes() if path.is_file() else b""
    other = path.parent.parent / "other.so"
    if how in ("empty", "cut short", "changed"):
        path.unlink()  # this process has it in its memory
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut short":
        path.write_bytes(content[: len(content) // 2])
    elif how == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "a link":
        path.rename(other)
        path.symlink_to(other)
    elif how == "a dead link":
        path.unlink()
        path.symlink_to(path.parent.parent / "nowhere.so")
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    elif how == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif how == "writable by others":
        path.chmod(0o777)
    elif how == "of another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give files away")
        os.chown(path, 12345, 12345)


@pytest.mark.parametrize(
    "how",
    ["empty", "cut short", "changed", "a link", "a dead link", "a folder", "a pipe", "writable by others",
     "of another user"],
)  # fmt: skip
def test_what_is_not_whole_and_ours_is_made_again(cache, how):
    folder, runs = cache
    build.library(KIND)
    (path,) = libraries(folder)
    whole = path.read_bytes()
    spoil(path, how)
    build.library(KIND)
    assert len(runs) == 2
    (path,) = libraries(folder)
    assert path.is_file() and not path.is_symlink() and path.read_bytes() == whole
    assert path.stat().st_uid == os.geteuid() and path.stat().st_mode & 0o077 == 0
    assert not (folder.parent / "nowhere.so").exists()  # nothing was written through the link
    if how == "a link":
        assert (folder.parent / "other.so").read_bytes() == whole


def test_what_a_killed_build_left_is_deleted_by_the_next(cache):
    folder, _ = cache
    folder.mkdir(mode=0o700)
    (folder / ".partial-killed").mkdir()
    (folder / ".partial-killed" / "float.so").write_bytes(b"half")
    (folder / ".partial-link").symlink_to(folder.parent)
    build.library(KIND)
    assert not list(folder.glob(".partial-*")) and folder.parent.is_dir()


@pytest.mark.parametrize("how", ["writable by others", "of another user", "a file", "not to be made"])
def test_a_cache_that_is_not_safe_leaves_plain_pytorch(cache, monkeypatch, caplog, how):
    folder, runs = cache
    if how == "a file":
        folder.write_bytes(b"")
    elif how == "not to be made":
        monkeypatch.setenv("D_EMO_CACHE", "/proc/d_emo")
    else:
        folder.mkdir()
        spoil(folder, how)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    obstacle = build.obstacle(KIND)
    assert obstacle.endswith("set D_EMO_CACHE to a folder of your own") and "\n" not in obstacle
    assert not runs and obstacle in caplog.text


def test_processes_share_one_build(cache):
    """The one that waited finds what the other has made."""
    folder, runs = cache
    folder.mkdir(mode=0o700)
    asked = []

    def nothing_at_first(*arguments):
        asked.append(arguments)
        return None if len(asked) == 1 else kept(*arguments)

    build.library(KIND)
    kept, build._kept = build._kept, nothing_at_first
    try:
        build.library(KIND)
    finally:
        build._kept = kept
    assert len(asked) == 2 and len(runs) == 1
