"""A whole network with the kernels against plain PyTorch in float32: a training step in every way that it is run."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from d_emo import create_model
from d_emo.eval.benchmarks.gpu.graphs import captured
from d_emo.eval.benchmarks.gpu.results import Results, relative_error
from d_emo.eval.benchmarks.subjects import randomize
from d_emo.kernels import use_backend
from d_emo.models.compiling import compile_network

# Of the output and of BatchNorm's statistics; gradients add up the rounding of all blocks.
FLOAT32_LIMIT, BFLOAT16_LIMIT = 1e-4, 3e-2
FLOAT32_GRADIENT, BFLOAT16_GRADIENT = 2e-4, 0.25
Step = tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]


def run(results: Results) -> None:
    """Lines `network`."""
    checks = NetworkChecks(results)
    for name, work in {
        "float32": lambda: checks.compare(checks.network(), bfloat16=False),
        "bfloat16 autocast": lambda: checks.compare(checks.network()),
        "bfloat16, kernels or nothing": lambda: checks.compare(checks.network(), backend="native"),
        "plain PyTorch, bfloat16 (what rounding does)": lambda: checks.compare(checks.network(), backend="reference"),
        "checkpointed": lambda: checks.compare(checks.checkpointed()),
        "compiled blocks": lambda: checks.compare(checks.compiled()),
        "compiled blocks run the kernels": lambda: checks.kernels_in(checks.compiled()),
        "types under autocast": checks.types,
        "CUDA graph of a forward pass": checks.graph,
    }.items():
        if results.cuda or "graph" not in name:
            results.attempt("network", name, work)


class NetworkChecks:
    """Three blocks of a D-EMOv2 with random weights, on inputs that stay the same."""

    def __init__(self, results: Results):
        self.device, self.name = results.device, "D-EMOv2-N-4" if results.tiny else "D-EMOv2-S-2"
        self.side, self.blocks = (16, 1) if results.tiny else (32, 3)
        batch, generator = 8, torch.Generator(self.device).manual_seed(0)
        images = torch.randn(batch, 4, self.side, self.side, generator=generator, device=self.device)
        timesteps, labels = torch.full((batch,), 500, device=self.device), torch.arange(batch, device=self.device)
        self.inputs = (images, timesteps, labels)

    def network(self) -> Any:
        """The network, in training mode; the same weights every time."""
        torch.manual_seed(0)
        with self.device:
            model = create_model(self.name, num_layers=self.blocks, sample_size=self.side)
        randomize(model)
        return model.train()

    def checkpointed(self) -> Any:
        """With activations that are computed again."""
        model = self.network()
        model.enable_gradient_checkpointing()
        return model

    def compiled(self) -> Any:
        """With compiled blocks."""
        model = self.network()
        compile_network(model, "blocks")
        return model

    def step(self, model: Any, bfloat16: bool) -> Step:
        """Output, gradients and statistics of a training step."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            output = model(*self.inputs).sample.float()
        (output * torch.linspace(-1, 1, output.numel(), device=self.device).view_as(output)).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        statistics = {name: b.clone() for name, b in model.named_buffers() if b.is_floating_point()}
        return output.detach(), gradients, statistics

    def compare(self, model: Any, *, bfloat16: bool = True, backend: str | None = None) -> dict[str, Any]:
        """The errors of a step beside plain PyTorch's in float32."""
        with use_backend("reference"):
            wanted = self.step(self.network(), False)
        with use_backend(backend):
            found = self.step(model, bfloat16)
        each = {name: relative_error(found[1][name], gradient) for name, gradient in wanted[1].items()}
        worst = max(each, key=lambda name: each[name])
        output = relative_error(found[0], wanted[0])
        gradient = relative_error(*(torch.cat([step[1][name].flatten() for name in each]) for step in (found, wanted)))
        statistics = max(relative_error(found[2][name], value) for name, value in wanted[2].items())
        limit, largest = (BFLOAT16_LIMIT, BFLOAT16_GRADIENT) if bfloat16 else (FLOAT32_LIMIT, FLOAT32_GRADIENT)
        return {
            "output": f"{output:.1e}",
            "gradient": f"{gradient:.1e}",
            "worst_gradient": f"{each[worst]:.1e} {worst}",
            "statistics": f"{statistics:.1e}",
            "ok": output < limit and statistics < limit and gradient < largest,
        }

    def kernels_in(self, model: Any) -> dict[str, Any]:
        """Whether a training step calls the package's operators: plain PyTorch would be right, and slower."""
        self.step(model, True)  # compiles
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            self.step(model, True)
        names = sorted({event.key for event in profiled.key_averages() if event.key.startswith("d_emo::")})
        return {"ok": bool(names), "operators": names}

    def types(self) -> dict[str, Any]:
        """What types a block of a network under autocast sees and answers."""
        model, seen = self.network(), {}
        block: Any = model.blocks[0]

        def note(name: str) -> Callable[..., None]:
            return lambda module, inputs, output: seen.update(
                {f"{name} in": inputs[0].dtype, f"{name} out": output.dtype}
            )

        block.register_forward_hook(note("residual"))
        block.i2rmb.register_forward_hook(note("block"))
        with torch.autocast(self.device.type, torch.bfloat16):
            model(*self.inputs)
        return {name: str(dtype) for name, dtype in seen.items()}

    @torch.no_grad()
    def graph(self) -> dict[str, Any]:
        """A forward pass as a CUDA graph beside the same pass."""
        model = self.network().eval().to(torch.bfloat16)
        inputs = (self.inputs[0].bfloat16(), *self.inputs[1:])
        wanted = model(*inputs).sample.clone()
        graph, found = captured(lambda: model(*inputs).sample)
        graph.replay()
        torch.cuda.synchronize()
        error = relative_error(found, wanted)
        return {"ok": error < 1e-2, "error": f"{error:.1e}"}
