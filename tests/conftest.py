"""Fixtures and hooks of all tests. What tests share else is in helpers/."""

import gc
import os
import random
from pathlib import Path

import pytest

pytest.register_assert_rewrite("helpers")

# Workers of pytest-xdist share the cores out: threads of several processes that wait for each other on one core cost
# ten times their work, and more if they wait without sleeping. What tests start inherits its worker's core.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else []
WORKER, WORKERS = os.environ.get("PYTEST_XDIST_WORKER"), int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKER and CORES:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(CORES) // WORKERS)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _seed() -> None:
    """What tests draw without a generator of their own, at import or in fixtures, is the same in every order."""
    import numpy as np  # not in the process that only hands out tests
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():  # else `torch.manual_seed` keeps the whole stack each time, for later
        torch.cuda.manual_seed_all(0)


def pytest_collectstart() -> None:
    gc.disable()  # what is imported stays: looking through it again and again is a quarter of a collection's time
    _seed()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
    if WORKER and CORES:  # until now each took what core was free
        os.sched_setaffinity(0, CORES[int(WORKER.removeprefix("gw")) % len(CORES) :: WORKERS])


def pytest_runtest_setup() -> None:
    _seed()


def pytest_runtest_call() -> None:
    _seed()


@pytest.fixture
def shared() -> Path:
    """The project's shared folder; tests that need it are skipped where it is missing."""
    from helpers.paths import SHARED

    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared")
    return SHARED


@pytest.fixture
def offline(monkeypatch):
    """Never ask the Hub."""
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
