"""What people look at: one HTML page that needs nothing else, and the curve of FID over training."""

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from d_emo.common.files import written_whole
from d_emo.common.output import say
from d_emo.eval.fid.by_class import table_lines
from d_emo.eval.fid.evaluation import GRID_FILE, NEIGHBOURS_FILE, SCORES_FILE
from d_emo.eval.fid.protocol import PUBLISHED_STEPS
from d_emo.eval.fid.scoring import TITLES, Scores, all_features, all_notes, load_scores, show_score, title
from d_emo.eval.reports.page import write_document


@dataclass(frozen=True)
class Entry:
    """One evaluation in a report.

    Attributes:
        name: what was scored.
        step: optimizer steps of the checkpoint, if it is one.
        scores: its scores.
        folder: where its pictures are.
    """

    name: str
    step: int | None
    scores: Scores
    folder: Path

    @property
    def extractor(self) -> str:
        """Name of the features."""
        return self.scores.features

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.scores.count


def load_entries(folder: Path, name: str) -> list[Entry]:
    """The evaluations in `folder/step-STEP`, by step; damaged ones are left out, aloud."""
    entries = []
    for path in sorted(folder.glob(f"step-*/{SCORES_FILE}")):
        step = path.parent.name.removeprefix("step-")
        try:
            if step.isdecimal():
                entries.append(Entry(name, int(step), load_scores(path), path.parent))
        except ValueError as error:
            say(f"left out: {error}")
    return sorted(entries, key=lambda entry: entry.step or 0)


def write_report(
    path: Path, heading: str, entries: Sequence[Entry], curve: Path | None = None, sweep: tuple[Path, str] | None = None
) -> None:
    """Write a page with the scores of all entries, and with the pictures and conditions of the last one.

    Args:
        path: the .html file.
        heading: its title.
        entries: in the order to show; at least one.
        curve: PNG of FID over training.
        sweep: PNG of the distance over what was swept, and the table of its points.
    """
    last = entries[-1]
    parts = [_verdict(last.scores), *_score_tables(entries)]
    if sweep is not None:
        parts += ["<h2>Swept</h2>", _image(sweep[0], "distance over what was swept")]
        parts.append(f"<pre>{html.escape(sweep[1])}</pre>")
    for scores in all_features(last.scores):
        if scores.by_class:
            items = "".join(f"<li>{html.escape(line)}</li>" for line in table_lines(scores.by_class))
            distance = html.escape(title("fid", scores.features, scores.count))
            parts.append(f"<h2>{distance} by class</h2><ul>{items}</ul>")
    if curve is not None:
        parts += ["<h2>Over training</h2>", _image(curve, "scores over training")]
    if lines := [f"{name} was left out: {why}" for name, why in last.scores.left_out.items()] + all_notes(last.scores):
        parts += ["<h2>Notes</h2>", "<ul>", *(f"<li>{html.escape(line)}</li>" for line in lines), "</ul>"]
    for file, name in ((GRID_FILE, "Samples by class"), (NEIGHBOURS_FILE, "Nearest images of the reference")):
        if (last.folder / file).is_file():
            parts += [f"<h2>{name}</h2>", _image(last.folder / file, name)]
    protocol = f"{last.scores.conditions['protocol']}; reference {last.scores.conditions['reference']['name']}"
    conditions = html.escape(json.dumps(last.scores.conditions, indent=1))
    parts += ["<h2>Conditions</h2>", f"<p>{html.escape(protocol)}</p>", f"<pre>{conditions}</pre>"]
    write_document(path, heading, parts)


def _verdict(scores: Scores) -> str:
    if not scores.not_comparable:
        return '<p class="verdict good">Conditions as published; compatible with ADM\'s evaluator by construction.</p>'
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in scores.not_comparable)
    return f'<div class="verdict">Not comparable with published figures:<ul>{reasons}</ul></div>'


def _score_tables(entries: Sequence[Entry]) -> list[str]:
    """A table for each of the features, the entries in its rows."""
    tables = []
    for features in [scores.features for scores in all_features(entries[-1].scores)]:
        found = [
            (entry.name, one) for entry in entries for one in all_features(entry.scores) if one.features == features
        ]
        shown = [name for name in TITLES if any(name in scores.values for _, scores in found)]
        head = "".join(f"<th>{html.escape(title(name, features, entries[-1].count))}</th>" for name in shown)
        rows = []
        for name, scores in found:
            cells = "".join(f'<td class="number">{_number(scores, metric)}</td>' for metric in shown)
            rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
        tables.append(f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>")
    return tables


def _number(scores: Scores, name: str) -> str:
    if name not in scores.values:
        return "&ndash;"
    return show_score(scores, name).replace("+-", "&plusmn;")


def _image(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{html.escape(description)}" src="data:image/png;base64,{data}"></p>'


def plot_curve(path: Path, entries: Sequence[Entry], published: float | None, name: str) -> None:
    """Draw the first score of each entry against its step, and the published figure at 400K steps if there is one."""
    from matplotlib.figure import Figure

    metric = next(metric for metric in TITLES if metric in entries[-1].scores.values)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    points = [(entry.step, entry.scores.values[metric]) for entry in entries if entry.step is not None]
    axes.plot(*zip(*points, strict=True), marker="o", label=name)
    if published is not None:
        axes.plot(
            PUBLISHED_STEPS, published, marker="*", markersize=14, linestyle="none", label="published, 400K steps"
        )
        axes.legend()
    axes.set(xlabel="optimizer step", ylabel=title(metric, entries[-1].extractor, entries[-1].count), title=name)
    axes.set_ylim(0, 1.1 * max([value for _, value in points] + ([published] if published else [])))
    axes.grid(alpha=0.3)
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
