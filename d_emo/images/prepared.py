"""What evaluators walk over: all of a source, or a process's share, prepared in loader processes, in order."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from d_emo.common.output import Progress, say
from d_emo.common.processes import leave_interrupts
from d_emo.images.decode import UnreadableImageError
from d_emo.images.source import refuse_unreadable


class _Prepared(Dataset):
    """What is made of each index; a message in place of what cannot be read."""

    def __init__(self, prepare: Callable[[int], Any], indices: Sequence[int]):
        self.prepare, self.indices = prepare, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, number: int) -> tuple[Any, str]:
        try:
            return self.prepare(self.indices[number]), ""
        except UnreadableImageError as error:
            return None, str(error)  # raised where the user sees it, not in a loader process


class _Joined:
    """Several of them together, and the messages of the others."""

    def __init__(self, join: Callable[[list[Any]], Any]):
        self.join = join

    def __call__(self, samples: Sequence[tuple[Any, str]]) -> tuple[Any, int, list[str]]:
        read = [sample for sample, message in samples if not message]
        return self.join(read) if read else None, len(read), [message for _, message in samples if message]


def first(samples: list[Any]) -> Any:
    """What becomes of samples that are prepared one by one."""
    return samples[0]


@contextlib.contextmanager
def prepared(
    source: Any,
    prepare: Callable[[int], Any],
    join: Callable[[list[Any]], Any] = first,
    *,
    about: str,
    unit: str = "image",
    batch_size: int = 1,
    num_workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
    skip_bad: bool = False,
    remedy: str = "Repair or remove it.",
) -> Iterator[Iterator[Any]]:
    """A context in which a source is walked over once.

    Args:
        source: has a size and a name.
        prepare: index -> what is made of it, in a loader process; raises UnreadableImageError.
        join: what is made of up to `batch_size` of them, likewise.
        about: what is done with the source, for people.
        unit: one of the source, for people.
        batch_size: how many at once.
        num_workers: loader processes.
        rank, world_size: this process takes every `world_size`-th from `rank` on.
        progress: show how far it is.
        skip_bad: leave out, aloud, what cannot be read.
        remedy: what to do about it.

    Yields:
        An iterator of what `join` made. It raises UnreadableImageError where something cannot be read.
    """
    loader = DataLoader(
        _Prepared(prepare, range(rank, source.size, world_size)),
        batch_size,
        num_workers=num_workers,
        collate_fn=_Joined(join),
        worker_init_fn=leave_interrupts,
        generator=torch.Generator(),  # a run that is validated must not draw otherwise than one that is not
    )

    def walk() -> Iterator[Any]:
        for batch, count, messages in loader:
            if not skip_bad:
                refuse_unreadable(messages[:1], remedy)
            for message in messages:
                say(f"skipped: {message}")
            if count:
                yield batch
            bar.update((count + len(messages)) * world_size)  # the other processes are about as far

    with Progress(source.size, unit, f"{about} {source.name}", shown=progress, leave=False) as bar:
        yield walk()
