"""Extras that the core of the tests (`[test]`) leaves out: what needs one is skipped without it, and says which."""

import importlib.metadata

import pytest

from helpers.project import distribution, requirements


def installed(extra: str, *packages: str) -> bool:
    """Whether an extra's own packages are there, all or those that are named; nothing is imported."""
    own = [distribution(line) for line in requirements()[extra]]
    assert set(packages) <= set(own), packages
    try:
        return all(importlib.metadata.version(name) for name in packages or own)
    except importlib.metadata.PackageNotFoundError:
        return False


def needs(extra: str, *packages: str) -> pytest.MarkDecorator:
    """A mark that skips a test, or with `pytestmark` a file, where an extra is missing, or these packages of it."""
    return pytest.mark.skipif(not installed(extra, *packages), reason=f"needs the extra {extra}")
