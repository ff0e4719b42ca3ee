"""Models that come with the package: each is a folder of `d_emo/packaged`, as its library's `from_pretrained` takes it.

A folder that holds `model_index.json` (a pipeline) or `config.json` (one network) is a model, whatever it is called;
there is no list of them besides.
"""

import sys
from pathlib import Path

from d_emo.common.checks import text
from d_emo.common.messages import nearest
from d_emo.common.output import say

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


def model_place(name: str) -> str:
    """What a model's name stands for: a packaged model's folder, else the folder or the Hub id that it is.

    A folder of a packaged model's name is meant by "./NAME"; a line says so where both are there.
    """
    if not is_packaged(text(name, "name")):
        return name
    if Path(name).exists():
        say(f"{name}: the model that comes with the package; write ./{name} for what lies here.", sys.stderr)
    return str(packaged(name))


def is_packaged(name: str) -> bool:
    """Whether a model's name means one that comes with the package, into whose folder nothing is written."""
    return name in list_packaged()
