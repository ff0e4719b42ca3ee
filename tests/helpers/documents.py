"""The documents of the repository, and what of their text is code."""

import re

from helpers.paths import ROOT

_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", flags=re.MULTILINE | re.DOTALL)

# As paths from the top: the README and its like, all of docs/, and READMEs beside code.
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md"),
    *sorted(path.relative_to(ROOT).as_posix() for top in ("docs", "eval") for path in (ROOT / top).rglob("*.md")),
]


def read_document(name: str) -> str:
    """A document's text."""
    return (ROOT / name).read_text(encoding="utf-8")


def code_blocks(text: str, *languages: str) -> list[str]:
    """A document's blocks of code in these languages."""
    return [code for language, code in _BLOCK.findall(text) if language in languages]


def without_blocks(text: str) -> str:
    """A document without its blocks of code."""
    return _BLOCK.sub("", text)
