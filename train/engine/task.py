"""A run that trains a network for a task and validates it: what classifiers, segmenters, detectors, videos share."""

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from d_emo.common.processes import agreed, loader_processes
from d_emo.kernels import use_backend
from d_emo.train.data import stream
from d_emo.train.data.batches import Batch
from d_emo.train.data.sources import check_output
from d_emo.train.engine import loop, saving, start
from d_emo.train.engine.log import truncate_log
from d_emo.train.engine.plan import RunPlan
from d_emo.train.engine.run import Parts, TrainingRun
from d_emo.train.engine.validation_log import (
    CURVES,
    VALIDATION_FILE,
    log_validation,
    plot_validation,
    read_validation,
)

PlanT = TypeVar("PlanT", bound=RunPlan, covariant=True)
ConfigT = TypeVar("ConfigT")


@dataclass
class Bundle:
    """What a run publishes: the averaged network with its processor."""

    model: Any
    processor: Any

    def save_pretrained(self, save_directory: Path) -> None:
        """Write both into a folder that loads as they do."""
        self.model.save_pretrained(save_directory)
        self.processor.save_pretrained(save_directory)


@dataclass(frozen=True)
class Scores:
    """A validation: `values` in the order of the run's `score_names`, and the same for people."""

    values: tuple[float, ...]
    text: str


@dataclass(kw_only=True)
class TaskRun(TrainingRun[PlanT]):
    """A run of a task. The task says how batches are made, learned from and scored.

    Attributes:
        score_names: of `Scores.values`, the first the one that matters; "loss" is no share.
        bundle: what is published; its network is the average itself.
    """

    score_names: ClassVar[tuple[str, ...]]
    bundle: Bundle

    @abstractmethod
    def batches(self) -> Iterable[Batch]:
        """The rest of the run's batches; see `loader`."""

    @abstractmethod
    def batch_loss(self, batch: Batch) -> torch.Tensor:
        """The mean loss of a micro batch, with its graph; `drawn_loss` calls it."""

    def drawn_loss(self, batch: Batch) -> torch.Tensor:
        """`batch_loss`, whose draws from PyTorch's generators are a function of the seed and the batch's place.

        Dropout, stochastic depth and the anchors and proposals that a detector learns from are the same on whichever
        process, and after a resume.
        """
        seed = cast(Any, self.plan).config.run.seed
        torch.manual_seed(int(stream.generator(seed, "noise", batch.positions[0]).integers(2**32)))
        return self.batch_loss(batch)

    @abstractmethod
    def score(self) -> Scores | None:
        """How the averaged network does on the validation samples, each process on its share; every process calls this.

        The main process's answer counts; None where none of them could be read.
        """

    def evaluation(self) -> dict[str, Any]:
        """What every evaluation of a share of the validation samples is told: where it runs, and which share."""
        accelerator, plan = self.accelerator, cast(Any, self.plan)
        return {
            "device": accelerator.device,
            "rank": accelerator.process_index,
            "world_size": accelerator.num_processes,
            "mixed_precision": accelerator.mixed_precision == "bf16",
            "num_workers": loader_processes(plan.config.data.num_workers, plan.source.num_workers),
            "progress": accelerator.is_main_process,
        }

    @abstractmethod
    def usage(self) -> str:
        """How the result is used, in a line of Python."""

    def result(self) -> Bundle:
        """See `TrainingRun.result`."""
        return self.bundle

    def load_average(self, path: Path) -> None:
        """Restore the average from a checkpoint's folder; the rest is restored already."""
        self.average.load_whole_state(type(self.bundle.model).from_pretrained(path).state_dict())

    def picture(self) -> Path | None:
        """See `TrainingRun.picture`: the curves of loss and scores."""
        path = self.output_dir / CURVES
        return path if path.is_file() else None


def run_task(
    config: Any,
    *,
    sources: tuple[Any, Any],
    folder: Path,
    make_plan: Callable[[Any, Any, Any, Accelerator], RunPlan],
    make_run: Callable[[Any, Accelerator], TaskRun],
    hint: str = "",
) -> None:
    """Set up, train, save.

    Args:
        config: the options.
        sources: to train on and to validate on.
        folder: the run's.
        make_plan: config, sources and accelerator -> plan.
        make_run: plan and accelerator -> run.
        hint: see `start.announce`.
    """
    check_output(config.data, folder)
    accelerator = start.make_accelerator(config.run, config.optimization.mixed_precision, folder)
    config = start.with_precision(config, accelerator)
    with use_backend(config.model.kernels):
        plan = make_plan(config, *sources, accelerator)
        start.announce(plan, accelerator, hint)
        with start.claimed(plan, accelerator, type(config)().flat()) as claim:
            run = make_run(plan, accelerator)  # for a dry run, too: what it refuses
            if not config.run.dry_run:
                loop.run_to_the_end(run, lambda: train(run, claim))


def prepare_parts(
    plan: Any, accelerator: Accelerator, compiled: bool, to_compile: Callable[[Any], Any] = lambda model: model
) -> Parts:
    """Build network, average, optimizer and schedule of a plan, and hand them to Accelerate.

    Args:
        plan: of the run.
        accelerator: of the run.
        compiled: whether the network is compiled.
        to_compile: the network -> the part of it that is.

    """
    set_seed(plan.config.run.seed % 2**32)
    model = plan.build_model()
    in_time = any(parameter.dim() == 5 for parameter in model.parameters())
    model = model.to(memory_format=torch.channels_last_3d if in_time else torch.channels_last)
    optimizer = plan.make_optimizer(model)
    lr_schedule = plan.make_schedule(optimizer)
    compile_model = to_compile(model).compile if compiled else None
    return start.prepare(plan, accelerator, model, optimizer, lr_schedule, compile_model)


def train(run: TaskRun, claim: start.Claim) -> int:
    """Begin or go on, step until the end or until the user interrupts; log, validate and save on the way.

    Args:
        run: what is trained.
        claim: of its folder.

    Returns:
        The exit code: 0, or the shell's code for the signal that stopped the run.
    """
    plan: Any = run.plan
    start.begin(run, claim, run.load_average)
    if run.accelerator.is_main_process:
        truncate_log(plan.output_dir / VALIDATION_FILE, run.step, ("step", *run.score_names))
    run.model.train()

    def score() -> None:
        if run.step % plan.validate_every == 0:
            validate(run)

    if run.step and run.step % plan.validate_every == 0:
        validate_once(run)  # the run ended between a checkpoint and its scores
    stopped = loop.train_until_done(run, iter(run.batches()), run.drawn_loss, show=lambda: None, score=score)
    if stopped is not None:
        return stopped
    finish(run)
    return 0


def validate(run: TaskRun) -> None:
    """Score the averaged network where there is something to validate on; say, log and plot it."""
    scores = run.score() if cast(Any, run.plan).validation is not None else None
    if scores is not None and run.accelerator.is_main_process:
        log_validation(run, run.score_names, scores.values, scores.text)


def validate_once(run: TaskRun) -> None:
    """Score the averaged network unless this step's scores are written already; every process calls this."""
    rows = agreed(run.accelerator, lambda: read_validation(run.output_dir))
    if all(row["step"] != run.step for row in rows):
        validate(run)


def finish(run: TaskRun) -> None:
    """Validate, save the result into the run's folder, say what to do next."""
    plan: Any = run.plan
    validate_once(run)
    if run.accelerator.is_main_process:
        plot_validation(run.output_dir, plan.model_name)
    saving.publish(run, "config.json")
    if run.accelerator.is_main_process:
        run.say(f"done: {run.usage()}")
    run.accelerator.wait_for_everyone()
