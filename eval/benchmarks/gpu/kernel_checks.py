"""The two operators at every size and type against plain PyTorch in float64: results and gradients.

Memory that a kernel leaves unwritten is NaN, tensors that are not contiguous are tried, and everything is run twice:
the second result has to be the first, bit for bit.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from d_emo.eval.benchmarks.gpu.results import Results, relative_error
from d_emo.kernels import local_branch, reference, use_backend, window_attention
from d_emo.kernels.reference import Windows

# Norm of the error over the norm of what was expected.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
EPS = 1e-5


@dataclass(frozen=True)
class Attention:
    """A case: C, heads, E, the window's sides, the grid, images."""

    dim: int
    heads: int
    values: int
    window: tuple[int, int]
    grid: tuple[int, int]
    batch: int = 3
    kind: str = "spanning"
    strided: bool = False


SIZES = {
    "N-4, digits": Attention(128, 2, 512, (4, 4), (4, 4)),
    "N-4": Attention(128, 2, 512, (8, 8), (8, 8)),
    "Ti-2": Attention(192, 3, 768, (8, 8), (16, 16)),
    "S-2": Attention(384, 6, 1536, (8, 8), (16, 16)),
    "B-2": Attention(768, 12, 3072, (8, 8), (16, 16)),
    "L-2": Attention(1024, 16, 4096, (8, 8), (16, 16)),
    "XL-2": Attention(1152, 16, 4608, (8, 8), (16, 16)),
    "XL-2, 512 pixels": Attention(1152, 16, 4608, (8, 8), (32, 32)),
    "EMOv2-1M": Attention(80, 4, 240, (7, 7), (14, 14)),
    "EMOv2-5M, stage 4": Attention(288, 9, 1152, (7, 7), (7, 7)),
    "a narrow grid": Attention(128, 2, 512, (1, 8), (1, 16)),
}
KINDS = {
    "neighborhood": Attention(128, 2, 512, (8, 8), (16, 16), kind="neighborhood"),
    "remote": Attention(128, 2, 512, (8, 8), (16, 16), kind="remote"),
    "strided": Attention(128, 2, 512, (4, 4), (8, 8), strided=True),
    "S-2, batch 200": Attention(384, 6, 1536, (8, 8), (16, 16), 200),
}


@dataclass(frozen=True)
class Local:
    """A case: E, the kernel's side, the grid, images."""

    channels: int
    kernel: int = 5
    grid: tuple[int, int] = (16, 16)
    batch: int = 6
    batch_statistics: bool = True
    strided: bool = False

    @property
    def gradient_vanishes(self) -> bool:
        """Whether the kernel only scales what BatchNorm scales back: its gradient is zero, but for rounding and eps."""
        return self.batch_statistics and (self.kernel == 1 or self.grid == (1, 1))


def run(results: Results) -> None:
    """Lines `attention` and `local`, with the errors of result and gradients."""
    half = (torch.bfloat16, torch.float16) if results.cuda else (torch.bfloat16,)
    sizes = dict(itertools.islice(SIZES.items(), 2 if results.tiny else None))
    cases = [(f"{name}, {_short(dtype)}", case, dtype) for name, case in sizes.items() for dtype in half]
    kinds = {} if results.tiny else KINDS
    cases += [(name, case, torch.bfloat16) for name, case in kinds.items()]
    for name, attention, dtype in cases:
        results.attempt("attention", name, functools.partial(check_attention, attention, dtype, results.device))
    for name, local, dtype in _local_cases(results, half):
        results.attempt("local", name, functools.partial(check_local, local, dtype, results.device))


