"""CONTRIBUTING's map of the house: it agrees with the tree, and the imports agree with it."""

import re
import subprocess
import sys

import pytest
from helpers.import_graph import circles, import_graph, imported_names, modules, reachable
from helpers.paths import ROOT

WINGS = tuple(f"d_emo.train.{wing}" for wing in ("diffusion", "classification", "segmentation", "detection", "video"))


def folder_table() -> dict[str, list[str]]:
    """The rows of CONTRIBUTING's table of folders: the first cell's path, and the text of the other cells."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    start = re.search(r"^\| folder \|.*\n\|[-|]+\|\n", text, flags=re.MULTILINE)
    assert start, "CONTRIBUTING.md has no table of folders"
    rows = re.match(r"(?:\|.*\n)*", text[start.end() :])
    assert rows
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[0].splitlines()]
    return {first.strip("`").rstrip("/"): rest for first, *rest in cells}


MAP = folder_table()


def house_folders() -> set[str]:
    """The folders that hold files of the repository: not links, caches, and what .gitignore names.

    Models that come with the package are one folder, however many there are.
    """
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text(encoding="utf-8").split()}
    ignored |= {".git", "shared"}
    found = set()
    for top in ROOT.iterdir():
        if top.is_dir() and top.name not in ignored and not top.name.endswith(".egg-info"):
            for folder in [top, *(path for path in top.rglob("*") if path.is_dir() and not path.is_symlink())]:
                if folder.name != "__pycache__" and any(path.is_file() for path in folder.iterdir()):
                    found.add(re.sub(r"^(d_emo/packaged)/.*", r"\1", folder.relative_to(ROOT).as_posix()))
    return found


def home(module: str) -> str:
    """The map's row of a module: the nearest folder above it of which the map says what it may import."""
    folder = modules()[module].relative_to(ROOT).parent
    return next(path.as_posix() for path in [folder, *folder.parents] if MAP.get(path.as_posix(), ["", ""])[1])


def test_every_line_of_the_map_is_a_folder():
    assert not [folder for folder in MAP if not (ROOT / folder).is_dir()]


def test_every_folder_is_on_the_map():
    # The tests' folders repeat the packages'.
    repeated = {f"tests/{folder.removeprefix('d_emo/')}" for folder in MAP if not folder.startswith("tests")}
    assert house_folders() - set(MAP) - repeated == set()


def permitted() -> dict[str, set[str]]:
    """What the map lets each folder of modules import, as folders."""
    rules = {}
    for folder in sorted({home(module) for module in modules()}):
        (_, rule) = MAP[folder]
        rules[folder] = {path.rstrip("/") for path in re.findall(r"`([^`]+)`", rule)}
        assert rule == "nothing" or rules[folder], f"the map does not say what {folder} may import"
    return rules


def test_modules_import_what_the_map_lets_them():
    rules = permitted()
    assert {path for rule in rules.values() for path in rule} <= set(rules), "a rule names a folder without modules"
    graph = import_graph()
    found = {
        f"{module} imports {target}"
        for module in graph
        for target in graph[module]
        if home(target) not in rules[home(module)] | {home(module)}
    }
    assert not found, "the map does not let:\n" + "\n".join(sorted(found))


def test_the_map_lets_no_folder_import_what_imports_it():
    rules = permitted()
    below = {"d_emo", "eval"}  # the public face and a command, which benchmarks and tables run like a user
    assert not circles({folder: targets - below for folder, targets in rules.items()})


def test_no_module_reaches_itself():
    in_a_circle = sorted(circles(import_graph()))
    assert in_a_circle == []


def test_circles_are_found():
    assert circles({"a": ["b"], "b": ["c"], "c": ["b"], "d": ["a"]}) == {"b", "c"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import d_emo.images.labels as x", {"d_emo.images.labels"}),
        ("def f():\n    from d_emo.models import i2rmb", {"d_emo.models.i2rmb"}),
        ("from .cpu import load", {"d_emo.kernels.cpu.load"}),
        ("from . import cpu", {"d_emo.kernels.cpu"}),
        ("from ..common.files import x", {"d_emo.common.files.x"}),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import json", {"json"}),
    ],
)
def test_imports_are_read_from_the_source(source, expected):
    assert imported_names(source, "d_emo.kernels.local", is_package=False) == expected
    if source.startswith("from .cpu"):
        assert imported_names(source, "d_emo.kernels", is_package=True) == expected


@pytest.mark.parametrize("part", ["engine", "data"])
def test_engine_and_data_reach_neither_wing(part):
    graph = import_graph()
    for module in graph:
        if module.startswith(f"d_emo.train.{part}"):
            assert not {target for target in reachable(graph, module) if target.startswith(WINGS)}, module


@pytest.mark.slow
def test_training_a_classifier_loads_neither_the_fid_evaluator_nor_the_other_wing_in_a_fresh_process():
    graph = import_graph()
    command = "d_emo.train.train_classifier"
    needed = sorted(module for module in reachable(graph, command) if module.startswith("d_emo.train"))
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    run = [sys.executable, "-c", code, command, *needed]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "d_emo.train.engine.loop" in loaded
    assert not [name for name in loaded if name.startswith(("d_emo.eval.fid", "d_emo.train.diffusion"))]
