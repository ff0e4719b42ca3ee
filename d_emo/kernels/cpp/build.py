"""The C++ kernels' libraries: compiled for this machine on first use and kept in a cache folder, one for each type.

The cache is `$D_EMO_CACHE`, else `$XDG_CACHE_HOME/d_emo`, else `~/.cache/d_emo`. A library's name holds a hash of the
sources, the compiler and the processor, so several machines may share a home directory, and the SHA-256 of its own
content: what was cut short or changed since is compiled again. A library is code, so none is loaded that somebody else
could have put there (`common/private_folders.py`). Where there is no C++ compiler (or no Linux), or the cache is not
safe, plain PyTorch runs instead and a warning says so, once.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers.utils import logging

from ...common.files import PARTIAL_PREFIX, cache_folder, remove, remove_partial, sync
from ...common.locks import FolderLock
from ...common.messages import first_line
from ...common.private_folders import private_folder, read_private

logger = logging.get_logger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
# No -ffast-math: vectors.h rounds by adding a large number.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
CACHE_REMEDY = "set D_EMO_CACHE to a folder of your own"
STORAGE = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float64: "double"}


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for tensors stored in a type."""
    if sys.platform != "linux":
        raise RuntimeError(f"the CPU kernels are built on Linux only, not on {sys.platform}")
    compiler = _compiler()
    stem, folder = f"{STORAGE[dtype]}-{_digest(compiler)}", private_folder(cache_folder(), CACHE_REMEDY)
    path = _kept(folder, stem)
    if path is None:
        with FolderLock(folder, wait=True):
            path = _kept(folder, stem)  # another process may have made it meanwhile
            if path is None:
                remove_partial(folder)
                logger.info(f"Compiling the CPU kernels for {dtype} into {folder} (once for this machine, seconds) ...")
                path = _compile(compiler, STORAGE[dtype], folder, stem)
    return ctypes.CDLL(str(path))


def _kept(folder: Path, stem: str) -> Path | None:
    """The library of that name, if it is whole and ours; what only looks like it is deleted, where that is allowed."""
    for path in sorted(folder.glob(f"{stem}-*.so")):
        content = read_private(path)
        if content is not None and path.name == _named(stem, content):
            return path
        remove(path)
    return None


def _named(stem: str, content: bytes) -> str:
    return f"{stem}-{hashlib.sha256(content).hexdigest()}.so"


@functools.cache
def obstacle(dtype: torch.dtype = torch.float32) -> str:
    """Why the kernels cannot be used; empty if they can. Compiles them if that has not been done yet."""
    try:
        library(dtype)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = first_line(error)
        if isinstance(error, OSError) and CACHE_REMEDY not in reason:
            reason = f"{reason}; {CACHE_REMEDY}"
        logger.warning(f"Plain PyTorch runs in place of the CPU kernels, and slower: {reason}")
        return reason
    return ""


@functools.cache
def processor() -> dict[str, str]:
    """What the system says of the first processor: "vendor_id", "model name", "flags", "Features", where it does."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines() if cpuinfo.exists() else []
    entries = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in entries}


def _compiler() -> str:
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "c++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise RuntimeError(f"no C++ compiler was found ({', '.join(names)}); install g++ or set CXX")


@functools.cache
def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    machine = [platform.machine(), *(processor().get(name, "") for name in ("model name", "flags", "Features"))]
    content = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.glob("*.[ch]*"))]
    return hashlib.sha256("\0".join([version, *FLAGS, *machine, *content]).encode()).hexdigest()[:16]


def _compile(compiler: str, storage: str, folder: Path, stem: str) -> Path:
    with tempfile.TemporaryDirectory(prefix=PARTIAL_PREFIX, dir=folder) as place:
        partial = Path(place) / f"{stem}.so"
        command = [compiler, *FLAGS, f"-DSTORAGE={storage}", str(SOURCE), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            reason = " ".join(done.stderr.split())[:500]
            raise RuntimeError(f"{Path(compiler).name} cannot compile {SOURCE.name}: {reason}")
        partial.chmod(0o700)  # whatever the umask
        sync(partial)
        return partial.replace(folder / _named(stem, partial.read_bytes()))
