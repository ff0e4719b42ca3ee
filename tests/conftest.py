"""Fixtures and hooks of all tests. What tests share else is in helpers/."""

import os
import random
from pathlib import Path

import pytest

pytest.register_assert_rewrite("helpers")

# Workers of pytest-xdist share the cores out, before torch counts them: threads of several processes that wait for each
# other on one core cost ten times their work. What tests start inherits its worker's core.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    cores, workers = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, cores[int(worker.removeprefix("gw")) % len(cores) :: workers])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(cores) // workers)))

import numpy as np  # noqa: E402
import torch  # noqa: E402


def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# What a test draws without a generator of its own, at import or in a fixture, is the same in every run and every order.


def pytest_collectstart() -> None:
    _seed()


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
