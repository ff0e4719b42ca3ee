"""Which version of this package and of the libraries below it runs."""

import sys
from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """This package's version, which stands in its `__init__`: imported before any of its modules."""
    return str(vars(sys.modules[__name__.partition(".")[0]])["__version__"])


def versions(*names: str) -> str:
    """This package's version and those of installed libraries, for people."""
    found = [f"d_emo {own_version()}"]
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
