"""docs/licences.md: a row for every dependency and none else, with the licence that the installed package states.

And the table of extras in docs/first_steps.md."""

import importlib.metadata
import re

import pytest
from helpers.documents import read_document
from helpers.project import distribution, included, project, requirements

# How packages write their licences, by the names of SPDX (PSF: matplotlib's own words after Python's licence).
SAID = {
    "Apache-2.0": r"Apache",
    "BSD-2-Clause": r"BSD[- ]2|FreeBSD",
    "BSD-3-Clause": r"BSD[- ]3|^BSD(?: License)?$",
    "ISC": r"\bISC\b",
    "MIT": r"\bMIT\b(?!-CMU)",
    "MIT-CMU": r"MIT-CMU|HPND",
    "MPL-2.0": r"MPL|Mozilla",
    "PSF": r"Python Software Foundation|\bPSF\b",
}
ROW = re.compile(r"^\| ([\w.-]+) \| ([^|]+) \| ([\w -]*?) ?\| ([^|]+) \|$", flags=re.MULTILINE)


def rows() -> dict[str, tuple[str, str]]:
    """Licence and extra by package, as the document has them."""
    found = [row for row in ROW.findall(read_document("docs/licences.md")) if row[0] != "package"]
    assert len(found) == len({name for name, *_ in found})
    return {name: (licence, extra) for name, licence, extra, _ in found}


def test_every_dependency_has_its_row_and_no_row_is_left_over():
    named = [(distribution(line), extra) for extra, lines in requirements().items() for line in lines]
    named += [(distribution(line), "to build") for line in project()["build-system"]["requires"]]
    assert {name: extra for name, (_, extra) in rows().items()} == dict(named)


def stated(name: str) -> list[str]:
    """What an installed package says of its licence: the expression, or the words and titles in place of one."""
    about = importlib.metadata.distribution(name)
    if expression := about.metadata.get("License-Expression"):
        return re.split(r" AND | OR | WITH ", expression)
    files = [path for path in about.files or () if re.search(r"licen[cs]e", path.name, flags=re.IGNORECASE)]
    texts = [about.metadata.get("License") or "", *(path.locate().read_text(encoding="utf-8") for path in files)]
    classifiers = [entry for entry in about.metadata.get_all("Classifier") or [] if entry.startswith("License ::")]
    return [line.strip() for text in texts for line in text.strip().split("\n")[:1]] + classifiers


@pytest.mark.parametrize("name", rows())
def test_the_licence_is_what_the_package_says(name):
    try:
        said = stated(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed (extra {rows()[name][1]})")
    licence = rows()[name][0]
    known = [spdx for spdx in SAID if re.search(rf"(?<![\w-]){re.escape(spdx)}(?![\w-])", licence)]
    assert known, licence
    for spdx in known:
        assert any(re.search(SAID[spdx], words) for words in said), (licence, said)


def test_the_table_of_extras_names_each_and_the_extras_that_it_brings():
    lines = re.findall(
        r"^\| `([\w-]+)` \| [^|]+ \| ([^|]+) \|$", read_document("docs/first_steps.md"), flags=re.MULTILINE
    )
    brought = {extra: {extra, *re.findall(r"`([\w-]+)`", cell)} for extra, cell in lines}
    direct = {extra: included(extra) | {extra} for extra in project()["project"]["optional-dependencies"]}
    assert brought == direct
