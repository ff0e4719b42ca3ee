"""Pipelines of averages that are made of a run's snapshots; the command is `train/choose_average.py`."""

import argparse
import json
import re
from pathlib import Path

from d_emo.common.files import check_replaceable, check_writable, written_folder
from d_emo.common.options import blamed
from d_emo.common.output import say
from d_emo.common.snapshots import Chosen, choose, list_snapshots, put_into
from d_emo.pipelines import open_pipeline
from d_emo.train.engine.cards import usage
from d_emo.train.engine.checkpoints import CARD, list_checkpoints

INDEX = "model_index.json"
# Of a profile; beyond it what is made is another average than what was asked for.
LARGE_ERROR = 0.05


def choose_averages(options: argparse.Namespace) -> None:
    """Write a pipeline for each length, whole or not at all, and say how near its profile is.

    Raises:
        ValueError: the run has no snapshots or no pipeline, or a folder holds something else.
    """
    run = Path(options.run)
    snapshots = list_snapshots(run)
    with blamed("--step"):
        chosen = [choose(snapshots, length, options.step) for length in dict.fromkeys(options.length)]
    base = pipeline_of(run)
    pipeline = open_pipeline(str(base))
    targets = [Path(options.output_dir or run) / f"average-{one.profile.length:g}" for one in chosen]
    if options.output_dir:
        check_writable(Path(options.output_dir), "--output-dir", folder=True)
    for target in targets:
        check_replaceable(target, "--output-dir", INDEX, "pipeline")
    for one, target in zip(chosen, targets, strict=True):
        put_into(pipeline.transformer, one)
        with written_folder(target) as partial:
            pipeline.save_pretrained(partial)
            card = card_of(base, one, target)
            (partial / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")
        say(f"{target}: {describe(one)}")
        if one.combination.error > LARGE_ERROR:
            say("  note: a profile that far off is another average; a lower --snapshot-every has more to make it of.")


def pipeline_of(run: Path) -> Path:
    """The folder of a run that holds its pipeline: its own, or its newest checkpoint.

    Raises:
        ValueError: there is none yet.
    """
    folders = [run, *reversed(list_checkpoints(run))]
    found = next((folder for folder in folders if (folder / INDEX).is_file()), None)
    if found is None:
        raise ValueError(f"{run} has snapshots, but no pipeline and no checkpoint yet; wait for its first one.")
    return found


def describe(chosen: Chosen) -> str:
    """What an average is, for people."""
    files = len({snapshot.path for snapshot, _ in chosen.sources})
    return (
        f"power-function average of relative length {chosen.profile.length:g} at step {chosen.profile.step:,}, of "
        f"{files} snapshots; its profile is {chosen.combination.error:.2%} off, and rounding to float16 moves weights "
        f"by {chosen.rounding:.2%}"
    )


def card_of(base: Path, chosen: Chosen, folder: Path) -> str:
    """The card of the run's pipeline, as that of an average of it."""
    said = f"This folder holds a **{describe(chosen)}** (arXiv 2312.02696), made by `d_emo.train.choose_average`."
    if not (base / CARD).is_file():
        name = json.dumps(str(folder))
        code = ["from d_emo import DEMOPipeline", "", f"pipe = DEMOPipeline.from_pretrained({name})"]
        return "\n".join([f"# {folder.name}", "", said, "", *usage(code)])
    card = (base / CARD).read_text(encoding="utf-8", errors="replace")
    card = re.sub(r"^!\[[^\n]*\n+", "", card, flags=re.M)  # a picture of other weights
    more = f", average {chosen.profile.length:g}"
    card = re.sub(r"^# [^\n]*$", lambda title: title[0] + more, card, count=1, flags=re.M)
    card, count = re.subn(r"^This folder holds [^\n]*$", lambda _: said, card, count=1, flags=re.M)
    loads = json.dumps(folder.as_posix())
    card = re.sub(r"from_pretrained\(\"[^\n]*\"\)", lambda _: f"from_pretrained({loads})", card)
    return card if count else f"{card}\n{said}\n"
