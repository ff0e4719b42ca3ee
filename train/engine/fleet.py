"""What a run takes of GPUs that are not here: exchange of gradients, time of a step, what fits."""

import csv
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from d_emo.common.gpus import Fleet
from d_emo.common.messages import readable_size
from d_emo.train.engine.memory import TrainingMemory

# Of a GPU's memory, what tensors cannot have: context, workspaces, buffers of NCCL, an allocator's gaps. A guess.
RESERVED = 0.08
# Of a network's passes, the backward one, under which gradients are exchanged.
BACKWARD_SHARE = 2 / 3
# Bytes of a gradient, and of a weight that FSDP2 gathers.
VALUE_BYTES = 4
# Counts of memory at most, besides the first, to find the largest micro batch.
COUNTS = 3
# Training steps that were measured, on one GPU each.
MEASURED = Path(__file__).with_name("measured_steps.csv")


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step.

    Attributes:
        computing: of a GPU.
        exchange: that gradients, and with FSDP2 weights, take on their way between GPUs.
        hidden: of that, at most so much passes while the GPU computes.
    """

    computing: float
    exchange: float
    hidden: float

    @property
    def waiting(self) -> float:
        """Seconds that the GPU waits for the others."""
        return max(0.0, self.exchange - self.hidden)

    @property
    def total(self) -> float:
        """All of it."""
        return self.computing + self.waiting


def step_time(
    fleet: Fleet, computing: float, passes: float, trained: int, accumulation: int, sharded: bool
) -> StepTime:
    """A step with the exchange of its gradients by rings, which move (N - 1) / N of all values for a sum and a copy.

    DDP sums and copies the gradients of the last micro batch, during its backward pass. FSDP2 gathers the weights for
    both passes of each micro batch and sums the gradients of the last one into shares, while other blocks are computed.

    Args:
        fleet: the GPUs.
        computing: seconds of a GPU's own work in a step.
        passes: of them, forward and backward passes.
        trained: values that are trained.
        accumulation: micro batches of a step.
        sharded: FSDP2 in place of DDP.
    """
    once = VALUE_BYTES * trained * (fleet.count - 1) / fleet.count / fleet.ring
    if sharded:
        return StepTime(computing, (2 * accumulation + 1) * once, passes)
    return StepTime(computing, 2 * once, BACKWARD_SHARE * passes / accumulation)


def largest_micro_batch(memory_of: Callable[[int], TrainingMemory], micro_batch: int, room: float) -> int:
    """How many images at once fit into so many bytes.

    Small micro batches say little of large ones, so it is counted again where the last count expects it (the secant
    method), until that stays or after `COUNTS` more.

    Args:
        memory_of: counts a step of so many images.
        micro_batch: where to begin.
        room: bytes.
    """
    memory = memory_of(micro_batch)
    if memory.fixed >= room:
        return 0
    before, now = (0, memory.fixed), (micro_batch, memory.total)
    for _ in range(COUNTS):
        guess = _expected(before, now, room)
        if guess in (0, now[0]):
            break
        before, now = now, (guess, memory_of(guess).total)
    return _expected(before, now, room)


def _expected(before: tuple[int, int], now: tuple[int, int], room: float) -> int:
    """Where a line through two counts (images, bytes) meets the room, rounded down."""
    growth = (now[1] - before[1]) / (now[0] - before[0]) if now[0] != before[0] else 0
    return max(0, math.floor(now[0] + (room - now[1]) / growth)) if growth > 0 else now[0]


def compiled(memory: TrainingMemory, share: float) -> TrainingMemory:
    """What is held where blocks are compiled, which compute again what is cheap."""
    return replace(memory, activations=round(memory.activations * share))


def verdict(memory: TrainingMemory, fleet: Fleet) -> str:
    """Whether a step fits a GPU, for people."""
    share = f"{memory.total / fleet.gpu.memory:.0%} of a GPU's {readable_size(round(fleet.gpu.memory))}"
    return share if memory.total <= room(fleet) else f"DOES NOT FIT: {share}, of which about {RESERVED:.0%} is not free"


def room(fleet: Fleet) -> float:
    """Bytes that tensors can have of a GPU."""
    return fleet.gpu.memory * (1 - RESERVED)


@functools.cache
def _measured() -> dict[tuple[str, ...], float]:
    with MEASURED.open(encoding="utf-8", newline="") as file:
        return {tuple(row)[:-1]: float(row[-1]) for row in list(csv.reader(file))[1:]}


def measured_seconds(gpu: str, model: str, batch: int, side: int, compiled: bool, checkpointed: bool) -> float | None:
    """Seconds of a training step with AdamW in bfloat16 that was measured; None where none was.

    Args:
        gpu: of `d_emo.common.gpus`.
        model: a size's name.
        batch: images.
        side: of the latents, of four channels.
        compiled: whether blocks were.
        checkpointed: whether activations were computed again.
    """
    return _measured().get((gpu, model, str(batch), str(side), str(int(compiled)), str(int(checkpointed))))
