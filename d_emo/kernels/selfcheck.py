"""Whether the fast kernels compute the right thing on this machine: asked once a device, before they are used.

Compilers and GPUs differ. A kernel that fails here is left alone, and plain PyTorch runs in its place.
"""

import torch
import torch.nn.functional as F

TOLERANCE = 1e-3  # of the largest value; float32 sums in another order differ by 1e-6


def failure(device: str) -> str:
    """What is wrong with the kernels for "cpu" or "cuda", compared with plain PyTorch in float64; empty if nothing."""
    from . import attention, local

    generator = torch.Generator("cpu").manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cpu").to(device).requires_grad_()

    def compare(name: str, fast: torch.Tensor, exact: torch.Tensor, inputs: list, exact_inputs: list) -> str:
        grad = torch.ones_like(exact).cumsum(-1) / exact.shape[-1]
        pairs = [(fast, exact)]
        pairs += zip(
            torch.autograd.grad(fast, inputs, grad.to(fast.dtype)),
            torch.autograd.grad(exact, exact_inputs, grad),
            strict=True,
        )
        errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in pairs]
        # Written so that NaN fails.
        return "" if all(error <= TOLERANCE for error in errors) else f"{name} is off by {max(errors):.1e}"

    try:
        with torch.device(device), torch.inference_mode(False), torch.enable_grad():
            windows = attention.Windows(32, 2, 4, 4)
            inputs = [random(2, 8, 8, 2 * 32 + 48), random(112)]
            exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
            fast = attention._window_attention(inputs[0], inputs[1], *windows)
            wrong = compare("window attention", fast, attention.reference(exact[0], exact[1], windows), inputs, exact)
            if wrong:
                return wrong
            inputs = [random(2, 8, 8, 48), random(48, 1, 5, 5), random(48), random(48)]
            exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
            fast, _, _ = local._local_branch(
                *inputs, torch.zeros_like(inputs[2]), torch.ones_like(inputs[2]), True, 1e-5
            )
            # As functions: layers would draw their first weights from the caller's random numbers.
            calls = (
                lambda x: F.conv2d(x, exact[1], padding=2, groups=48),
                lambda x: F.batch_norm(x, None, None, exact[2], exact[3], training=True, eps=1e-5),
            )
            return compare("the local branch", fast, local.reference(exact[0], *calls), inputs, exact)
    except Exception as error:  # whatever a compiler or driver raises
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
