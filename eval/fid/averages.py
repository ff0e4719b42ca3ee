"""Averages of a run that are made of its snapshots, for the evaluator: --ema, and `ema=` of a sweep."""

from pathlib import Path

from d_emo.common.options import blamed
from d_emo.common.snapshots import Snapshot, choose, list_snapshots, put_into
from d_emo.eval.fid.protocol import SamplingSettings
from d_emo.pipelines import DEMOPipeline

CHECKPOINT = "checkpoint-"


def apply_average(pipeline: DEMOPipeline, model: str, settings: SamplingSettings) -> None:
    """Give a pipeline the average that the settings name, if they do.

    Args:
        pipeline: of the model; of any type.
        model: folder of a run with snapshots, or one of its checkpoints, which stands for its step.
        settings: with `ema`.

    Raises:
        ValueError: there are no such snapshots.
    """
    if settings.ema is None:
        return
    if settings.weights == "raw":
        raise ValueError(f"--ema {settings.ema:g}: an average is not of --weights raw; leave one of them out.")
    with blamed(f"--ema {settings.ema:g}"):
        snapshots, step = _snapshots_of(Path(model))
        put_into(pipeline.transformer, choose(snapshots, settings.ema, step))


def _snapshots_of(model: Path) -> tuple[list[Snapshot], int | None]:
    step = model.name.removeprefix(CHECKPOINT)
    if step == model.name or not step.isdecimal():
        return list_snapshots(model), None
    return list_snapshots(model.absolute().parent), int(step)
