"""Batches that are made ready ahead: order, errors in their place, nothing left running."""

import threading
from dataclasses import replace

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from d_emo.train.data.batches import Batch
from d_emo.train.engine.prefetch import DEPTH, prefetched


def batch(number: int) -> Batch:
    return Batch(torch.tensor(number), torch.tensor(0), [number], [])


def test_batches_come_in_order_and_ahead():
    made = []
    ahead = threading.Event()

    def ready(one):
        made.append(one.positions[0])
        if len(made) == 1 + DEPTH:
            ahead.set()
        return replace(one, draws={"noise": torch.tensor(one.positions[0])})

    batches = prefetched(map(batch, range(7)), ready)
    first = next(batches)
    assert ahead.wait(10), "nothing is made ahead"
    rest = list(batches)
    assert [one.positions[0] for one in [first, *rest]] == [*range(7)] == made
    assert all(int(one.draws["noise"]) == one.positions[0] for one in [first, *rest])


def test_an_error_comes_where_its_batch_would_have_come():
    def some():
        yield batch(0)
        yield batch(1)
        raise RuntimeError("a worker died")

    batches = prefetched(some(), lambda one: one)
    assert [next(batches).positions[0] for _ in range(2)] == [0, 1]
    with pytest.raises(RuntimeError, match="a worker died"):
        next(batches)


def test_an_empty_loader_gives_nothing():
    assert list(prefetched(iter([]), lambda one: one)) == []


def test_a_run_that_stops_early_leaves_no_thread():
    batches = prefetched(map(batch, range(100)), lambda one: one)
    next(batches)
    batches.close()
    for thread in threading.enumerate():
        if thread.name.startswith("prefetch"):
            thread.join(10)
            assert not thread.is_alive()


def test_all_tensors_of_a_batch_are_pinned(monkeypatch):
    """As a loader asks for it where there is a GPU; pictures may be a list, targets tables."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor + 1)
    boxes = Batch([torch.zeros(1), torch.zeros(2)], ({"boxes": torch.zeros(4)}, {}), [0, 1], ["cut"])
    found = pin_memory(replace(boxes, draws={"time": torch.zeros(3)}))
    assert len(pinned) == 4
    assert [tensor.tolist() for tensor in found.images] == [[1], [1, 1]]
    assert found.labels[0]["boxes"].tolist() == [1] * 4 and found.draws["time"].tolist() == [1] * 3
    assert (found.positions, found.bad_images) == ([0, 1], ["cut"])
