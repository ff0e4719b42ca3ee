"""Models that come with the package: each is a folder of `d_emo/packaged`, as its library's `from_pretrained` takes it.

A folder that holds `model_index.json` (a pipeline) or `config.json` (one network) is a model, whatever it is called;
there is no list of them besides.
"""

from pathlib import Path

from d_emo.common.checks import text
from d_emo.common.messages import nearest

_FOLDER = Path(__file__).resolve().parents[1] / "packaged"
_MARKS = ("model_index.json", "config.json")


def list_packaged() -> list[str]:
    """Names of the models that come with the package, in the order of the alphabet."""
    found = {path.parent.name for mark in _MARKS for path in _FOLDER.glob(f"*/{mark}")}
    return sorted(found)


def packaged(name: str) -> Path:
    """The folder of a model that comes with the package, for `from_pretrained`; nothing is fetched.

    Args:
        name: one of `list_packaged()`, such as "digits".

    Raises:
        ValueError: there is none of that name; the message lists those that there are.
    """
    known = list_packaged()
    if text(name, "name") not in known:
        hint = nearest(name, known, "d_emo.list_packaged() shows all names.")
        there = f"there are {', '.join(known)}" if known else "this installation has none"
        raise ValueError(f"packaged model {name!r} is unknown ({there}); {hint}")
    return _FOLDER / name
