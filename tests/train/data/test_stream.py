"""Order and randomness as functions of the position."""

import functools
import itertools

import numpy as np
import pytest
import torch

from d_emo.train.data import stream
from d_emo.train.data.stream import StreamSampler

NORMAL = [
    pytest.param(stream.normal, id="cpu"),
    pytest.param(functools.partial(stream.normal_on, torch.device("cpu")), id="device"),
]


def positions_and_indices(world_size=1, micro=4, first=0, last=10, size=30, total=16, seed=0):
    ranks = []
    for rank in range(world_size):
        sampler = StreamSampler(size, seed, global_batch_size=total, micro_batch_size=micro, rank=rank,
                                world_size=world_size, first_step=first, last_step=last)  # fmt: skip
        batches = list(sampler)
        assert len(batches) == len(sampler)
        ranks.append(batches)
    return [pair for batches in zip(*ranks, strict=True) for batch in batches for pair in batch]


@pytest.mark.parametrize(("world_size", "micro"), [(1, 16), (2, 4), (4, 2), (8, 2)])
def test_every_split_deals_the_same_stream(world_size, micro):
    assert positions_and_indices(world_size, micro) == positions_and_indices()


def test_a_resumed_stream_is_the_rest_of_it():
    assert positions_and_indices(first=6) == positions_and_indices()[6 * 16 :]


def test_every_epoch_is_another_permutation_without_gaps():
    indices = [index for _, index in positions_and_indices(last=15)]
    first, second = indices[:30], indices[30:60]
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second
    assert indices != [index for _, index in positions_and_indices(last=15, seed=1)]


@pytest.mark.parametrize("normal", NORMAL)
def test_draws_depend_on_position_purpose_and_seed_only(normal):
    draws = normal(0, "noise", [5, 6], (3, 4))
    assert draws.shape == (2, 3, 4)
    assert torch.equal(draws[1], normal(0, "noise", [6], (3, 4))[0])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws, normal(1, "noise", [5, 6], (3, 4)))
    assert not torch.equal(draws, normal(0, "vae", [5, 6], (3, 4)))


@pytest.mark.parametrize("purpose", list(stream.PURPOSES))
def test_a_generator_that_is_put_somewhere_is_a_new_one_there(purpose):
    kinds = (
        lambda random: random.standard_normal(5, dtype=np.float32),
        lambda random: random.random(3, dtype=np.float32),
        lambda random: random.integers(0, 4, (3, 3), dtype=np.uint8),  # leaves half a number over
        lambda random: random.random(2),
    )
    for seed, position in itertools.product((0, 3, 2**63 + 5), (0, 1, 255, 2**40 + 3, 2**63 + 1)):
        for draw in kinds:
            put, made = stream._at(seed, purpose, position), stream.generator(seed, purpose, position)
            np.testing.assert_array_equal(draw(put), draw(made))


def test_threads_draw_what_one_generator_a_position_draws():
    """What a seed meant before there were threads: NumPy's Philox, one a position."""
    draws = stream.normal(7, "noise", range(90, 140), (4, 3))
    for row, position in zip(draws, range(90, 140), strict=True):
        key, counter = np.array([7, 1], dtype=np.uint64), np.array([0, 0, 0, position], dtype=np.uint64)
        alone = np.random.Generator(np.random.Philox(key=key, counter=counter)).standard_normal((4, 3), np.float32)
        assert np.array_equal(row.numpy(), alone)


@pytest.mark.parametrize("normal", NORMAL)
def test_draws_have_the_right_distribution(normal):
    normal = normal(3, "noise", range(4000), (16,)).double()
    uniform = stream.uniform(3, "time", range(64000)).double()
    # Standard errors are 1/253 for both; five of them are allowed.
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.014
    assert abs(uniform.mean() - 0.5) < 0.006 and uniform.min() >= 0 and uniform.max() < 1
    correlation = np.corrcoef(normal[:-1, 0], normal[1:, 0])[0, 1]
    assert abs(correlation) < 0.08
