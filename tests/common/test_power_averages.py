"""Averages after the fact: profiles, their overlaps, and sums of a few in place of another."""

import math

import numpy as np
import pytest
import torch
from helpers.made import write_snapshots

from d_emo.common.averaging import WeightAverage
from d_emo.common.power_averages import Profile, combine, decay, exponent, overlaps
from d_emo.common.snapshots import choose, delete_after, list_snapshots, put_into, snapshot_path, thin_bytes
from d_emo.pipelines import open_pipeline

LENGTHS = (0.05, 0.1)


def weights_of(profile: Profile) -> np.ndarray:
    """Weight of each step in an average, from what `decay` does step by step."""
    weights = np.zeros(profile.step)
    gamma = exponent(profile.length)
    for step in range(1, profile.step + 1):
        weights *= decay(step, gamma)
        weights[step - 1] += 1 - decay(step, gamma)
    return weights


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.1, 6.94)])
def test_exponents_are_those_of_the_paper(length, gamma):
    """Section 3.1 has 16.97 and 6.94 for 5% and 10%."""
    found = exponent(length)
    assert found == pytest.approx(gamma, abs=0.005)
    assert math.sqrt(found + 1) / (found + 2) / math.sqrt(found + 3) == pytest.approx(length, rel=1e-9)


def test_an_average_weights_every_step_by_the_integral_of_its_profile():
    profile, steps = Profile(300, 0.1), np.arange(301) / 300
    power = exponent(0.1) + 1
    np.testing.assert_allclose(weights_of(profile), np.diff(steps**power), atol=1e-12)
    moments = [(weights_of(profile) * (np.arange(1, 301) / 300) ** order).sum() for order in (1, 2)]
    assert math.sqrt(moments[1] - moments[0] ** 2) == pytest.approx(0.1, rel=0.01)  # what "relative length" means


def test_overlaps_are_the_integrals_of_products():
    profiles = [Profile(70, 0.05), Profile(100, 0.1), Profile(100, 0.2)]
    time = (np.arange(200_000) + 0.5) / 200_000 * 100
    values = []
    for step, length in profiles:
        gamma = exponent(length)
        values.append(np.where(time <= step, (gamma + 1) * (time / step) ** gamma / step, 0))
    expected = np.array([[(one * other).sum() * 100 / 200_000 for other in values] for one in values])
    np.testing.assert_allclose(overlaps(profiles, profiles), expected, rtol=1e-4)


def test_a_kept_average_is_found_again_exactly():
    kept = [Profile(step, length) for step in range(10, 101, 10) for length in LENGTHS]
    found = combine(kept, Profile(70, 0.1))
    assert found.error < 1e-6 and found.coefficients.sum() == pytest.approx(1, abs=1e-12)
    expected = [float(profile == Profile(70, 0.1)) for profile in kept]
    np.testing.assert_allclose(found.coefficients, expected, atol=1e-6)


def test_coefficients_are_those_of_a_search_among_sums_of_one():
    """Against least squares on the steps' own weights, with the last coefficient put in by hand."""
    steps = 4000
    kept = [Profile(step, length) for step in range(500, steps + 1, 500) for length in LENGTHS]
    wanted = Profile(steps, 0.075)
    table = np.array([np.pad(weights_of(profile), (0, steps - profile.step)) for profile in kept]).T
    aim = weights_of(wanted)
    free = np.linalg.lstsq(table[:, :-1] - table[:, -1:], aim - table[:, -1], rcond=None)[0]
    expected = table @ np.append(free, 1 - free.sum())
    found = combine(kept, wanted)
    # The two differ by the integral within a step.
    assert np.linalg.norm(table @ found.coefficients - expected) < 1e-3 * np.linalg.norm(aim)
    assert found.error == pytest.approx(np.linalg.norm(expected - aim) / np.linalg.norm(aim), rel=0.02)


@pytest.mark.parametrize("length", [0.03, 0.075, 0.15])
def test_weights_that_move_smoothly_are_averaged_to_1e_6(length):
    """In float64: what a run's weights are between its noise, here a drift that settles."""
    steps = np.arange(1, 2001)
    path = 1 + np.exp(-steps / 800) + 0.1 * np.sqrt(steps / 2000)
    kept = [Profile(step, kind) for step in range(20, 2001, 20) for kind in LENGTHS]
    values = np.array([weights_of(profile) @ path[: profile.step] for profile in kept])
    wanted = Profile(2000, length)
    expected = weights_of(wanted) @ path
    assert combine(kept, wanted).coefficients @ values == pytest.approx(expected, rel=1e-6)


def test_lengths_out_of_range_are_refused():
    for length in (0.0, 0.3, float("nan"), "x"):
        with pytest.raises(ValueError, match=r"length=.* is not a number from 0\.01 to 0\.28"):
            exponent(length)
    with pytest.raises(ValueError, match="there are no snapshots"):
        combine([], Profile(1, 0.1))


def test_the_published_averages_decay_is_as_it_was():
    average = WeightAverage(torch.nn.Linear(2, 2), decay=0.5)
    assert [average.decay_at(step) for step in (1, 2, 20)] == [2 / 11, 3 / 12, 0.5]


def test_a_model_gets_the_sum_of_snapshots_statistics_included(tmp_path):
    model = open_pipeline(str(write_snapshots(tmp_path / "run"))).transformer
    snapshots = list_snapshots(tmp_path / "run")
    assert [snapshot.step for snapshot in snapshots] == [10, 20, 30, 40]
    size = snapshot_path(tmp_path / "run", 10).stat().st_size
    assert 0 < size - 2 * thin_bytes(model.state_dict()) < 0.2 * size  # and the table of names
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = choose(snapshots, 0.07)
    put_into(model, chosen)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in before if "running_" in name} <= moved and not any("num_batches" in n for n in moved)
    # The third weights are those of step 30, whichever average: coefficients of one step go to one model.
    put_into(model, choose(snapshots, 0.1, step=30))
    third = write_snapshots(tmp_path / "again", range(2, 3))
    other = open_pipeline(str(third)).transformer
    put_into(other, choose(list_snapshots(third), 0.1))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], atol=1e-5, rtol=1e-5, msg=name)


def test_what_is_wrong_with_snapshots_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no snapshots; only a run that was trained with --snapshot-every"):
        list_snapshots(tmp_path)
    run = write_snapshots(tmp_path / "run")
    snapshots = list_snapshots(run)
    with pytest.raises(ValueError, match="step=15: there is no snapshot of it, but of 10 to 40"):
        choose(snapshots, 0.1, step=15)
    model = open_pipeline(str(run)).transformer
    with pytest.raises(ValueError, match=r"step-0000010.*damaged, or of another model"):
        put_into(torch.nn.Linear(2, 2), choose(snapshots, 0.1))
    snapshot_path(run, 20).write_bytes(snapshot_path(run, 20).read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"step-0000020.*damaged"):
        put_into(model, choose(list_snapshots(run), 0.1))
    delete_after(run, 10)
    assert [snapshot.step for snapshot in list_snapshots(run)] == [10]
