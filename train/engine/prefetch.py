"""Batches made ready by a thread while the step before is computed."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from d_emo.train.data.batches import Batch

# A batch in hand, and one that is being made.
DEPTH = 2


def prefetched(batches: Iterator[Batch], ready: Callable[[Batch], Batch]) -> Iterator[Batch]:
    """The batches in their order, read and made ready ahead of the one who takes them.

    What is raised on the way is raised where the batch would have come. Neither `batches` nor `ready` may use global
    generators, which the taker uses meanwhile.

    Args:
        batches: processes that belong to it are started before, by the thread that calls this.
        ready: what becomes of a batch.
    """
    reader = ThreadPoolExecutor(1, "prefetch")

    def one() -> Batch | None:
        batch = next(batches, None)
        return None if batch is None else ready(batch)

    def taken() -> Iterator[Batch]:
        waiting = deque(reader.submit(one) for _ in range(DEPTH))
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(reader.submit(one))
                yield batch
        finally:
            reader.shutdown(wait=False, cancel_futures=True)

    return taken()
