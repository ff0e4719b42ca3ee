"""What a training step holds in a process's memory, by parts, before anything of that size is made."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from d_emo.common.gpus import Fleet
from d_emo.common.messages import first_line, readable_size
from d_emo.common.processes import asked_for_fsdp, is_sharded
from d_emo.kernels.dispatch import backend_report, planned_on
from d_emo.train.engine.rehearsal import cuda_autocast, held_at_most, shapes_only, size_of


@dataclass(frozen=True)
class Launch:
    """What a run computes on.

    Attributes:
        device: of a process.
        processes: of the run.
        sharded: whether they share one copy of the model.
        autocast: whether products are in bfloat16; weights are float32 either way.
        fleet: GPUs that are not here, for which a run is planned; its tensors without content lie on the processor.
    """

    device: torch.device
    processes: int = 1
    sharded: bool = False
    autocast: bool = False
    fleet: Fleet | None = None

    @classmethod
    def of(cls, accelerator: Accelerator, fleet: Fleet | None = None) -> "Launch":
        """That of a run, or of one on GPUs that need not be here."""
        autocast = accelerator.mixed_precision == "bf16"
        if fleet is not None:
            return cls(torch.device("cpu"), fleet.count, asked_for_fsdp() and fleet.count > 1, autocast, fleet)
        return cls(accelerator.device, accelerator.num_processes, is_sharded(accelerator), autocast)

    @property
    def runs_on(self) -> torch.device:
        """The device that the run will be on."""
        return self.device if self.fleet is None else torch.device("cuda")

    def kernels(self) -> str:
        """One line: which kernels the run uses, and why."""
        with planned_on("cuda") if self.fleet else contextlib.nullcontext():
            return backend_report(self.runs_on)

    @contextlib.contextmanager
    def rehearsed(self, *modules: torch.nn.Module) -> Iterator[None]:
        """Within it, tensors and the modules' own have no content, and operators are those of the run.

        Raises:
            RuntimeError: see `shapes_only`.
        """
        with shapes_only(self.device, *modules):
            if self.fleet is None:
                yield
                return
            with planned_on("cuda"), cuda_autocast():
                yield

    def autocasting(self) -> torch.autocast:
        """Within it, products are in the precision of the run."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def passes(self, forward: Callable[[], torch.Tensor]) -> None:
        """The forward pass and, from its result on, the backward pass, in the precision of the run."""
        with self.autocasting():
            result = forward()
        result.float().square().mean().backward()


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of a process in a training step. Their sum is an upper bound: gradients come as activations go.

    Attributes:
        weights: of the model, with its buffers.
        gradients: of what is trained; under DDP twice, since its buckets are copies.
        optimizer: its state.
        average: the averaged copy, and the plain one that it is published as where that is another.
        activations: the most that forward and backward pass of a micro batch hold beside all this.
        encoder: the autoencoder's weights.
        encoding: the most that it holds when it encodes a micro batch, or a teacher when it looks at one, which is
            before the model's forward pass.
        teacher: the weights of one.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    encoder: int = 0
    encoding: int = 0
    teacher: int = 0

    @property
    def fixed(self) -> int:
        """What is held however many images a micro batch has."""
        return self.weights + self.gradients + self.optimizer + self.average + self.encoder + self.teacher

    @property
    def total(self) -> int:
        """All that is held at once."""
        return self.fixed + max(self.activations, self.encoding)

    def describe(self, optimizer: str, activations: str) -> str:
        """For people.

        Args:
            optimizer: its name.
            activations: what is to be said of them, in brackets.
        """
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            optimizer: self.optimizer,
            "average": self.average,
            "autoencoder": self.encoder,
            "teacher": self.teacher,
            "activations": self.activations,
        }
        listed = ", ".join(f"{name} {readable_size(size)}" for name, size in parts.items() if size)
        what = "encoding" if self.encoder or not self.teacher else "the teacher"
        before = f", before them {readable_size(self.encoding)} for {what}" if self.encoding else ""
        return f"about {readable_size(self.total)} of tensors a process: {listed} ({activations}){before}"


def training_memory(
    model: torch.nn.Module,
    launch: Launch,
    make_optimizer: Callable[[torch.nn.Module], torch.optim.Optimizer] | None,
    forward: Callable[[], torch.Tensor],
) -> TrainingMemory:
    """Count what a step of a model holds, without a plain copy and an autoencoder.

    The step is gone through on tensors without content (`rehearsal`), of the kernels that the run would use. Not
    counted are what PyTorch takes beside tensors (a GPU's context, libraries' workspaces, an allocator's gaps), what
    kernels use inside of themselves, `torch.compile`, and the gathered blocks of a sharded model.

    Args:
        model: as it is trained, in the mode that it is trained in; in any place, on the meta device too.
        launch: what the run computes on.
        make_optimizer: gives the optimizer of the model; None for one that does not say what it will hold.
        forward: calls `model` on a micro batch that it makes; its result is what a loss is taken of.

    Raises:
        RuntimeError: the model's forward pass or the optimizer's step depends on values.
    """
    with launch.rehearsed(model):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)  # as of a micro batch before, or as soon as this one's end
        state = [] if make_optimizer is None else _state_of(make_optimizer(model))
        weights, gradients = size_of([*model.parameters(), *model.buffers()]), size_of(trained)
        share = launch.processes if launch.sharded else 1
        buckets = launch.processes > 1 and not launch.sharded
        return TrainingMemory(
            weights=weights // share,
            gradients=gradients * (2 if buckets else 1) // share,
            optimizer=size_of(state) // share,
            average=weights // share,
            activations=held_at_most(lambda: launch.passes(forward)),
        )


def _state_of(optimizer: torch.optim.Optimizer) -> list[object]:
    optimizer.step()
    return [*optimizer.state.values()]


def told(describe: Callable[[], str]) -> str:
    """A description of memory, or why there is none: what a run would hold is no reason not to run."""
    try:
        return describe()
    except Exception as error:  # whatever foreign networks raise on tensors without content
        return f"not counted ({first_line(error)})"
