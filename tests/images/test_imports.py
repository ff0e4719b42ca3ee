"""The modules of d_emo/images import one another in one direction."""

import ast
import graphlib

from helpers.paths import ROOT

FOLDER = ROOT / "d_emo" / "images"


def test_no_circle_of_imports():
    graph = {}
    for path in FOLDER.glob("*.py"):
        modules = [node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        graph[path.stem] = {name.split(".")[-1] for name in modules if name and name.startswith("d_emo.images.")}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError
    assert order.index("decode") < order.index("listing") < order.index("folders") < order.index("open_source")
    assert "latent_cache" not in graph["source"]
