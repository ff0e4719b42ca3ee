"""Randomness and order as pure functions of (seed, position in the stream of samples).

Nothing here has a state to save: sample number `position` of a run is the same image with the same noise, time, flip
and label dropout after a resume, at any batch split and on any number of processes.
"""

import functools
import hashlib
import math
import os
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Sampler

# One independent Philox stream a purpose. The numbers are part of what a seed means: append, never renumber.
PURPOSES = {"order": 0, "noise": 1, "time": 2, "label_dropout": 3, "flip": 4, "vae": 5, "augmentation": 6, "mixup": 7,
            "frames": 8, "end": 9, "kept": 10}  # fmt: skip
# Of which one number a sample is drawn, uniform in [0, 1), for every batch of a diffusion model.
UNIFORM: tuple["Purpose", ...] = ("time", "label_dropout")
# Rows of normal numbers that a thread draws in one go, and threads at most.
TOGETHER, MAX_THREADS = 16, 4
Purpose = Literal[
    "order", "noise", "time", "label_dropout", "flip", "vae", "augmentation", "mixup", "frames", "end", "kept"
]


def generator(seed: int, purpose: Purpose, position: int) -> np.random.Generator:
    """A counter-based generator for one purpose and position (Philox, doi:10.1145/2063384.2063405)."""
    key, counter = (np.array(words, dtype=np.uint64) for words in _start(seed, purpose, position))
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def _start(seed: int, purpose: Purpose, position: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Key and counter of Philox where a stream begins."""
    return (seed, PURPOSES[purpose]), (0, 0, 0, position)


class _Own(threading.local):
    """A thread's generator, and its state as it is set."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.generator = np.random.Generator(self.bits)
        self.state = self.bits.state


_own = _Own()


def _at(seed: int, purpose: Purpose, position: int) -> np.random.Generator:
    """What `generator` gives, until this thread's next call: one generator, put there in place of a new one.

    Making hundreds of them a batch holds Python's lock for milliseconds, in which nothing is launched on a GPU.
    """
    inner = _own.state["state"]
    inner["key"][:], inner["counter"][:] = _start(seed, purpose, position)
    _own.bits.state = _own.state
    return _own.generator


def normal(seed: int, purpose: Purpose, positions: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard-normal float32 tensor of (len(positions), *shape)."""
    rows = np.empty((len(positions), math.prod(shape)), dtype=np.float32)

    def fill(first: int) -> None:
        for row in range(first, min(first + TOGETHER, len(rows))):
            _at(seed, purpose, positions[row]).standard_normal(dtype=np.float32, out=rows[row])

    # NumPy lets other threads run while it fills a row.
    list(_threads().map(fill, range(0, len(rows), TOGETHER)))
    return torch.from_numpy(rows).view(len(positions), *shape)


def normal_on(
    device: torch.device, seed: int, purpose: Purpose, positions: Sequence[int], shape: Sequence[int]
) -> torch.Tensor:
    """Standard-normal float32 tensor of (len(positions), *shape), drawn by a device: other numbers than `normal`'s.

    Each position's are of PyTorch's generator of that device, seeded with a digest of (seed, purpose, position).
    """
    rows, source = torch.empty(len(positions), *shape, device=device), torch.Generator(device)
    for row, position in zip(rows, positions, strict=True):
        key = struct.pack("<3Q", seed, PURPOSES[purpose], position)
        source.manual_seed(int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little"))
        row.normal_(generator=source)
    return rows


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "draws")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # threads stay in the parent


def uniform(seed: int, purpose: Purpose, positions: Sequence[int]) -> torch.Tensor:
    """Uniform float32 tensor of (len(positions),) in [0, 1)."""
    draws = [_at(seed, purpose, p).random(dtype=np.float32) for p in positions]
    return torch.tensor(draws, dtype=torch.float32)


def choices(seed: int, purpose: Purpose, positions: Sequence[int], shape: Sequence[int], count: int) -> torch.Tensor:
    """Whole numbers below `count`, evenly: (len(positions), *shape), of one byte."""
    rows = [_at(seed, purpose, position).integers(0, count, shape, dtype=np.uint8) for position in positions]
    return torch.from_numpy(np.stack(rows))


def flips(seed: int, position: int) -> bool:
    """Whether the image at a position is mirrored."""
    return bool(_at(seed, "flip", position).random() < 0.5)


class StreamSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (position, sample index) of one process, from any optimizer step on.

    The stream is one permutation of the data set an epoch, without gaps between epochs. Optimizer step s takes
    positions s * global_batch_size onwards; micro batches are dealt to the processes in turn.

    Args:
        num_samples: size of the data set.
        seed: seed of the permutations.
        global_batch_size, micro_batch_size, rank, world_size: the batch layout; the first is a multiple of
            micro_batch_size * world_size.
        first_step, last_step: the optimizer steps to deal, the last one excluded.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        first_step: int,
        last_step: int,
    ):
        self.num_samples = num_samples
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.first_step = first_step
        self.last_step = last_step
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        per_step = self.global_batch_size // (self.micro_batch_size * self.world_size)
        return max(0, self.last_step - self.first_step) * per_step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for positions in self.positions():
            yield [(position, self._index(position)) for position in positions]

    def positions(self) -> Iterator[range]:
        """The positions of each batch, for data that have no index."""
        stride = self.micro_batch_size * self.world_size
        for start in range(self.first_step * self.global_batch_size, self.last_step * self.global_batch_size, stride):
            first = start + self.rank * self.micro_batch_size
            yield range(first, first + self.micro_batch_size)

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            self._epoch = epoch
            self._permutation = generator(self.seed, "order", epoch).permutation(self.num_samples)
        return int(self._permutation[offset])
