"""Saving, whatever is trained: checkpoints on the way, the result at the end."""

from pathlib import Path

from d_emo.train.data import stream_loader
from d_emo.train.engine import checkpoints
from d_emo.train.engine.run import AnyRun


def save(run: AnyRun) -> None:
    """Write a checkpoint, then delete the older ones that the user does not keep; every process calls this."""
    accelerator, options = run.accelerator, run.plan.config.run

    def write_more(folder: Path) -> None:
        state = folder / checkpoints.STATE_FOLDER
        if run.plan.source.stream is not None:
            stream_loader.save_place(state, accelerator, run.place)
        run.save_state(state)
        if accelerator.is_main_process:
            run.save_more(folder)

    card = run.card(checkpoints.checkpoint_path(run.output_dir, run.step))
    path = checkpoints.save_checkpoint(accelerator, run.result(), run.output_dir, run.step, card, write_more)
    run.report(f"saved {path}")
    if accelerator.is_main_process:
        checkpoints.prune_checkpoints(run.output_dir, options.keep_checkpoints, options.keep_every)


def publish(run: AnyRun, index_name: str) -> None:
    """Save the result into the run's folder itself; every process calls this.

    `index_name` is the file without which the folder does not load.
    """
    result = run.result()
    if run.accelerator.is_main_process:
        checkpoints.publish_pipeline(result, run.output_dir, run.card(run.output_dir), run.save_more, index_name)
