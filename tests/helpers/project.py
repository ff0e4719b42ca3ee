"""What pyproject.toml says: names of what is depended on, by extra."""

import re
import sys
from typing import Any

from helpers.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it


def project() -> dict[str, Any]:
    """The file's content."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> dict[str, list[str]]:
    """Requirements by extra, the package's own extras left out; "" are those of every installation."""
    content = project()["project"]
    groups = {"": content["dependencies"], **content["optional-dependencies"]}
    return {extra: [line for line in lines if not line.startswith("d-emo[")] for extra, lines in groups.items()}


def distribution(requirement: str) -> str:
    """A requirement's name."""
    found = re.match(r"[\w.-]+", requirement)
    assert found, requirement
    return found[0]


def included(extra: str) -> set[str]:
    """The extras that an extra names."""
    lines = project()["project"]["optional-dependencies"][extra]
    return {name for line in lines if line.startswith("d-emo[") for name in line[6:-1].split(",")}
