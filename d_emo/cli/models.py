"""What there is by name: models that come with the package, trained, and networks that are made with fresh weights.

    d-emo models
    d-emo models --pattern "D-EMOv2-*" "EMOv2-5M"

Parameters are those of a network as its function makes it: 1,000 classes, of segmenters 150 (U-EMOv2 and UNet: 2) under
DeepLabv3's head, of video classifiers 400. No weights are made to count them.
"""

import fnmatch
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import d_emo
from d_emo.common.command_line import CommandParser
from d_emo.common.commands import CommandError, command
from d_emo.common.output import say
from d_emo.common.packaged import list_packaged, packaged

# Name of the function that makes a network, and of the one that lists them, by what they are.
MADE = {
    "diffusion": ("create_model", "list_models"),
    "classifiers": ("create_classifier", "list_classifiers"),
    "segmenters": ("create_segmenter", "list_segmenters"),
    "video classifiers": ("create_video_classifier", "list_video_classifiers"),
}


@command("models")
def main(arguments: list[str]) -> None:
    """Print the tables."""
    parser = CommandParser("models", __doc__)
    parser.add_argument("--pattern", nargs="+", default=["*"], help="Shell patterns of names.")
    options = parser.parse_args(arguments)
    found = 0
    for title, rows in tables(options.pattern):
        for number, row in enumerate(rows):
            found += 1
            if not number:
                say(f"{title}:")
            say(f"  {row}")
    if not found:
        raise CommandError(f"--pattern {' '.join(options.pattern)}: no name matches; leave it out to see all.")


def tables(patterns: list[str]) -> Iterator[tuple[str, Iterator[str]]]:
    """Titles and lines, made as they are asked for."""
    kept = [name for name in list_packaged() if _matches(name, patterns)]
    yield "packaged, trained (d_emo.packaged(NAME))", (f"{name:<24} {_kind(packaged(name))}" for name in kept)
    for kind, (make, names) in MADE.items():
        chosen = [name for name in getattr(d_emo, names)() if _matches(name, patterns)]
        yield f"{kind} (d_emo.{make}(NAME))", (_counted(name, getattr(d_emo, make)) for name in chosen)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _counted(name: str, make: Callable[[str], Any]) -> str:
    """A network's line; its weights exist in name only."""
    import torch

    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in make(name).parameters())
    return f"{name:<24} {parameters:>13,} parameters"


def _kind(folder: Path) -> str:
    """What a packaged folder is, as its own small file says."""
    for mark in ("model_index.json", "config.json"):
        if (folder / mark).is_file():
            content = json.loads((folder / mark).read_text(encoding="utf-8"))
            return str(content.get("_class_name") or (content.get("architectures") or [content.get("model_type")])[0])
    return "a model"
