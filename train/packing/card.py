"""The card of a packaged model: its run's, with what it is good for, its scores, and the command that made it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from d_emo.train.engine.cards import card_head, usage
from d_emo.train.packing.recipes import Recipe

LICENCE = "apache-2.0"


def packaged_card(
    run_card: str, name: str, recipe: Recipe, example: tuple[str, ...], scores: list[str], size: int, seed: int
) -> str:
    """A README.md in the Hub's format.

    Args:
        run_card: what the trainer wrote.
        name: of the packaged model.
        recipe: of it.
        example: lines of code.
        scores: lines of the section on them.
        size: bytes of the folder's weights.
        seed: of the training.
    """
    fields = {"license": LICENCE, **yaml.safe_load(run_card.split("---\n")[1])}
    for result in fields.get("model-index", ()):
        result["name"] = name
    title = next(line for line in run_card.splitlines() if line.startswith("# "))
    data = "Data: " + _between(run_card, "\nData: ", "\n")
    trained, works = _between(run_card, "\n## How it was trained\n", "\n## "), _between(run_card, "\n## Citation\n")
    lines = [
        *card_head({**fields, "license": LICENCE}, f"{name}{title[title.index(':') :]}"),
        f"This model comes with the package d_emo as `{name}`, {size / 1e6:.1f} MB: averaged weights and BatchNorm "
        "statistics, saved by `d_emo.save_float16` in float16, with BatchNorm and fixed positions in float32. It loads "
        "as float32.",
        "",
        recipe.good_for,
        "",
        *usage(example),
        data,
        "",
        "## Scores",
        "",
        *scores,
        "",
        "## How it was made",
        "",
        "This command, in a checkout, trains, saves, scores and writes this page:",
        "",
        "```bash",
        f"python train/make_packaged.py {name} --output-dir {name}",
        "```",
        "",
        f"Its settings are `{Path('train/configs') / recipe.config}`; the training alone:",
        "",
        trained.strip(),
        "",
        f"Seed {seed}. {recipe.remark}".strip(),
        "",
        "## Licence",
        "",
        recipe.licence,
        "",
        "## Citation",
        "",
        works.strip(),
    ]
    return "\n".join(lines).rstrip() + "\n"


def score_table(rows: Mapping[str, Sequence[str]]) -> list[str]:
    """What is packaged beside what it was made of, in lines: by a score's name, its two values as text."""
    return [
        "| | this folder (float16) | as trained (float32) |",
        "|---|---|---|",
        *(f"| {name} | {' | '.join(values)} |" for name, values in rows.items()),
    ]


def _between(text: str, start: str, end: str = "") -> str:
    """What stands between two marks; without the second, to the end."""
    found = text[text.index(start) + len(start) :]
    return found[: found.index(end)] if end else found
