"""How every trainer starts: processes and trackers, the run's folder, and what a checkpoint brings back."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, parse_flag_from_env

from d_emo.common.files import write_json
from d_emo.common.locks import output_folder
from d_emo.common.messages import first_line
from d_emo.common.output import say
from d_emo.common.processes import LaunchError, agreed, keep_freed_memory, start_processes, use_tf32
from d_emo.train.data import stream_loader
from d_emo.train.data.options import DATA_SOURCES
from d_emo.train.engine import checkpoints, fit, resume
from d_emo.train.engine.averaging import PowerAverage, WeightAverage
from d_emo.train.engine.batch_norm import StepStatistics
from d_emo.train.engine.finite import FiniteSteps
from d_emo.train.engine.log import LOG_FILE, seconds_so_far, truncate_log
from d_emo.train.engine.options import RUN_FILE, RunOptions, refuse_other_trainer, stored_options
from d_emo.train.engine.plan import RunPlan, run_identity
from d_emo.train.engine.run import AnyRun, Parts
from d_emo.train.engine.state import load_state
from d_emo.train.engine.trackers import LOG_FOLDER, chosen_trackers, open_trackers

Config = TypeVar("Config", bound=Any)


def make_accelerator(
    options: RunOptions, mixed_precision: str | None, folder: Path, on_gpus: bool = False
) -> Accelerator:
    """The Accelerator of the run: precision, threads and trackers.

    Args:
        options: of the run.
        mixed_precision: what was asked for.
        folder: of the run.
        on_gpus: whether this only plans a run on GPUs that need not be here.
    """
    if mixed_precision is None:
        stored = stored_options(folder) if options.resume_from else {}
        # A run keeps its own; one that says nothing of it is of before there was a default.
        default = "bf16" if not stored and (on_gpus or _bfloat16_is_default()) else None
        mixed_precision = stored.get("mixed_precision", default)
    trackers = chosen_trackers(options.report_to)
    try:
        accelerator = start_processes(
            options.cpu_threads,
            mixed_precision=mixed_precision,
            log_with=trackers or None,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / LOG_FOLDER)),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # see average_statistics
        )
    except LaunchError:
        raise
    except (ValueError, ImportError) as error:
        raise ValueError(f"mixed precision {mixed_precision}: {first_line(error)}") from error
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed precision {accelerator.mixed_precision} is not supported; use --mixed-precision bf16.")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    use_tf32(accelerator)
    return accelerator


def _bfloat16_is_default() -> bool:
    """Whether this process's GPU has products in bfloat16, and the launch says nothing else.

    `accelerate launch` says "no" also where nobody chose anything.
    """
    of_launch = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if of_launch != "no" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available():
        return False
    with torch.cuda.device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def with_precision(config: Config, accelerator: Accelerator) -> Config:
    """Options that say so where bfloat16 was not asked for but chosen, as cards and a run's own options then do."""
    if accelerator.mixed_precision != "bf16":
        return config
    return replace(config, optimization=replace(config.optimization, mixed_precision="bf16"))


def describe_precision(device: str, mixed_precision: str) -> str:
    """What a GPU computes in, for people; empty on a CPU, where nothing is chosen."""
    if device != "cuda":
        return ""
    if mixed_precision == "bf16":
        return (
            "products in bfloat16 (autocast), weights, sums and optimizer in float32; --mixed-precision no: all of it"
        )
    return "float32, products in TF32; --mixed-precision bf16 is faster and takes less memory, on GPUs that have it"


def announce(plan: RunPlan, accelerator: Accelerator, hint: str = "") -> None:
    """Say what would run, first of all what on.

    `hint` names the options for other data than the digits, of trainers that have those.
    """
    if not accelerator.is_main_process:
        return
    if hint and not any(getattr(plan.config.data, name) for name in DATA_SOURCES):
        print(f"No data was named: training on scikit-learn's handwritten digits ({hint} for yours).")
    print(plan.describe())
    if precision := describe_precision(plan.launch.runs_on.type, accelerator.mixed_precision):
        print(f"  {'precision':<10} {precision}")
    for note in fit.notes(plan):
        print(f"  note       {note}.")
    sys.stdout.flush()


def prepare(
    plan: RunPlan,
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    lr_schedule: torch.optim.lr_scheduler.LRScheduler,
    compile_model: Callable[[], None] | None,
    lengths: Sequence[float] = (),
) -> Parts:
    """Average the model from now on, and hand all to Accelerate.

    Args:
        plan: what is to be done.
        accelerator: of the run.
        model: as it is trained.
        optimizer, lr_schedule: of the model.
        compile_model: compiles it; None for no compilation.
        lengths: relative lengths of power-function averages to follow, too.
    """
    statistics = StepStatistics(model, constant=compile_model is not None)
    average = WeightAverage(model, plan.config.optimization).to(accelerator.device)
    followed = [PowerAverage(model, length).to(accelerator.device) for length in lengths]
    accelerator.gradient_accumulation_steps = plan.layout.accumulation
    if compile_model is not None:
        compile_model()
    model, optimizer = accelerator.prepare(model, optimizer)
    for each in (average, *followed):
        each.shard_like(model)
    return Parts(
        model=model,
        average=average,
        optimizer=optimizer,
        statistics=statistics,
        finite=FiniteSteps(model, optimizer),
        lr_schedule=lr_schedule,
        followed=followed,
    )


