"""The loop of every trainer: steps, log lines, checkpoints, orderly stops. What is learned comes as functions."""

import contextlib
import math
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch.distributed.tensor import DTensor

from d_emo.common.messages import describe_os_error
from d_emo.common.output import Progress, reader_gone, say
from d_emo.common.processes import end_workers, is_dead_worker
from d_emo.images.decode import UnreadableImageError
from d_emo.train.data.batches import Batch
from d_emo.train.engine import loader, saving
from d_emo.train.engine.batch_norm import average_statistics
from d_emo.train.engine.finite import Judged
from d_emo.train.engine.log import log_progress
from d_emo.train.engine.run import AnyRun, NonFiniteLossError, UnfinishedError
from d_emo.train.engine.stopping import StopRequest

# The mean loss of a micro batch.
BatchLoss = Callable[[Batch], torch.Tensor]


def run_to_the_end(run: AnyRun, train: Callable[[], int]) -> None:
    """Train; a stop ends with the shell's code for its signal.

    Raises:
        UnfinishedError: the system refuses something, such as room on the disk.
        LoaderError: a process or thread that reads data failed.
    """
    others = multiprocessing.active_children()
    try:
        code = train()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UnfinishedError(
            f"step {run.step}: {describe_os_error(error)}. Checkpoints in --output-dir {run.output_dir} are whole; "
            "continue with --resume-from latest."
        ) from error
    except RuntimeError as error:
        if not is_dead_worker(error):
            raise
        raise loader.loader_error(run, error) from error
    finally:
        with contextlib.suppress(OSError):  # a tracker's, on a full disk
            run.accelerator.end_training()
        end_workers(others)
    if code:
        sys.exit(code)


def train_until_done(
    run: AnyRun,
    batches: Iterator[Batch],
    batch_loss: BatchLoss,
    *,
    show: Callable[[], None],
    score: Callable[[], None],
) -> int | None:
    """Step until the end, or until the user interrupts.

    Args:
        run: what is trained.
        batches: the rest of its micro batches.
        batch_loss: the mean loss of one of them, with its graph.
        show: called after every step, before a checkpoint of it.
        score: called after every step, after a checkpoint of it, unless the run is stopping.

    Returns:
        None at the end; or the shell's code for the signal that stopped the run, which was saved.
    """
    options, accelerator, last = run.plan.config.run, run.accelerator, run.plan.max_train_steps
    main = accelerator.is_main_process
    with (
        StopRequest() as stop,
        reader_gone(stop.because_nobody_reads),
        Progress(last, "step", done=run.step, shown=main, lines=False) as progress,
    ):
        shown = run.step
        while run.step < last:
            started = time.perf_counter()
            loss, grad_norm = train_step(run, batches, batch_loss)
            stopping = stop.agreed(accelerator)
            due = stopping or run.step == last or run.step % options.checkpoint_every == 0
            # A line before every checkpoint, so that a resumed run has no losses of half an interval to remember.
            line = due or run.step % options.log_every == 0
            if line:
                refuse_bad_step(run)  # waits for the device, so that the seconds are those of whole steps
            run.seconds += time.perf_counter() - started
            if line or not run.finite.deferred:
                progress.update(run.step - shown, loss=f"{loss.item():.4f}", grad=f"{float(grad_norm):.2f}")
                shown = run.step
            if line:
                log_progress(run, float(grad_norm))
            show()
            if due:
                saving.save(run)
            if stopping:
                run.report("stopped; continue with --resume-from latest")
                return stop.exit_code
            score()
    return None


def train_step(run: AnyRun, batches: Iterator[Batch], batch_loss: BatchLoss) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over its micro batches.

    Args:
        run: what is trained.
        batches: micro batches.
        batch_loss: the mean loss of one of them, with its graph.

    Returns:
        This process's mean loss, and the gradient's norm over all processes, both on the device.

    Raises:
        NonFiniteLossError: before the weights change; on accelerators `refuse_bad_step` raises it later.
        UnreadableImageError: a batch holds an unreadable image and the user chose to stop.
        LoaderError: a loader process died.
    """
    accelerator, options = run.accelerator, run.plan.config.optimization
    losses, positions, place = [], [], run.place
    run.finite.begin()
    for index in range(run.plan.layout.accumulation):
        run.statistics.begin_micro_batch(index, run.plan.layout.accumulation)
        batch = loader.next_batch(run, batches)
        place = batch.place or place
        report_bad_images(run, batch)
        with accelerator.accumulate(run.model):
            loss = batch_loss(batch)
            accelerator.backward(loss)
        losses.append(loss.detach())
        positions += batch.positions
    norm = accelerator.clip_grad_norm_(run.model.parameters(), options.max_grad_norm or float("inf"))
    grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
    judged = Judged(run.step + 1, torch.stack(losses), grad_norm, positions)
    loss, finite = judged.losses.mean(), judged.finite
    if not run.finite.deferred and not bool(finite):
        raise NonFiniteLossError(describe_non_finite(run, judged))
    run.finite.leave_out_unless(judged)
    run.optimizer.step()
    run.lr_schedule.step()
    run.optimizer.zero_grad()
    model = accelerator.unwrap_model(run.model)
    average_statistics(model, accelerator)
    run.finite.put_back_unless(finite)
    for average in run.averages:
        average.update_parameters(model, finite if run.finite.deferred else None)
    run.step += 1
    run.place = place
    run.window.append(loss)
    return loss, grad_norm


def report_bad_images(run: AnyRun, batch: Batch) -> None:
    """Stop at unreadable images, or name them and go on, as --on-bad-image says."""
    for message in batch.bad_images:
        if run.plan.config.data.on_bad_image == "stop":
            raise UnreadableImageError(
                f"{message}. Repair or remove it, or go on without it: --on-bad-image skip. The run stopped at step "
                f"{run.step}; nothing after the last checkpoint is kept."
            )
        say(f"skipped: {message}")


def refuse_bad_step(run: AnyRun) -> None:
    """Stop where a step since the last call was not finite; every process calls this.

    Raises:
        NonFiniteLossError: there was one, in any process.
    """
    if not run.finite.deferred:
        return
    bad = run.finite.first_bad()
    flag = torch.tensor(float(bad is not None), device=run.accelerator.device)
    if not bool(run.accelerator.reduce(flag, reduction="sum") > 0):
        return
    if bad is None:
        raise NonFiniteLossError(f"process {run.accelerator.process_index}: another process met a non-finite loss.")
    raise NonFiniteLossError(describe_non_finite(run, bad))


def describe_non_finite(run: AnyRun, judged: Judged) -> str:
    """Where a NaN came from: step, micro batch, samples, and parameters, as long as their gradients are there."""
    losses, positions = judged.losses.tolist(), judged.positions
    bad = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
    where = f"loss {[round(loss, 4) for loss in losses]}, micro batches {bad}" if bad else "finite loss"
    parameters = [
        name
        for name, parameter in run.accelerator.unwrap_model(run.model).named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    gradients = f"; non-finite gradients in {len(parameters)} parameters, first {parameters[:3]}" if parameters else ""
    return (
        f"step {judged.step}, process {run.accelerator.process_index}: {where}, gradient norm {float(judged.norm)}. "
        f"Samples {positions[0]} to {positions[-1]} of the stream{gradients}. The weights were not changed by it and "
        f"nothing was saved after step {judged.step - 1}; continue from the last checkpoint with a lower "
        "--learning-rate or --max-grad-norm."
    )
