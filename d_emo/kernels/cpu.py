"""The C++ kernels: compiled for this machine on first use, kept in a cache folder, called through ctypes.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ..common.files import cache_folder, written_by_one_of_many

logger = logging.get_logger(__name__)

LIBRARIES = ("attention", "local", "linear", "fused", "modulation")
HEADERS = ("vectors.h", "products.h", "attention.h", "linear.h", "local.h", "fused.h", "modulation.h")
SOURCES = (*HEADERS, *(f"{name}.cpp" for name in LIBRARIES))
# No -ffast-math: vectors.h rounds by adding a large number.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared")

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


class AttentionShape(ctypes.Structure):
    """The C++ struct of the same name."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("batch", "height", "width", "heads", "head_dim", "value_dim")),
        *((name, ctypes.c_int32) for name in ("window_height", "window_width", "neighborhood", "remote")),
        ("weight", ctypes.c_double),
    ]


class LocalShape(ctypes.Structure):
    """The C++ struct of the same name."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("batch", "height", "width", "channels", "kernel", "batch_statistics")),
        ("eps", ctypes.c_double),
    ]


class LinearShape(ctypes.Structure):
    """The C++ struct of the same name."""

    _fields_ = [("rows", ctypes.c_int64), *((name, ctypes.c_int32) for name in ("inputs", "outputs", "by_column"))]


class ModulationShape(ctypes.Structure):
    """The C++ struct of the same name."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("batch", "tokens", "channels", "unit_rows")),
        ("eps", ctypes.c_double),
    ]


class BlockShape(ctypes.Structure):
    """The C++ struct of the same name."""

    _fields_ = [("outputs", ctypes.c_int32)]


def call(library: str, function: str, dtype: torch.dtype, shape: ctypes.Structure, *arguments: Any) -> None:
    """Call `d_emo_<function>` of a library: storage type, shape, then contiguous tensors (or None) and other shapes."""
    pointers = [
        ctypes.byref(argument)
        if isinstance(argument, ctypes.Structure)
        else ctypes.c_void_p(None if argument is None else argument.data_ptr())
        for argument in arguments
    ]
    kernel = getattr(_libraries()[library], f"d_emo_{function}")
    if kernel(ctypes.byref(shape), DTYPE_CODES[dtype], torch.get_num_threads(), *pointers):
        raise RuntimeError(f"d_emo_{function} takes no {dtype} tensors of this shape; use the backend 'reference'.")


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The type that the kernels compute in, and take parameters in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def obstacle() -> str:
    """Why the kernels cannot be used; empty if they can. Compiles them if that has not been done yet."""
    try:
        _libraries()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        logger.warning(f"Plain PyTorch runs in place of the CPU kernels, and slower: {error}")
        return str(error)
    return ""


@functools.cache
def _libraries() -> dict[str, Any]:
    if sys.platform != "linux":
        raise RuntimeError(f"the CPU kernels are built on Linux only, not on {sys.platform}")
    compiler = _compiler()
    paths = {name: cached_path(name, ".so") for name in LIBRARIES}
    missing = [name for name, path in paths.items() if not path.exists()]
    if missing:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        logger.info(f"Compiling the CPU kernels into {folder} (once for this machine, about ten seconds) ...")
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda name: _compile(compiler, name, paths[name]), missing))
    return {name: ctypes.CDLL(str(path)) for name, path in paths.items()}


def cached_path(name: str, suffix: str) -> Path:
    """Where something is kept that holds for these sources, this compiler and this processor."""
    return cache_folder() / f"{name}-{_digest(_compiler())}{suffix}"


def _compiler() -> str:
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "c++", "clang++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise RuntimeError(f"no C++ compiler was found ({', '.join(names)}); install g++ or set CXX")


@functools.cache
def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    processor, cpuinfo = [platform.machine()], Path("/proc/cpuinfo")
    if cpuinfo.exists():  # of the first processor: model and features, which -march=native reads
        lines = cpuinfo.read_text(encoding="utf-8").split("\n\n", 1)[0].splitlines()
        processor += [line for line in lines if line.split(":")[0].strip() in ("model name", "flags", "Features")]
    content = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in SOURCES]
    return hashlib.sha256("\0".join([version, *FLAGS, *processor, *content]).encode()).hexdigest()[:16]


def _compile(compiler: str, name: str, target: Path) -> None:
    source = Path(__file__).parent / f"{name}.cpp"
    with written_by_one_of_many(target) as partial:
        command = [compiler, *FLAGS, str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"{Path(compiler).name} cannot compile {source.name}: {done.stderr.strip()[:500]}")
