"""Saving, whatever is trained: checkpoints on the way, the result at the end."""

from pathlib import Path

from safetensors import SafetensorError

from d_emo.common.messages import first_line
from d_emo.train.data import stream_loader
from d_emo.train.engine import checkpoints, state
from d_emo.train.engine.run import AnyRun, UnfinishedError


def save(run: AnyRun) -> None:
    """Write a checkpoint, then delete the older ones that the user does not keep; every process calls this."""
    accelerator, options = run.accelerator, run.plan.config.run

    def write_state(folder: Path) -> None:
        state.save_state(run, folder)
        if run.plan.source.stream is not None:
            stream_loader.save_place(folder, accelerator, run.place)
        run.save_state(folder)

    card = run.card(checkpoints.checkpoint_path(run.output_dir, run.step))
    path = checkpoints.save_checkpoint(
        accelerator, run.result(), run.output_dir, run.step, card, run.identity(), write_state, run.save_more
    )
    run.report(f"saved {path}")
    if accelerator.is_main_process:
        checkpoints.prune_checkpoints(run.output_dir, options.keep_checkpoints, options.keep_every)


def publish(run: AnyRun, index_name: str) -> None:
    """Save the result into the run's folder itself; every process calls this.

    `index_name` is the file without which the folder does not load.
    """
    result = run.result()
    if not run.accelerator.is_main_process:
        return
    try:
        card = run.card(run.output_dir)
        checkpoints.publish_pipeline(result, run.output_dir, card, run.save_more, index_name)
    except (OSError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise UnfinishedError(
            f"the result cannot be written into --output-dir {run.output_dir} ({reason}). The last checkpoint is whole "
            "and holds the same; make room, and run the command again with --resume-from latest."
        ) from error
