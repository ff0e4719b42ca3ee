"""The batches of a run, and what becomes of a loader's failures."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from d_emo.common.messages import first_line
from d_emo.common.processes import loader_processes
from d_emo.images.decode import UnreadableImageError
from d_emo.train.data import stream
from d_emo.train.data.batches import Batch, Preparation, TrainingImages, collate
from d_emo.train.data.stream_loader import StreamLoader
from d_emo.train.engine.run import AnyRun, LoaderError
from d_emo.train.engine.stopping import leave_stops_to_the_trainer


def make_loader(run: AnyRun, prepare: Preparation, latents: Dataset | None = None) -> DataLoader | StreamLoader:
    """The rest of the run's images, in the order that the seed gives.

    Args:
        run: where it is.
        prepare: what becomes of an image.
        latents: answers (position, index) in place of the source's images.
    """
    source = run.plan.source
    if source.stream is None:
        return indexed_loader(run, latents or TrainingImages(source, prepare))
    return StreamLoader(source, prepare, run.plan.config.run.seed, _sampler(run), run.place, _workers(run))


def indexed_loader(run: AnyRun, samples: Dataset, joined: Callable[[Sequence[Any]], Batch] = collate) -> DataLoader:
    """The rest of the run's samples, in the order that the seed gives.

    Args:
        run: where it is.
        samples: answer (position, index).
        joined: makes a batch of samples.
    """
    return DataLoader(
        samples,
        batch_sampler=_sampler(run),
        collate_fn=joined,
        num_workers=_workers(run),
        worker_init_fn=leave_stops_to_the_trainer,
        pin_memory=run.accelerator.device.type == "cuda",
        generator=torch.Generator(),  # otherwise a resumed run would draw from the global one once more
    )


def _sampler(run: AnyRun) -> stream.StreamSampler:
    plan, accelerator = run.plan, run.accelerator
    return stream.StreamSampler(
        plan.source.size,
        plan.config.run.seed,
        global_batch_size=plan.layout.global_batch_size,
        micro_batch_size=plan.layout.micro_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        first_step=run.step,
        last_step=plan.max_train_steps,
    )


def _workers(run: AnyRun) -> int:
    return loader_processes(run.plan.config.data.num_workers, run.plan.source.num_workers)


def next_batch(run: AnyRun, batches: Iterator[Batch]) -> Batch:
    """The next micro batch; a loader's failure becomes a line that says how to go on.

    Raises:
        LoaderError: a process or thread that reads data failed.
        UnreadableImageError: as its sources raise it.
    """
    try:
        return next(batches)
    except UnreadableImageError:
        raise
    except (RuntimeError, OSError, ValueError) as error:
        raise loader_error(run, error) from error


def loader_error(run: AnyRun, error: BaseException) -> LoaderError:
    """What to tell the user when data could not be read."""
    return LoaderError(
        f"step {run.step + 1}: the data could not be read ({first_line(error)}). Nothing after the last checkpoint is "
        "kept; continue with --resume-from latest, with fewer --num-workers, or 0, if memory ran out, or the shared "
        "memory (docker run --shm-size)."
    )
