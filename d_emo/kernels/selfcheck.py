"""Whether a backend computes the right thing on this machine: asked before it is used.

Compilers and GPUs differ. What fails here is left alone, and plain PyTorch runs in its place.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F

from d_emo.common.messages import kind_and_line

from . import reference
from .attention import attention_operator
from .fused import infer_operator
from .linear import linear_operator
from .local import local_operator
from .reference import Windows

# Of the largest value. Float32 sums in another order differ by 1e-6, bfloat16 results are rounded to 4e-3.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}

Function = Callable[..., torch.Tensor]
# What it is called, a backend's function, the reference, the type, the inputs' shapes.
Check = tuple[str, Function, Function, torch.dtype, list[tuple[int, ...]]]


def first_failure(device: str, checks: Sequence[Check]) -> str:
    """What is wrong with results and gradients of a backend, beside plain PyTorch in float64; empty if nothing.

    In a thread of its own, where no mode of the caller's looks on: first used within activation checkpointing, a
    counter of operations or a trace, the check would otherwise be recomputed, counted or traced with the model.
    """
    index = torch.cuda.current_device() if device == "cuda" else None
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_first_failure, device, index, checks).result()


def _first_failure(device: str, index: int | None, checks: Sequence[Check]) -> str:
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        if index is not None:
            torch.cuda.set_device(index)  # of this thread
        with (
            torch.device(device),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
        ):
            for name, fast, exact, dtype, shapes in checks:
                random = [torch.randn(*shape, generator=generator, device="cpu").to(device, dtype) for shape in shapes]
                inputs = [tensor.requires_grad_() for tensor in random]
                exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
                error = _error(fast(*inputs), exact(*exact_inputs), inputs, exact_inputs)
                if not error <= TOLERANCE[dtype]:  # written so that NaN fails
                    return f"{name} is off by {error:.1e}"
    except Exception as error:  # whatever a compiler or driver raises
        return kind_and_line(error)
    return ""


def _error(
    fast: torch.Tensor, exact: torch.Tensor, inputs: list[torch.Tensor], exact_inputs: list[torch.Tensor]
) -> float:
    """The largest error of results and gradients, over the largest value of each; NaN if there is one."""
    pairs = [(fast, exact)]
    if fast.requires_grad:
        grad = (torch.ones_like(exact).cumsum(-1) / exact.shape[-1]).to(fast.dtype)
        grads = torch.autograd.grad(fast, inputs, grad)
        pairs += zip(grads, torch.autograd.grad(exact, exact_inputs, grad.double()), strict=True)
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()


def attention_check(dtype: torch.dtype, shape: tuple[int, ...], windows: Windows) -> Check:
    """Window attention on qkv of a shape (B, H, W, 2C + E)."""
    return (
        "window attention",
        lambda qkv: attention_operator(qkv, windows),
        lambda qkv: reference.window_attention(qkv, windows),
        dtype,
        [shape],
    )


def local_check(dtype: torch.dtype, shape: tuple[int, ...], side: int) -> Check:
    """The local branch on a shape (B, H, W, E), with a batch's own statistics and a convolution of a side."""
    channels = shape[-1]
    eps = 1.0  # with a small one BatchNorm cancels a convolution of side 1, and its gradient is nothing but rounding

    def fast(x: torch.Tensor, weight: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        return local_operator(x, weight, gamma, beta, torch.zeros_like(gamma), torch.ones_like(gamma), True, eps)[0]

    def exact(x: torch.Tensor, weight: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        # As functions: layers would draw their first weights from the caller's random numbers.
        return reference.local_branch(
            x,
            lambda y: F.conv2d(y, weight, padding=side // 2, groups=channels),
            lambda y: F.batch_norm(y, None, None, gamma, beta, training=True, eps=eps),
        )

    return "the local branch", fast, exact, dtype, [shape, (channels, 1, side, side), (channels,), (channels,)]


def linear_check(dtype: torch.dtype) -> Check:
    """Sizes that fill no whole vectors."""
    return "the linear layer", linear_operator, F.linear, dtype, [(2, 73, 70), (90, 70), (90,)]


def block_check(dtype: torch.dtype) -> Check:
    """The block in inference; its expansion is small, or every softmax would be a hard choice."""
    windows = Windows(32, 2, 4, 4)

    @torch.no_grad()
    def fast(x: torch.Tensor, expansion: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        bias, projection, taps, summand = rest
        return infer_operator(x, expansion / 16, bias, projection, windows, taps, summand)

    @torch.no_grad()
    def exact(x: torch.Tensor, expansion: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        bias, projection, taps, summand = rest
        attended = reference.window_attention(F.linear(x, expansion / 16, bias), windows)
        mixed = reference.local_branch(
            attended,
            lambda y: F.conv2d(y, taps.t().reshape(48, 1, 3, 3), padding=1, groups=48),
            lambda y: y + summand[:, None, None],
        )
        return F.linear(mixed, projection)

    shapes: list[tuple[int, ...]] = [(2, 8, 8, 32), (112, 32), (112,), (32, 48), (9, 48), (48,)]
    return "the block in inference", fast, exact, dtype, shapes
