"""The block's two operators alone, at a model's sizes: the kernels, plain PyTorch, plain PyTorch compiled, and beside
them what DiT has in their place, cuDNN's depthwise convolution, and the products around them.

Times are milliseconds: forward without gradients, and what a backward pass adds. `floor` is the time of reading and
writing each tensor once at 3.35 TB/s, the data sheet's rate of an H100 (SXM).
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile

from d_emo.eval.benchmarks.gpu.results import Results
from d_emo.kernels import local_branch, reference, window_attention
from d_emo.kernels.reference import Windows

BYTES_PER_MS = 3.35e9
# name, C, heads, images, side of the grid
SIZES = (("XL b64", 1152, 16, 64, 16), ("S b256", 384, 6, 256, 16))
TINY = (("N b2", 128, 2, 2, 8),)
WINDOW = (8, 8)


def run(results: Results) -> None:
    """Lines `micro`."""
    for name, dim, heads, batch, side in TINY if results.tiny else SIZES:
        measured = Operators(results, name, dim, heads, batch, side)
        measured.attention()
        measured.local()
        measured.elsewhere()
        measured.products()


class Operators:
    """The operators of one size; E = 4 C."""

    def __init__(self, results: Results, name: str, dim: int, heads: int, batch: int, side: int):
        self.results, self.name, self.dim, self.heads, self.batch, self.side = results, name, dim, heads, batch, side
        self.rows, self.values = batch * side * side, 4 * dim
        self.hidden = self.draw(batch, side, side, self.values).requires_grad_()
        self.conv = nn.Conv2d(self.values, self.values, 5, padding=2, groups=self.values, bias=False)
        self.norm = nn.BatchNorm2d(self.values, eps=1e-6)
        nn.ModuleList([self.conv, self.norm]).to(results.device)

    def draw(self, *shape: int) -> torch.Tensor:
        """Random numbers in bfloat16."""
        return torch.randn(*shape, device=self.results.device, dtype=torch.bfloat16)

    def time(self, name: str, work: Callable[..., Any], inputs: Sequence[torch.Tensor], floor: Sequence[float]) -> None:
        """Measure one way of doing something.

        Args:
            name: of the line.
            work: of the inputs.
            inputs: those that have gradients.
            floor: bytes that have to be moved, forward and backward.
        """

        def measure() -> dict[str, Any]:
            grad = torch.randn_like(work(*inputs))

            def forward() -> None:
                with torch.no_grad():
                    work(*inputs)

            alone = self.results.seconds_of(forward)
            both = self.results.seconds_of(lambda: torch.autograd.grad(work(*inputs), inputs, grad))
            found = {"forward_ms": 1e3 * alone, "backward_ms": 1e3 * (both - alone)}
            return found | {"floor_ms_f_b": [round(count / BYTES_PER_MS, 3) for count in floor]}

        self.results.attempt("micro", f"{self.name} {name}", measure)

    def attention(self) -> None:
        """Spanning window attention with GELU on the values."""
        windows = Windows.of("spanning", self.dim, self.heads, WINDOW, (self.side, self.side))
        qkv = self.draw(self.batch, self.side, self.side, 2 * self.dim + self.values).requires_grad_()
        read, written = 2 * self.rows * (2 * self.dim + self.values), 2 * self.rows * self.values
        floor = (read + written, 2 * read + written)

        def plain(given: torch.Tensor) -> torch.Tensor:
            return reference.window_attention(given, windows)

        self.time(
            "attention kernels",
            lambda given: window_attention(given, "spanning", self.dim, self.heads, WINDOW),
            [qkv],
            floor,
        )
        self.time("attention plain", plain, [qkv], floor)
        if self.results.cuda:
            self.time("attention plain compiled", torch.compile(plain, dynamic=False), [qkv], floor)

    def local(self) -> None:
        """x + SiLU(BatchNorm(depthwise 5 x 5 convolution of x)) with a batch's statistics."""
        learned = [self.hidden, self.conv.weight, self.norm.weight, self.norm.bias]
        once = 2 * self.rows * self.values
        floor = (3 * once, 5 * once)  # x twice and the result; x and its gradient's source twice, and the gradient

        def plain(x: torch.Tensor, weight: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
            y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), padding=2, groups=self.values)
            y = F.batch_norm(y, None, None, gamma, beta, training=True, eps=1e-6)
            return x + F.silu(y).permute(0, 2, 3, 1)

        def kernels(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return local_branch(x, self.conv, self.norm)

        self.time("local kernels", kernels, learned, floor)
        self.time("local plain", plain, learned, floor)
        if self.results.cuda:
            self.time("local plain compiled", torch.compile(plain, dynamic=False), learned, floor)
            self.results.attempt("micro", f"{self.name} local passes, ms", lambda: self.passes(kernels, learned))

    def passes(self, work: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
        """The milliseconds of each kernel of a forward and backward pass."""

        def once() -> None:
            out = work(*inputs)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
            self.results.synchronize()

        once()
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            once()
        events = [e for e in profiled.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
        return {event.key[:60]: round(event.self_device_time_total / 1e3, 3) for event in events}

    def elsewhere(self) -> None:
        """cuDNN's depthwise convolution by itself, and DiT's attention."""

        def convolve(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            y = F.conv2d(x.permute(0, 3, 1, 2), weight.to(x.dtype), padding=2, groups=self.values)
            return y.permute(0, 2, 3, 1)

        once = 2 * self.rows * self.values
        name = "cuDNN depthwise alone" if self.results.cuda else "depthwise alone"
        self.time(name, convolve, [self.hidden, self.conv.weight], (2 * once, 3 * once))
        shape = (self.batch, self.heads, self.side * self.side, self.dim // self.heads)
        query, key, value = (self.draw(*shape).requires_grad_() for _ in range(3))
        once = 2 * self.rows * self.dim
        attend = F.scaled_dot_product_attention
        self.time("DiT attention (SDPA)", attend, [query, key, value], (4 * once, 8 * once))

    def products(self) -> None:
        """The products around the operators, and DiT's first of its MLP."""
        for name, wide, narrow in (
            ("to_qkv", self.dim, 6 * self.dim),
            ("proj_out", self.values, self.dim),
            ("DiT mlp_in", self.dim, self.values),
        ):
            rows, weight = self.draw(self.rows, wide), self.draw(narrow, wide)

            def measure(rows: torch.Tensor = rows, weight: torch.Tensor = weight) -> dict[str, Any]:
                seconds = self.results.seconds_of(lambda: F.linear(rows, weight))
                return {"ms": 1e3 * seconds, "tflops": 2 * rows.numel() * len(weight) / seconds / 1e12}

            self.results.attempt("micro", f"{self.name} product {name}", measure)
