"""What tests of the trainers share."""

import pytest
from helpers.training import uncounted


@pytest.fixture(scope="module")
def uncounted_plans():
    """For a file that is not about what a step holds, which its plans then do not count."""
    with uncounted():
        yield
