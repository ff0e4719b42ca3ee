"""Tutorials as notebooks: `python .ci/notebooks.py` makes docs/tutorials/NAME.ipynb of the pages below.

A page's text becomes cells of Markdown, its blocks of Python and shell become cells of code, and a block of text that
follows one is what it printed.
"""

import json
import re
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
NOTEBOOKS = ("your_own_pictures", "imagenet_on_a_cluster")
_BLOCK = re.compile(r"^```(python|bash|text)\n(.*?)\n```\n", flags=re.MULTILINE | re.DOTALL)
# A page's word of its notebook, which the notebook leaves out.
_OF_ITSELF = re.compile(r"\s+The page is also\s+\[a notebook\]\([^)]*\)[^.]*\.")


def notebook(page: str) -> str:
    """A page of Markdown as the text of a notebook."""
    cells: list[dict[str, Any]] = []
    parts = _BLOCK.split(_OF_ITSELF.sub("", page))
    for text, language, code in zip(parts[::3], [*parts[1::3], ""], [*parts[2::3], ""], strict=True):
        if text.strip():
            cells.append({"cell_type": "markdown", "metadata": {}, "source": lines(text.strip("\n"))})
        if language == "text":
            cells[-1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": lines(code + "\n")}]
        elif language:
            source = lines(code if language == "python" else f"%%bash\n{code}")
            cells.append(
                {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": source}
            )
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    named = [{"id": f"cell-{number}", **cell} for number, cell in enumerate(cells)]
    return json.dumps({"cells": named, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


def lines(text: str) -> list[str]:
    """A text as notebooks keep it: lines with their ends."""
    return text.splitlines(keepends=True)


if __name__ == "__main__":
    for name in NOTEBOOKS:
        page = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
        (TUTORIALS / f"{name}.ipynb").write_text(notebook(page), encoding="utf-8")
