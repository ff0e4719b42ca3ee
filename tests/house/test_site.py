"""The site of docs/: links, public names, what its pages load, and the build as a whole."""

import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from helpers.documents import DOCUMENTS, read_document, without_blocks
from helpers.paths import ROOT
from helpers.public_calls import CALLS

import d_emo
from d_emo.cli.names import COMMANDS

DOCS = ROOT / "docs"
# Modules that users import by name, whose `__all__` is public beside the package's own.
PUBLIC_MODULES = ("pipelines", "models", "schedulers", "detection", "export", "kernels", "timm_models")


def without_code(text: str) -> str:
    """A document without its blocks of code and its inline code."""
    return re.sub(r"`[^`\n]*`", "", without_blocks(text))


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_and_anchors_resolve(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(read_document(document))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = ((ROOT / document).parent / path).resolve() if path else ROOT / document
        if place == DOCS / "reference" / "commands.md":
            continue  # made when the site is built, which looks at such links itself
        assert place.exists(), target
        assert not anchor or anchor in anchors(place.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_lists_and_tables_stand_apart_as_the_sites_markdown_wants_them(document):
    for before, line in itertools.pairwise(without_code(read_document(document)).splitlines()):
        begins = re.match(r"([-*]|1\.) ", line) and not re.match(r" +\S|[-*] |\d+\. |#", before)
        begins = begins or (line.startswith("|") and not before.startswith("|"))
        assert not begins or not before.strip(), f"an empty line is missing before {line[:60]!r}"


def public_names() -> dict[str, Any]:
    """Every public object by where it is imported from."""
    names = {f"d_emo.{name}": getattr(d_emo, name) for name in d_emo.__all__}
    for part in PUBLIC_MODULES:
        module = importlib.import_module(f"d_emo.{part}")
        names |= {f"d_emo.{part}.{name}": getattr(module, name) for name in module.__all__}
    for call in CALLS.values():
        function: Any = call.function()
        if inspect.isclass(function) or inspect.isfunction(function):
            names[f"{function.__module__}.{function.__qualname__}"] = function
    return names


def documented_names() -> dict[str, Any]:
    """What the reference's pages are made of."""
    found = {}
    for page in (DOCS / "reference").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            found[name] = getattr(importlib.import_module(module), attribute)
    return found


def test_every_public_name_has_a_page():
    documented = documented_names()
    objects = {id(found) for found in documented.values()}
    missing = [name for name, found in public_names().items() if name not in documented and id(found) not in objects]
    assert not missing
    assert len(documented) > 60


def test_no_name_has_two_pages():
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.md"))
    names = re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE)
    assert sorted(set(names)) == sorted(names)


def test_the_page_on_citing_has_the_cards_entry_and_the_files_fields():
    from d_emo.train.engine.cards import CITATIONS

    page = (DOCS / "citing.md").read_text(encoding="utf-8")
    assert CITATIONS["EMOv2"] in page
    assert CITATIONS["EMOv2"] in read_document("README.md")
    title = re.search(r'^title: "(.*)"$', (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    entry = re.sub(r"[{}\\]", "", page)
    assert title and f"title   = {title[1]}," in entry


@pytest.fixture(scope="module")
def hooks() -> Any:
    """The module that mkdocs.yml names."""
    pytest.importorskip("mkdocs", reason="needs the extra site")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / ".ci" / "site_hooks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/a.js"></script>',
        "<script async src=//cdn.example/a.js></script>",
        '<img alt="x" src="http://example.org/a.png">',
        '<link rel="stylesheet" href="https://fonts.example/css">',
        '<link href="https://fonts.example" rel="preconnect">',
        '<style>@import "https://fonts.example/css";</style>',
        '<div style="background: url(https://example.org/a.png)"></div>',
        '<iframe src="https://example.org"></iframe>',
    ],
)
def test_a_page_that_loads_from_elsewhere_is_found(hooks, text):
    assert len(hooks.foreign_loads(text, ".html")) == 1


def test_links_and_own_files_are_no_foreign_loads(hooks):
    text = """<a href="https://arxiv.org">x</a><script src="../assets/a.js"></script><img src="digits.png">
    <link rel="canonical" href="https://example.org/"><link rel="stylesheet" href="assets/a.css">"""
    assert hooks.foreign_loads(text, ".html") == []
    assert hooks.foreign_loads("a { background: url(data:image/svg+xml;x) } b { src: url('a.woff2') }", ".css") == []
    assert hooks.foreign_loads("@font-face { src: url('https://fonts.example/a.woff2') }", ".css")


def test_links_are_those_of_the_site(hooks):
    kit = "eval/benchmarks/gpu/README.md"
    assert hooks.relinked(f"[a](../{kit}#x)", "docs/speed.md", "speed.md") == f"[a]({kit}#x)"
    assert hooks.relinked("[a](docs/dense.md)", "CHANGELOG.md", "CHANGELOG.md") == "[a](dense.md)"
    network = "eval/benchmarks/gpu/cifar10_ti2/README.md"
    assert hooks.relinked("[a](../README.md)", network, network) == "[a](../README.md)"
    assert hooks.relinked("[a](../fid.md) [b](#c)", "docs/how_to/x.md", "how_to/x.md") == "[a](../fid.md) [b](#c)"
    assert hooks.relinked("[a](https://x.org/y)", "docs/x.md", "x.md") == "[a](https://x.org/y)"
    assert hooks.relinked("```\n[a](docs/b)\n```", "CHANGELOG.md", "CHANGELOG.md") == "```\n[a](docs/b)\n```"


def test_the_page_of_commands_has_every_option(hooks):
    page = hooks.commands_page()
    for name in COMMANDS:
        assert f"\n### d-emo {name}\n" in page
    for option in ("--min-snr-gamma", "--sweep", "--report-to", "--formats"):
        assert f"| `{option}` |" in page
    assert not [line for line in page.splitlines() if line.startswith("|") and line.count("|") != 3]


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_without_a_network(tmp_path):
    pytest.importorskip("mkdocstrings", reason="needs the extra site")
    nowhere = "http://127.0.0.1:9"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "http_proxy": nowhere, "https_proxy": nowhere}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {
        path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")
    }
    ids = {name for page in pages.values() for name in re.findall(r'\bid="([\w.]+)"', page)}
    assert set(documented_names()) <= ids
    for name, page in pages.items():
        for target in re.findall(r'<img[^>]* src="([^":]+)"', page):
            assert (tmp_path / name).parent.joinpath(target).is_file(), f"{name}: {target}"
    index = json.loads((tmp_path / "search" / "search_index.json").read_text(encoding="utf-8"))
    texts = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {"faq.html", "how_to/lora.html", "reference/pipelines.html", "explanation/block.html"} <= texts
