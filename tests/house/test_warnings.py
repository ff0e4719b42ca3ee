"""Deprecations are errors where our code meets them (`filterwarnings` in pyproject.toml)."""

import warnings

import pytest
from diffusers.utils import deprecate


def warn_as(module: str, category: type[Warning]) -> None:
    """A warning that Python ascribes to a line of `module`."""
    exec("warnings.warn('old', category)", {"__name__": module, "warnings": warnings, "category": category})


@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning])
@pytest.mark.parametrize("module", ["d_emo", "d_emo.train.engine.loop", "helpers.models", "test_models"])
def test_a_deprecation_that_our_code_meets_is_an_error(module, category):
    with pytest.raises(category):
        warn_as(module, category)


def test_a_deprecation_among_other_libraries_is_not():
    with pytest.warns(DeprecationWarning):
        warn_as("somebody_elses", DeprecationWarning)


def test_what_diffusers_deprecates_is_an_error():
    with pytest.raises(FutureWarning):
        deprecate("option", "9.0.0", "Use another.")
