"""Which of our modules import which, read from the sources."""

import ast
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path

from helpers.paths import ROOT

# Where the package's modules lie; links inside `d_emo` make the same of it for Python.
FOLDERS = {"d_emo": "d_emo", "pipelines": "d_emo.pipelines", "train": "d_emo.train", "eval": "d_emo.eval"}


@functools.cache
def modules() -> dict[str, Path]:
    """Every module of ours by the name it is imported by; packages by their own name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def _within_if_type_checking(tree: ast.AST) -> set[ast.AST]:
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    return {inner for guard in guards for statement in guard.body for inner in ast.walk(statement)}


def imported_names(source: str, module: str, is_package: bool) -> set[str]:
    """The dotted names that a module imports anywhere, inside of functions too; not those for type checkers alone.

    Args:
        source: The module's text.
        module: Its name, from which relative imports start.
        is_package: Whether the text is that of an `__init__.py`.
    """
    tree = ast.parse(source)
    ignored = _within_if_type_checking(tree)
    names = set()
    for node in ast.walk(tree):
        if node in ignored:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = module if is_package else module.rpartition(".")[0]  # where one dot starts
            for _ in range(node.level - 1):
                origin = origin.rpartition(".")[0]
            base = ".".join(filter(None, [origin if node.level else "", node.module]))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def import_graph() -> dict[str, set[str]]:
    """From each module of ours to those of ours that it imports; a name that is no module counts as its parent's."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for module, path in known.items():
        graph[module] = set()
        for name in imported_names(path.read_text(encoding="utf-8"), module, path.name == "__init__.py"):
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name and name != module:
                graph[module].add(name)
    return graph


def reachable(graph: Mapping[str, Iterable[str]], start: str) -> set[str]:
    """All that `start` imports, directly or through others."""
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph[waiting.pop()]:
            if target not in found:
                found.add(target)
                waiting.append(target)
    return found


def circles(graph: Mapping[str, Iterable[str]]) -> set[str]:
    """The modules that reach themselves."""
    return {module for module in graph if module in reachable(graph, module)}
