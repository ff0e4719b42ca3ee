"""How a global batch is shared by processes and micro batches."""

from dataclasses import dataclass

# Default cap on a CPU, where a whole global batch rarely fits in memory.
CPU_MICRO_BATCH = 32
# BatchNorm's statistics of fewer images than these are noise.
MIN_MICRO_BATCH = 8


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
    """Split a global batch evenly; a micro batch is at most a process's share.

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
        micro_batch_size = default_micro_batch(share, CPU_MICRO_BATCH if on_cpu else share)
    micro_batch_size = min(micro_batch_size, share)
    if share % micro_batch_size:
        fitting = max(size for size in range(1, micro_batch_size) if share % size == 0)
        raise ValueError(
            f"--micro-batch-size {micro_batch_size} does not divide the {share} images that each of {world_size} "
            f"process(es) takes of --global-batch-size {global_batch_size}; use {fitting}."
        )
    return BatchLayout(global_batch_size, micro_batch_size, share // micro_batch_size, world_size)


def default_micro_batch(share: int, cap: int) -> int:
    """The divisor of a process's share that is nearest to `cap` from below, from above where only tiny ones are below.

    Raises:
        ValueError: all are tiny or far too large; BatchNorm would normalise over a few images.
    """
    divisors = [size for size in range(1, share + 1) if share % size == 0]
    below = max(size for size in divisors if size <= cap)
    if below >= min(share, MIN_MICRO_BATCH):
        return below
    above = min(size for size in divisors if size > cap)
    if above <= 2 * cap:
        return above
    fitting = nearest_multiple(share, cap)
    raise ValueError(
        f"the {share} images that a process takes of --global-batch-size can be computed {below} or {above} at once "
        f"only, few for BatchNorm or many for a CPU; use a multiple of {cap}, such as {fitting} a process, or say how "
        f"many with --micro-batch-size."
    )


def nearest_multiple(value: int, factor: int) -> int:
    """The multiple of `factor` next to `value`, at least one."""
    return max(factor, round(value / factor) * factor)
