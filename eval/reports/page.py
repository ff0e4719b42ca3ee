"""One HTML page that needs nothing else: what was measured, tables, and pictures with the worst first.

The page holds its pictures itself, runs no scripts and loads nothing (its own policy forbids both), and is readable on
light and on dark screens. Every text is escaped: names of files and classes come from anywhere.
"""

import base64
import html
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from d_emo.common.files import written_whole
from d_emo.common.messages import printable

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #222; --quiet: #666; --line: #d8d8d8; --box: #f6f6f6;
  --bad: #fff6dd; --bad-line: #d9a400; --good: #e8f5e9; --good-line: #2e7d32; }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --text: #e4e4e4; --quiet: #a0a0a0; --line: #3a3d42;
  --box: #22252a; --bad: #3a3010; --bad-line: #d9a400; --good: #17301a; --good-line: #66bb6a; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--text); background: var(--page); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow: auto; max-height: 40rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .9rem .25rem 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid var(--quiet); } td, th[scope=row] { border-bottom: 1px solid var(--line); }
.number { font-variant-numeric: tabular-nums; text-align: right; }
.verdict { padding: .6rem .9rem; background: var(--bad); border-left: 4px solid var(--bad-line); }
.verdict.good { background: var(--good); border-color: var(--good-line); }
figure { margin: 1rem 0 1.5rem; overflow-x: auto; } figcaption { color: var(--quiet); overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; } figure img { max-width: max(100%, 40rem); }
pre { background: var(--box); padding: .8rem; overflow: auto; font-size: 12px; }
"""
# No scripts, nothing from elsewhere: what a browser enforces, whatever stands in the page.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Pictures are kept as JPEG of this quality, colours at full resolution, where that is smaller than PNG.
JPEG_QUALITY = 90


@dataclass(frozen=True)
class Tile:
    """A picture of a page.

    Attributes:
        picture: what is shown.
        caption: beneath it, for people; the score stands after it.
        score: the higher the better; None or NaN where there is none, which comes last.
    """

    picture: PIL.Image.Image
    caption: str
    score: float | None = None

    @property
    def is_scored(self) -> bool:
        """Whether it has a place in the order."""
        return self.score is not None and not math.isnan(self.score)


@dataclass(frozen=True)
class Table:
    """A table of a page.

    Attributes:
        title: above it; may be empty.
        columns: their names.
        rows: a cell a column. Floats are shown with two decimals, NaN as a dash; texts as they are.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


def write_page(
    path: Path,
    title: str,
    about: Mapping[str, Any],
    tables: Sequence[Table],
    pictures: Sequence[Tile],
    *,
    score_name: str = "score",
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write a report.

    Args:
        path: the .html file; it appears whole, or not at all.
        title: its heading.
        about: what was measured on what, a line each.
        tables: in their order.
        pictures: in any order; those with the lowest score come first.
        score_name: what the pictures' score is.
        options: of the command, for the page's end.
    """
    parts = []
    if about:
        rows = "".join(
            f'<tr><th scope="row">{escaped(name)}</th><td>{_cell(value)}</td></tr>' for name, value in about.items()
        )
        parts.append(f'<div class="wide"><table>{rows}</table></div>')
    parts += [table_html(table) for table in tables]
    if pictures:
        ordered = worst_first(pictures)
        order = f", the lowest {score_name} first" if ordered[0].is_scored else ""
        parts.append(f"<h2>Pictures{escaped(order)}</h2>")
        parts += [_figure(tile, score_name) for tile in ordered]
    if options:
        content = json.dumps(dict(options), indent=1, default=str)
        parts.append(f"<h2>Options</h2>\n<pre>{escaped(content, lines=True)}</pre>")
    write_document(path, title, parts)


def worst_first(pictures: Sequence[Tile]) -> list[Tile]:
    """The tiles by their score, the lowest first; of equal ones, and of those without a score, in the order given."""
    return sorted(pictures, key=lambda tile: (not tile.is_scored, tile.score if tile.is_scored else 0))


class WorstTiles:
    """The tiles with the lowest scores of many, of which only those are made that are kept so far.

    Args:
        count: how many are kept.
    """

    def __init__(self, count: int):
        self.count = count
        self.tiles: list[Tile] = []

    def offer(self, score: float, make: Callable[[], Tile]) -> None:
        """Keep a tile, made by `make` with this score, if it is among the worst; NaN never is."""
        if math.isnan(score) or not self.count:
            return
        if len(self.tiles) < self.count or score < (self.tiles[-1].score or 0):
            self.tiles = worst_first([*self.tiles, make()])[: self.count]


def write_document(path: Path, heading: str, parts: Sequence[str]) -> None:
    """Write a page of parts in HTML under a heading, whole.

    Args:
        path: the .html file.
        heading: a text, escaped here.
        parts: HTML, escaped already.
    """
    title = escaped(heading)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    with written_whole(path) as partial:
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")


def escaped(text: Any, lines: bool = False) -> str:
    """A text as HTML shows it as it is, control characters and broken bytes escaped; `lines` keeps line breaks."""
    if lines:
        return "\n".join(html.escape(printable(line)) for line in str(text).split("\n"))
    return html.escape(printable(str(text)))


def table_html(table: Table) -> str:
    """A table in HTML; columns of numbers are aligned to the right."""
    head = "".join(
        f"<th{_aligned([row[column] for row in table.rows])}>{escaped(name)}</th>"
        for column, name in enumerate(table.columns)
    )
    rows = "".join(
        "<tr>" + "".join(f"<td{_aligned([value])}>{_cell(value)}</td>" for value in row) + "</tr>" for row in table.rows
    )
    heading = f"<h2>{escaped(table.title)}</h2>\n" if table.title else ""
    return f'{heading}<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def picture_html(picture: PIL.Image.Image, description: str) -> str:
    """A picture that the page itself holds, as PNG or JPEG, whichever is smaller."""
    files = {}
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.save(png, format="PNG")
    picture.convert("RGB").save(jpeg, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    files = {"png": png.getvalue(), "jpeg": jpeg.getvalue()}
    kind = min(files, key=lambda name: len(files[name]))
    data = base64.b64encode(files[kind]).decode()
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<img alt="{escaped(description)}" {size} src="data:image/{kind};base64,{data}">'


def _figure(tile: Tile, score_name: str) -> str:
    score = f" &middot; {escaped(score_name)} {tile.score:.3f}" if tile.is_scored else ""
    return (
        f"<figure>{picture_html(tile.picture, tile.caption)}"
        f"<figcaption>{escaped(tile.caption)}{score}</figcaption></figure>"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _aligned(values: Sequence[Any]) -> str:
    return ' class="number"' if values and all(map(_is_number, values)) else ""


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2f}" if math.isfinite(value) else "&ndash;"
    return f"{value:,}" if _is_number(value) else escaped(value)
