"""Fixtures of all tests. What tests share else is in helpers/."""

from pathlib import Path

import pytest

pytest.register_assert_rewrite("helpers")


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
