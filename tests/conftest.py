"""Fixtures and hooks of all tests. What tests share else is in helpers/."""

import os
from pathlib import Path

import pytest

pytest.register_assert_rewrite("helpers")

# Workers of pytest-xdist share the cores. Before torch is imported, and for all processes that tests start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


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
