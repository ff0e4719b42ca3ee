"""The campaign: faults at random moments of every long command, see `helpers/campaign.py`.

    D_EMO_CAMPAIGN_ROUNDS=5 pytest -n 0 -q -s -m slow tests/campaign

prints how often each fault struck each command. A round of all of it takes about ten minutes on two cores.
"""

import collections
import os
import zlib

import pytest
from helpers.campaign import FAULTS, JOBS, LAUNCHED, LAUNCHER_FAULTS, strike, undisturbed
from helpers.made import make_everything, write_pictures

ROUNDS = int(os.environ.get("D_EMO_CAMPAIGN_ROUNDS", "1"))
SEED = int(os.environ.get("D_EMO_CAMPAIGN_SEED", "0"))
COUNTS: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
CASES = [(job, fault) for job in JOBS for fault in FAULTS] + [(j, f) for j in LAUNCHED for f in LAUNCHER_FAULTS]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the commands read."""
    folder = tmp_path_factory.mktemp("made")
    everything = make_everything(folder)
    return {**everything, "pictures": write_pictures(folder / "more", side=32, count=16)}


@pytest.fixture(scope="module")
def expected(made, tmp_path_factory):
    """Results and durations of undisturbed runs, each made when it is first asked for."""
    known: dict[str, tuple] = {}

    def of(name: str) -> tuple:
        if name not in known:
            job = {**JOBS, **LAUNCHED}[name]
            known[name] = undisturbed(job, tmp_path_factory.mktemp("undisturbed"), made)
        return known[name]

    return of


@pytest.fixture(scope="module", autouse=True)
def table():
    """Print how often each fault struck each command."""
    yield
    if COUNTS:
        print("\n\n| command | " + " | ".join(FAULTS) + " | others |\n" + "|---" * (len(FAULTS) + 2) + "|")
        for job, counts in COUNTS.items():
            others = sum(counts[fault] for fault in LAUNCHER_FAULTS if fault not in FAULTS)
            print(f"| {job} | " + " | ".join(str(counts[fault]) for fault in FAULTS) + f" | {others} |")


@pytest.mark.slow
@pytest.mark.timeout(600 + 600 * ROUNDS)
@pytest.mark.parametrize(("job", "fault"), CASES, ids=lambda value: value.replace(" ", "-"))
def test_run_again_it_ends_with_the_same_bits(job, fault, made, expected, tmp_path):
    result, seconds = expected(job)
    for number in range(ROUNDS):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        seed = zlib.crc32(f"{SEED} {job} {fault} {number}".encode())
        strike({**JOBS, **LAUNCHED}[job], fault, seed, scratch, made, result, seconds)
        COUNTS[job][fault] += 1
