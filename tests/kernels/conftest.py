"""The kernels' tests run on two threads, whatever the number of workers: what threads share is tested, too."""

import pytest
import torch


@pytest.fixture(autouse=True)
def two_threads():
    """Two threads for each test."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
