"""The C++ kernels' libraries: compiled for this machine on first use and kept in a cache folder, one for each type.

The cache is `$D_EMO_CACHE`, else `$XDG_CACHE_HOME/d_emo`, else `~/.cache/d_emo`. A library's name holds a hash of the
sources, the compiler and the processor, so several machines may share a home directory. Where there is no C++ compiler
(or no Linux), plain PyTorch runs instead and a warning says so, once.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers.utils import logging

from ...common.files import cache_folder, written_whole

logger = logging.get_logger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
# No -ffast-math: vectors.h rounds by adding a large number.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")
STORAGE = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float64: "double"}


@functools.cache
def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for tensors stored in a type."""
    if sys.platform != "linux":
        raise RuntimeError(f"the CPU kernels are built on Linux only, not on {sys.platform}")
    compiler = _compiler()
    path = cache_folder() / f"{STORAGE[dtype]}-{_digest(compiler)}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        logger.info(f"Compiling the CPU kernels for {dtype} into {path.parent} (once for this machine, seconds) ...")
        _compile(compiler, STORAGE[dtype], path)
    return ctypes.CDLL(str(path))


@functools.cache
def obstacle(dtype: torch.dtype = torch.float32) -> str:
    """Why the kernels cannot be used; empty if they can. Compiles them if that has not been done yet."""
    try:
        library(dtype)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(f"Plain PyTorch runs in place of the CPU kernels, and slower: {error}")
        return str(error)
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


def _compile(compiler: str, storage: str, target: Path) -> None:
    with written_whole(target) as partial:
        command = [compiler, *FLAGS, f"-DSTORAGE={storage}", str(SOURCE), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"{Path(compiler).name} cannot compile {SOURCE.name}: {done.stderr.strip()[:500]}")
