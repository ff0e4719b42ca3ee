"""Which version of this package and of the libraries below it runs."""

import contextlib
import sys
from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """This package's version, which stands in its `__init__`: imported before any of its modules."""
    return str(vars(sys.modules[__name__.partition(".")[0]])["__version__"])


def versions(*names: str) -> str:
    """This package's version and those of installed libraries, for people."""
    return ", ".join([f"d_emo {own_version()}", *(" ".join(found) for found in installed_versions(*names).items())])


def installed_versions(*names: str) -> dict[str, str]:
    """The versions of those libraries that are installed; this package need not be, its own is `own_version`."""
    found = {}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
