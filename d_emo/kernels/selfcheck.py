"""Whether the fast kernels compute the right thing on this machine: asked once a device, before they are used.

Compilers and GPUs differ. A kernel that fails here is left alone, and plain PyTorch runs in its place.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from .attention import Windows

# Of the largest value. Float32 sums in another order differ by 1e-6, bfloat16 results are rounded to 4e-3.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 2e-2}

Function = Callable[..., torch.Tensor]


def failure(device: str) -> str:
    """What is wrong with the kernels for "cpu" or "cuda", compared with plain PyTorch in float64; empty if nothing.

    A GPU's kernel for attention is another one at every size: see `attention_failure`.
    """
    return _first_failure(device, lambda: _checks(device))


def attention_failure(device: str, dtype: torch.dtype, channels: int, windows: "Windows") -> str:
    """What is wrong with window attention of this size: an error, or more registers and memory than there are."""
    return _first_failure(device, lambda: iter([_attention_check(dtype, channels, windows)]))


Check = tuple[str, Function, Function, torch.dtype, list[tuple[int, ...]]]  # name, fast, reference, type, input shapes


def _first_failure(device: str, checks: Callable[[], Iterator[Check]]) -> str:
    generator = torch.Generator("cpu").manual_seed(0)
    try:
        with (
            torch.device(device),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
        ):
            for name, fast, reference, dtype, shapes in checks():
                random = [torch.randn(*shape, generator=generator, device="cpu").to(device, dtype) for shape in shapes]
                inputs = [tensor.requires_grad_() for tensor in random]
                exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
                error = _error(fast(*inputs), reference(*exact), inputs, exact)
                if not error <= TOLERANCE[dtype]:  # written so that NaN fails
                    return f"{name} is off by {error:.1e}"
    except Exception as error:  # whatever a compiler or driver raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return ""


def _attention_check(dtype: torch.dtype, channels: int, windows: "Windows") -> Check:
    from . import attention

    return (
        "window attention",
        lambda qkv, bias: attention._window_attention(qkv, bias, *windows),
        lambda qkv, bias: attention.reference(qkv, bias, windows),
        dtype,
        [(2, 2 * windows.height, 2 * windows.width, channels), (channels,)],
    )


def _checks(device: str) -> Iterator[Check]:
    from . import attention, linear, local, modulation

    if device == "cpu":
        yield _attention_check(torch.float32, 2 * 32 + 48, attention.Windows(32, 2, 4, 4))

    def fast_local(x: torch.Tensor, weight: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        mean, variance = torch.zeros_like(gamma), torch.ones_like(gamma)
        return local._local_branch(x, weight, gamma, beta, mean, variance, True, 1e-5)[0]

    def exact_local(x: torch.Tensor, weight: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        # As functions: layers would draw their first weights from the caller's random numbers.
        return local.reference(
            x,
            lambda y: F.conv2d(y, weight, padding=2, groups=48),
            lambda y: F.batch_norm(y, None, None, gamma, beta, training=True, eps=1e-5),
        )

    yield "the local branch", fast_local, exact_local, torch.float32, [(2, 8, 8, 48), (48, 1, 5, 5), (48,), (48,)]
    if device == "cpu":
        rows, image = (2, 5, 9, 44), (2, 44)
        yield (
            "the modulated norm",
            lambda x, shift, scale, *affine: modulation._norm(x, shift, scale, *affine, 1e-5),
            lambda x, shift, scale, *affine: (
                F.layer_norm(x, (44,), *affine) * (1 + scale[:, None, None]) + shift[:, None, None]
            ),
            torch.float32,
            [rows, image, image, (44,), (44,)],
        )
        yield (
            "the gated sum",
            modulation._gated,
            lambda x, gate, branch: x + gate[:, None, None] * branch,
            torch.float32,
            [rows, image, rows],
        )
        for dtype in (torch.float32, torch.bfloat16):
            yield (
                f"the matrix product in {str(dtype).removeprefix('torch.')}",
                lambda x, weight: linear._product(x, weight, True, [True] * 3),
                F.linear,
                dtype,
                [(2, 73, 70), (90, 70)],
            )


def _error(
    fast: torch.Tensor, exact: torch.Tensor, inputs: list[torch.Tensor], exact_inputs: list[torch.Tensor]
) -> float:
    """The largest error of results and gradients, over the largest value of each; NaN if there is one."""
    grad = torch.ones_like(exact).cumsum(-1) / exact.shape[-1]
    grads = torch.autograd.grad(fast, inputs, grad.to(fast.dtype))
    exact_grads = torch.autograd.grad(exact, exact_inputs, grad.to(fast.dtype).double())
    pairs = zip((fast, *grads), (exact, *exact_grads), strict=True)
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()
