"""What the machine has, and two ceilings: the rates of copies and of a matrix product."""

import importlib.metadata
import platform
import shutil
import time

import torch

from d_emo.common.processes import device_name
from d_emo.eval.benchmarks.gpu.results import Results
from d_emo.kernels import backend_report

PACKAGES = (
    *("triton", "diffusers", "transformers", "accelerate", "datasets", "torchvision", "timm", "peft", "numpy"),
    *("pyarrow", "setuptools", "torch-fidelity", "tensorboard", "importlib_metadata"),
)


def run(results: Results) -> None:
    """One line, `facts`."""
    found: dict[str, object] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "compiler": shutil.which("g++") or shutil.which("cc"),
        "gpu": device_name(results.device),
    }
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if results.cuda:
        card = torch.cuda.get_device_properties(0)
        found |= {"sms": card.multi_processor_count, "memory_gib": card.total_memory / 2**30}
        found |= {"cudnn": torch.backends.cudnn.version(), "tf32": torch.backends.cuda.matmul.allow_tf32}
    found["copy_tb_s"] = copy_rate(results, 2**20 if results.tiny else 2**30) / 1e12
    found["matmul_tflops"] = product_rate(results, 256 if results.tiny else 8192) / 1e12
    began = time.monotonic()
    found["kernels"] = backend_report(results.device)  # makes the kernels' check before first use
    found["first_check_s"] = time.monotonic() - began
    results.add("facts", **found)


def copy_rate(results: Results, values: int) -> float:
    """Bytes read and written a second in a copy of so many bfloat16 values."""
    source = torch.randn(values, device=results.device).bfloat16()
    target = torch.empty_like(source)
    return 2 * source.nbytes / results.seconds_of(lambda: target.copy_(source))


def product_rate(results: Results, side: int) -> float:
    """FLOP/s of a product of square bfloat16 matrices."""
    left, right = (torch.randn(side, side, device=results.device).bfloat16() for _ in range(2))
    return 2 * side**3 / results.seconds_of(lambda: left @ right)