@dataclass(frozen=True)
class Claim:
    """What a run goes on from, in a folder that is its own.

    Attributes:
        checkpoint: its folder; None for a fresh start.
        manifest: the checkpoint's.
        notes: lines to tell the user.
    """

    checkpoint: Path | None
    manifest: dict[str, Any]
    notes: list[str]


@contextmanager
def claimed(plan: RunPlan, accelerator: Accelerator, defaults: dict[str, Any]) -> Iterator[Claim]:
    """Within it, the output folder is this run's, and the checkpoint that was asked for is one of this run.

    Nothing is written yet, so that a dry run comes as far as this.

    Args:
        plan: what is to be done.
        accelerator: of the run.
        defaults: of every option; see `read_identity`.

    Raises:
        ValueError: the folder is in use or holds something else, or the checkpoint is damaged or of another run.
    """
    with ExitStack() as stack:
        identity = run_identity(plan, accelerator)
        claim = agreed(accelerator, lambda: _claim(plan, identity, defaults, stack))
        if accelerator.is_main_process:
            for note in claim.notes:
                say(note)
        yield claim


def begin(run: AnyRun, claim: Claim, load_average: Callable[[Path], None]) -> None:
    """Load the checkpoint if there is one, write down what run this is, open log and trackers.

    Args:
        run: what is trained.
        claim: what it goes on from.
        load_average: reads the averaged weights of a checkpoint's folder.

    Raises:
        ValueError: the checkpoint's state does not fit, or a tracker does not start.
    """
    config, accelerator, path = run.plan.config, run.accelerator, claim.checkpoint
    if path is not None:
        run.step = claim.manifest["step"]
        load_state(run, path / checkpoints.STATE_FOLDER, run.step, claim.manifest["processes"])
        load_average(path)
        for average in run.averages:
            average.n_averaged.fill_(1 + run.step)
        if run.plan.source.stream is not None:
            run.place, note = stream_loader.load_place(path / checkpoints.STATE_FOLDER, accelerator)
            run.say(note)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(run.output_dir / RUN_FILE, run.identity())
        truncate_log(run.output_dir / LOG_FILE, run.step)
        run.seconds_before = seconds_so_far(run.output_dir / LOG_FILE)
    open_trackers(run, config.flat())


def _claim(plan: RunPlan, identity: dict[str, Any], defaults: dict[str, Any], held: ExitStack) -> Claim:
    """Lock the output folder until `held` is closed, and find what to continue from; the main process does."""
    options, folder = plan.config.run, plan.output_dir
    refuse_other_trainer(folder, plan.config.trainer)
    if options.resume_from is not None:
        resume.check_named(options.resume_from)
    if not (folder / RUN_FILE).is_file():
        resume.check_run_folder(folder, options.resume_from is not None)  # before a lock is left among others' files
    held.enter_context(output_folder(folder))
    resume.check_run_folder(folder, options.resume_from is not None)
    if options.resume_from is None:
        return Claim(None, {}, [])
    path, manifest, notes = resume.find_checkpoint(options.resume_from, folder)
    if path is None:
        return Claim(None, {}, notes)
    if manifest.get("sharded"):
        raise checkpoints.CheckpointError(
            f"{path}: an older version saved its state in shards that only unsafe code can read; start a new run from "
            f"its averaged weights: --init-from {path}, another --output-dir."
        )
    if manifest["step"] > plan.max_train_steps:
        raise checkpoints.CheckpointError(
            f"{path} is at step {manifest['step']}, past the {plan.max_train_steps} that were asked for; "
            "name more steps (--max-train-steps), or use the run as it is."
        )
    own = resume.read_identity(path / RUN_FILE, defaults) or resume.read_identity(path.parent / RUN_FILE, defaults)
    changes = []
    if own is None:
        notes.append(f"{path} does not say of which run it is ({RUN_FILE} is missing): its options are not compared.")
    else:
        changes = resume.check_same_run(f"--resume-from {path}", own, identity, options.allow_change, path)
    if changes:
        notes.append(f"from here on: {'; '.join(changes)}.")
    newest = (checkpoints.list_checkpoints(folder) or [path])[-1]
    elsewhere = path.resolve().parent != folder.resolve()
    if (newest != path and elsewhere) or (changes and newest.resolve() != path.resolve()):
        other = resume.read_identity(folder / RUN_FILE, defaults)
        if changes or (other is not None and other != {**defaults, **identity}):
            raise checkpoints.CheckpointError(
                f"--output-dir {folder} holds other checkpoints, up to {newest.name}; choose another folder."
            )
    return Claim(path, manifest, notes)
