"""How a global batch is shared by processes and micro batches."""

from dataclasses import dataclass

# Default cap on a CPU, where a whole global batch rarely fits in memory.
CPU_MICRO_BATCH = 32


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is split: world_size x accumulation x micro_batch_size images an optimizer step."""

    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    world_size: int

    def describe(self) -> str:
        """The split, for people."""
        return (
            f"{self.global_batch_size} = {self.world_size} process(es) x {self.accumulation} accumulated x "
            f"{self.micro_batch_size}"
        )


def batch_layout(global_batch_size: int, micro_batch_size: int | None, world_size: int, on_cpu: bool) -> BatchLayout:
    """Split a global batch evenly.

    Raises:
        ValueError: it cannot be split evenly; the message gives the nearest sizes that can.
    """
    if global_batch_size % world_size:
        raise ValueError(
            f"--global-batch-size {global_batch_size} cannot be shared by {world_size} processes; "
            f"use {nearest_multiple(global_batch_size, world_size)}."
        )
    share = global_batch_size // world_size
    if micro_batch_size is None:
        cap = CPU_MICRO_BATCH if on_cpu else share
        micro_batch_size = max(size for size in range(1, min(cap, share) + 1) if share % size == 0)
    if share % micro_batch_size:
        raise ValueError(
            f"--micro-batch-size {micro_batch_size} does not divide the {share} images that each of {world_size} "
            f"process(es) takes of --global-batch-size {global_batch_size}."
        )
    return BatchLayout(global_batch_size, micro_batch_size, share // micro_batch_size, world_size)


def nearest_multiple(value: int, factor: int) -> int:
    """The multiple of `factor` next to `value`, at least one."""
    return max(factor, round(value / factor) * factor)