def _local_cases(results: Results, half: Sequence[torch.dtype]) -> Iterator[tuple[str, Local, torch.dtype]]:
    sizes = [(512, dtype, 5) for dtype in (*half, torch.float32)]
    if not results.tiny:
        sizes += [(channels, torch.bfloat16, 5) for channels in (140, 1536, 4608)] + [(4608, torch.float32, 5)]
        sizes += [(768, torch.bfloat16, kernel) for kernel in (3, 7)]
    sizes += [(64 if results.tiny else 768, torch.bfloat16, 1)]
    for (channels, dtype, kernel), own in itertools.product(sizes, (True, False)):
        statistics = "batch" if own else "given"
        name = f"{channels} channels, {_short(dtype)}, kernel {kernel}, {statistics} statistics"
        yield name, Local(channels, kernel, batch_statistics=own), dtype
    for grid, batch in (((1, 4), 1), ((4, 1), 1), ((1, 1), 4), ((3, 6), 2), ((7, 7), 5)):
        yield f"grid {grid}, batch {batch}", Local(140, grid=grid, batch=batch), torch.bfloat16
    yield "strided", Local(128, grid=(8, 8), batch=4, strided=True), torch.bfloat16
    many = 70 if results.tiny else 70_000
    yield f"batch {many} (a GPU's grid has at most 65535)", Local(8, grid=(2, 2), batch=many), torch.bfloat16
    if results.cuda and not results.tiny:
        yield "S-2, batch 256", Local(1536, batch=256), torch.bfloat16


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_attention(case: Attention, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The errors of result and gradient, and whether a second run gives the same."""
    draw = _draws(device)
    channels = 2 * case.dim + case.values
    qkv = draw(case.batch, *case.grid, channels, dtype=dtype)
    if case.strided:
        qkv = draw(case.batch, case.grid[1], case.grid[0], channels, dtype=dtype).transpose(1, 2)
    grad = draw(case.batch, *case.grid, case.values, dtype=dtype)
    exact = qkv.double().requires_grad_()
    expected = reference.window_attention(exact, Windows.of(case.kind, case.dim, case.heads, case.window, case.grid))
    wanted = [expected, *torch.autograd.grad(expected, [exact], grad.double())]

    def once() -> list[torch.Tensor]:
        given = qkv.detach().requires_grad_()
        out = window_attention(given, case.kind, case.dim, case.heads, case.window)
        return [out, *torch.autograd.grad(out, [given], grad)]

    return _verdict(once, wanted, [None] * len(wanted), dtype)


def check_local(case: Local, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The errors of result and gradients (input, kernel, scale, shift), and whether a second run gives the same."""
    draw = _draws(device)
    shape = (case.batch, *case.grid, case.channels)
    hidden = draw(*shape, dtype=dtype)
    if case.strided:
        hidden = draw(case.batch, case.channels, *case.grid, dtype=dtype).permute(0, 2, 3, 1)
    grad = draw(*shape, dtype=dtype)
    kernel = draw(case.channels, 1, case.kernel, case.kernel) / case.kernel
    gamma, beta, mean = (draw(case.channels) for _ in range(3))
    variance = draw(case.channels).square() + 0.1
    exact = [tensor.double().requires_grad_() for tensor in (hidden, kernel, gamma, beta)]

    def expected_with(own: bool, mean: torch.Tensor, variance: torch.Tensor) -> list[torch.Tensor]:
        result = reference.local_branch(
            exact[0],
            lambda y: F.conv2d(y, exact[1], padding=case.kernel // 2, groups=case.channels),
            lambda y: F.batch_norm(y, mean, variance, exact[2], exact[3], training=own, momentum=0.0, eps=EPS),
        )
        return [result, *torch.autograd.grad(result, exact, grad.double())]

    wanted = expected_with(case.batch_statistics, mean.double(), variance.double())
    scales: list[torch.Tensor | None] = [None] * len(wanted)
    if case.gradient_vanishes:
        # What cancels: the gradient that the kernel has while the same statistics are held fixed.
        with torch.no_grad():
            convolved = F.conv2d(exact[0].permute(0, 3, 1, 2), exact[1], padding=case.kernel // 2, groups=case.channels)
            held = convolved.mean((0, 2, 3)), convolved.var((0, 2, 3), correction=0)
        scales[2] = expected_with(False, *held)[2]

    def once() -> list[torch.Tensor]:
        conv, norm = _layers(case, kernel, gamma, beta, mean, variance)
        given = [hidden.detach().requires_grad_(), conv.weight, norm.weight, norm.bias]
        out = local_branch(given[0], conv, norm)
        return [out, *torch.autograd.grad(out, given, grad)]

    return _verdict(once, wanted, scales, dtype)


def _layers(case: Local, kernel: torch.Tensor, *numbers: torch.Tensor) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """The layers that hold these numbers: scale, shift, mean, variance."""
    conv = nn.Conv2d(
        case.channels, case.channels, case.kernel, padding=case.kernel // 2, groups=case.channels, bias=False
    )
    norm = nn.BatchNorm2d(case.channels, eps=EPS)
    conv, norm = conv.to(kernel.device), norm.to(kernel.device).train(case.batch_statistics)
    with torch.no_grad():
        conv.weight.copy_(kernel)
        for target, source in zip((norm.weight, norm.bias, norm.running_mean, norm.running_var), numbers, strict=True):
            assert target is not None
            target.copy_(source)
    return conv, norm


def _verdict(
    once: Any, wanted: Sequence[torch.Tensor], scales: Sequence[torch.Tensor | None], dtype: torch.dtype
) -> dict[str, Any]:
    with use_backend("native"), unwritten_is_nan():  # "native" raises where plain PyTorch would run in its place
        found, again = once(), once()
    errors = [relative_error(*each) for each in zip(found, wanted, scales, strict=True)]
    same = all(torch.equal(first, second) for first, second in zip(found, again, strict=True))
    right = all(error < LIMITS[dtype] for error in errors)  # NaN is not
    return {"errors": [f"{error:.1e}" for error in errors], "ok": right and same, "same_twice": same}


def _draws(device: torch.device) -> Any:
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    return draw


@contextlib.contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """Within it, new memory is NaN until something is written into it."""
    switch: Any = torch.utils.deterministic  # a module whose attribute is a property
    before = switch.fill_uninitialized_memory
    deterministic, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn)
        switch.fill_uninitialized_memory = before
