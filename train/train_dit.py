"""Train D-EMOv2, DiT or SiT on class-labelled images.

    accelerate launch train/train_dit.py --config train/configs/digits.yaml
    accelerate launch train/train_dit.py --model D-EMOv2-B-2 --train-data-dir imagenet/train --resolution 256

The same script runs on a CPU, a GPU or many; options are in `config.py`. It writes a folder that
`DEMOPipeline.from_pretrained` loads.
"""

import csv
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from d_emo.eval.fid.scoring import summary
from d_emo.figures import caption_grid, save_image
from d_emo.files import remove_partial, write_json, written_whole
from d_emo.images import UnreadableImageError
from d_emo.kernels import set_backend
from d_emo.latents import encode_images, sample_latents
from d_emo.pipelines import DEMOPipeline
from d_emo.processes import LaunchError, keep_freed_memory, start_processes
from d_emo.train import checkpoints, figures, stream
from d_emo.train.batch_norm import average_statistics
from d_emo.train.config import DATA_SOURCES, TrainConfig, parse_config
from d_emo.train.data import Batch, TrainingImages, collate, load_source
from d_emo.train.in_loop_fid import InLoopFID, make_in_loop_fid
from d_emo.train.model_card import model_card
from d_emo.train.on_track import PublishedLoss, published_loss
from d_emo.train.setup import (
    Plan,
    make_average,
    make_lr_schedule,
    make_optimizer,
    make_pipeline,
    make_plan,
    output_dir,
)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOG_FILE = "train_log.csv"
LOG_COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "images_per_second")


class NonFiniteLossError(FloatingPointError):
    """Loss or gradient is NaN or infinite; raised before the weights change."""


@dataclass
class Run:
    """The live parts of a training run."""

    plan: Plan
    accelerator: Accelerator
    model: torch.nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    lr_schedule: torch.optim.lr_scheduler.LRScheduler
    pipeline: DEMOPipeline
    published: PublishedLoss | None = None
    fid: InLoopFID | None = None
    step: int = 0
    window: list[torch.Tensor] = field(default_factory=list)  # losses since the last log line

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return self.plan.output_dir

    def say(self, message: str) -> None:
        """Print a line once, above the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message)


def main(arguments: list[str]) -> None:
    """Set up, train, save."""
    try:
        config = parse_config(arguments)
        source = load_source(config.data)
        accelerator = make_accelerator(config, output_dir(config, source))
        plan = make_plan(config, source, accelerator)
        if accelerator.is_main_process:
            print(announcement(plan), flush=True)
        if config.run.dry_run:
            return
        run = make_run(plan, accelerator)
        start_or_resume(run)
    except ValueError as error:
        sys.exit(f"train_dit: {error}")
    try:
        code = train(run)
    except (UnreadableImageError, NonFiniteLossError, checkpoints.SaveError) as error:
        sys.exit(f"train_dit: {error}")
    finally:
        accelerator.end_training()
    if code:
        sys.exit(code)


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    """The Accelerator of the run: precision, threads and trackers."""
    report_to = None if config.run.report_to == "none" else config.run.report_to
    try:
        accelerator = start_processes(
            config.run.cpu_threads,
            mixed_precision=config.optimization.mixed_precision,
            log_with=report_to,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # see average_statistics
        )
    except LaunchError:
        raise
    except (ValueError, ImportError) as error:
        raise ValueError(f"--report-to {report_to} / --mixed-precision: {error}") from error
    if report_to and not accelerator.log_with:
        raise ValueError(f"--report-to {report_to}: its package is not installed; install it or use --report-to none.")
    if accelerator.mixed_precision not in ("no", "bf16"):
        raise ValueError(f"mixed precision {accelerator.mixed_precision} is not supported; use --mixed-precision bf16.")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if config.model.kernels:
        set_backend(config.model.kernels)
    return accelerator


def announcement(plan: Plan) -> str:
    """The lines that say what runs, first of all what on."""
    data = plan.config.data
    default = not any(getattr(data, name) for name in DATA_SOURCES)
    note = "No data was named: training on scikit-learn's handwritten digits (--dataset or --train-data-dir for yours)."
    return "\n".join([note, plan.describe()] if default else [plan.describe()])


def make_run(plan: Plan, accelerator: Accelerator) -> Run:
    """Build model, average, optimizer and schedule, and hand them to Accelerate."""
    config = plan.config
    set_seed(config.run.seed % 2**32)
    model = plan.build_model()
    average = make_average(model, config.optimization).to(accelerator.device)
    if config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = make_optimizer(model, config.optimization)
    lr_schedule = make_lr_schedule(optimizer, config)
    if plan.vae is not None:
        plan.vae.to(accelerator.device)
    accelerator.gradient_accumulation_steps = plan.layout.accumulation
    if config.model.compile:
        model.compile_repeated_blocks(fullgraph=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(lr_schedule)
    pipeline = make_pipeline(average.module, plan)
    return Run(plan, accelerator, model, average, optimizer, lr_schedule, pipeline, published_loss(plan))


def start_or_resume(run: Run) -> None:
    """Claim the output folder, load the checkpoint if one was asked for, open log and tracker, prepare FID."""
    config, accelerator = run.plan.config, run.accelerator
    identity = run.plan.identity()
    checkpoints.check_run_folder(run.output_dir, identity, resuming=config.run.resume_from is not None)
    if config.run.resume_from:
        path, manifest, notes = checkpoints.agreed_checkpoint(accelerator, config.run.resume_from, run.output_dir)
        for note in notes:
            run.say(note)
        if path is not None:
            load_checkpoint(run, path, manifest)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        run.output_dir.mkdir(parents=True, exist_ok=True)
        remove_partial(run.output_dir)
        write_json(run.output_dir / checkpoints.RUN_FILE, identity)
        truncate_log(run.output_dir / LOG_FILE, run.step)
    settings = {name: value for name, value in config.flat().items() if isinstance(value, int | float | str | bool)}
    accelerator.init_trackers("d_emo", config=settings)
    run.fid = make_in_loop_fid(run.plan, accelerator)


def load_checkpoint(run: Run, path: Path, manifest: dict[str, Any]) -> None:
    """Restore weights, average, optimizer, schedule and generators exactly."""
    run.accelerator.load_state(str(path / checkpoints.STATE_FOLDER))
    stored = type(run.pipeline.transformer).from_pretrained(path / "transformer")
    run.average.module.load_state_dict(stored.state_dict(), strict=True)
    run.step = manifest["step"]
    run.average.n_averaged.fill_(1 + run.step)


def train(run: Run) -> int:
    """Step until the end, or until the user interrupts; log, sample and save on the way.

    Returns:
        The exit code: 0, or the shell's code for the signal that stopped the run.
    """
    options, accelerator = run.plan.config.run, run.accelerator
    batches = iter(make_loader(run))
    started, first_step = time.perf_counter(), run.step
    run.model.train()
    with (
        StopRequest() as stop,
        tqdm(
            total=options.max_train_steps, initial=run.step, unit="step", disable=not accelerator.is_main_process
        ) as bar,
    ):
        while run.step < options.max_train_steps:
            loss, grad_norm = train_step(run, batches)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.4f}", grad=f"{grad_norm:.2f}", refresh=False)
            stopping = stop.agreed(accelerator)
            saving = stopping or run.step == options.max_train_steps or run.step % options.checkpoint_every == 0
            # A line before every checkpoint, so that a resumed run has no losses of half an interval to remember.
            if saving or run.step % options.log_every == 0:
                speed = (run.step - first_step) * run.plan.layout.global_batch_size / (time.perf_counter() - started)
                log_progress(run, grad_norm, speed)
            if options.sample_every and run.step % options.sample_every == 0:
                show_samples(run)
            if saving:
                card = model_card(run.plan, run.step)
                path = checkpoints.save_checkpoint(accelerator, run.pipeline, run.output_dir, run.step, card)
                run.say(f"step {run.step}: saved {path}")
                if accelerator.is_main_process:
                    checkpoints.prune_checkpoints(run.output_dir, options.keep_checkpoints, options.keep_every)
            if run.fid and run.step % options.fid_every == 0 and not stopping:
                score_fid(run, run.fid)
            if stopping:
                run.say(f"stopped at step {run.step}; continue with --resume-from latest")
                return stop.exit_code
    finish(run)
    return 0


def make_loader(run: Run) -> DataLoader:
    """The rest of the run's samples, in the order that the seed gives."""
    plan, accelerator = run.plan, run.accelerator
    options = plan.config.run
    sampler = stream.StreamSampler(
        plan.source.size,
        options.seed,
        global_batch_size=plan.layout.global_batch_size,
        micro_batch_size=plan.layout.micro_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        first_step=run.step,
        last_step=options.max_train_steps,
    )
    workers = plan.source.num_workers if plan.config.data.num_workers is None else plan.config.data.num_workers
    return DataLoader(
        TrainingImages(plan.source, plan.resolution, plan.flip, options.seed),
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=ignore_stop_signals,
        pin_memory=accelerator.device.type == "cuda",
    )


def ignore_stop_signals(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which reach a terminal's or a job's whole group, to the process that saves."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def train_step(run: Run, batches: Iterator[Batch]) -> tuple[torch.Tensor, float]:
    """One optimizer step over its micro batches.

    Returns:
        This process's mean loss, and the gradient's norm over all processes.

    Raises:
        NonFiniteLossError: before the weights change.
        UnreadableImageError: a batch holds an unreadable image and the user chose to stop.
    """
    accelerator, options = run.accelerator, run.plan.config.optimization
    losses, positions = [], []
    for _ in range(run.plan.layout.accumulation):
        batch = next(batches)
        report_bad_images(run, batch)
        with accelerator.accumulate(run.model):
            loss = batch_loss(run, batch)
            accelerator.backward(loss)
        losses.append(loss.detach())
        positions += batch.positions
    loss = torch.stack(losses).mean()
    norm = accelerator.clip_grad_norm_(run.model.parameters(), options.max_grad_norm or float("inf"))
    grad_norm = float(norm)
    if not (grad_norm < float("inf") and bool(torch.isfinite(loss))):
        raise NonFiniteLossError(describe_non_finite(run, losses, grad_norm, positions))
    run.optimizer.step()
    run.lr_schedule.step()
    run.optimizer.zero_grad()
    model = accelerator.unwrap_model(run.model)
    average_statistics(model, accelerator)
    run.average.update_parameters(model)
    run.step += 1
    run.window.append(loss)
    return loss, grad_norm


def batch_loss(run: Run, batch: Batch) -> torch.Tensor:
    """Mean loss of a micro batch; every random number is a function of (seed, position)."""
    plan, device = run.plan, run.accelerator.device
    seed, positions = plan.config.run.seed, batch.positions
    data = batch.images.to(device, non_blocking=True)  # (B, channels, side, side)
    if plan.vae is not None:
        draw = stream.normal(seed, "vae", positions, plan.latent_shape).to(device)
        if plan.source.latents is None:
            data = encode_images(plan.vae, data, draw)
        else:
            data = sample_latents(plan.vae, data[:, 0], data[:, 1], draw)
    noise = stream.normal(seed, "noise", positions, plan.latent_shape).to(device)  # (B, C, H, W)
    time_ = stream.uniform(seed, "time", positions).to(device)  # (B,)
    labels = drop_labels(batch, len(plan.source.id2label), plan.config.optimization.class_dropout_prob, seed)

    def network(noisy: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        return run.model(noisy, timestep, class_labels, return_dict=False)[0]

    return plan.objective.losses(network, data, labels.to(device), noise, time_)["loss"].mean()


def drop_labels(batch: Batch, num_classes: int, probability: float, seed: int) -> torch.Tensor:
    """Labels (B,) in which a share, drawn once a sample, became "no class" (id num_classes)."""
    dropped = stream.uniform(seed, "label_dropout", batch.positions) < probability
    return batch.labels.masked_fill(dropped, num_classes)


def report_bad_images(run: Run, batch: Batch) -> None:
    """Stop at unreadable images, or name them and go on, as --on-bad-image says."""
    for message in batch.bad_images:
        if run.plan.config.data.on_bad_image == "stop":
            raise UnreadableImageError(
                f"{message}. Repair or remove it, or go on without it: --on-bad-image skip. The run stopped at step "
                f"{run.step}; nothing after the last checkpoint is kept."
            )
        tqdm.write(f"skipped: {message}")


def describe_non_finite(run: Run, losses: list[torch.Tensor], grad_norm: float, positions: list[int]) -> str:
    """Where a NaN came from: step, micro batch, samples, parameters."""
    bad = [index for index, loss in enumerate(losses) if not torch.isfinite(loss)]
    parameters = [
        name
        for name, parameter in run.accelerator.unwrap_model(run.model).named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    where = f"loss {[round(float(loss), 4) for loss in losses]}, micro batches {bad}" if bad else "finite loss"
    return (
        f"step {run.step + 1}, process {run.accelerator.process_index}: {where}, gradient norm {grad_norm}. "
        f"Samples {positions[0]} to {positions[-1]} of the stream; non-finite gradients in {len(parameters)} "
        f"parameters, first {parameters[:3]}. The weights were not changed and nothing was saved after step "
        f"{run.step}; continue from the last checkpoint with a lower --learning-rate or --max-grad-norm."
    )


def log_progress(run: Run, grad_norm: float, images_per_second: float) -> None:
    """Write the mean loss since the last line, over all processes, to screen, log file and tracker."""
    loss = float(run.accelerator.reduce(torch.stack(run.window).mean(), reduction="mean"))
    published = run.published.mean(run.step - len(run.window), run.step) if run.published else None
    run.window.clear()
    if not run.accelerator.is_main_process:
        return
    rate = run.lr_schedule.get_last_lr()[0]
    remaining = (run.plan.config.run.max_train_steps - run.step) * run.plan.layout.global_batch_size / images_per_second
    run.say(
        f"step {run.step}: loss {loss:.4f}"
        + (f" ({loss / published:.3f} of the published)" if published else "")
        + f", gradient norm {grad_norm:.3f}, learning rate {rate:.2e}, "
        f"{images_per_second:.1f} images/s, {tqdm.format_interval(remaining)} left"
    )
    values = (run.step, loss, grad_norm, rate, images_per_second)
    with (run.output_dir / LOG_FILE).open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(values)
    tracked = dict(zip(LOG_COLUMNS[1:], values[1:], strict=True))
    run.accelerator.log(tracked | ({"published_loss": published} if published else {}), step=run.step)


def truncate_log(path: Path, step: int) -> None:
    """Keep the header and the rows up to `step`: a resumed run writes the rest again."""
    rows = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]
    with written_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([LOG_COLUMNS, *rows])


def show_samples(run: Run) -> None:
    """Save a grid of samples of the averaged model; the main process draws, the others wait."""
    accelerator, options = run.accelerator, run.plan.config.run
    if accelerator.is_main_process:
        count, steps, scale = options.samples_per_class, options.sample_steps, options.sample_guidance_scale
        with accelerator.autocast():
            rows, captions = figures.draw_samples(run.pipeline, count, steps, scale, options.seed)
        grid = caption_grid(rows, captions)
        path = run.output_dir / "samples" / f"step-{run.step:07d}.png"
        save_image(grid, path)
        plot_losses(run)
        run.say(f"step {run.step}: samples in {path}")
        log_grid(accelerator, grid, run.step)
    accelerator.wait_for_everyone()


def score_fid(run: Run, fid: InLoopFID) -> None:
    """Score the averaged model, say and track the scores."""
    scores = fid.score(run.pipeline, run.step)
    if run.accelerator.is_main_process:
        run.say(f"step {run.step}: {summary(scores)}; curve in {fid.folder / 'fid.png'}")
        run.accelerator.log({f"quick_{name}": value for name, value in scores.values.items()}, step=run.step)


def log_grid(accelerator: Accelerator, grid: PIL.Image.Image, step: int) -> None:
    """Hand the grid to every tracker that takes images."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(grid)[None]}, step=step, **layout)


def plot_losses(run: Run) -> None:
    """Draw the loss curve so far."""
    figures.plot_loss(run.output_dir / LOG_FILE, run.output_dir / "loss.png", run.plan.model_name, run.published)


def finish(run: Run) -> None:
    """Show the result, save the pipeline into the run's folder, say what to do next."""
    options = run.plan.config.run
    if options.sample_every and run.step % options.sample_every:
        show_samples(run)
    if run.accelerator.is_main_process:
        checkpoints.publish_pipeline(run.pipeline, run.output_dir, model_card(run.plan, run.step))
        plot_losses(run)
        names = run.plan.source.id2label
        run.say(f'done: DEMOPipeline.from_pretrained("{run.output_dir}")({repr(names[0]) if names else ""}).images[0]')
    run.accelerator.wait_for_everyone()


class StopRequest:
    """Turns Ctrl-C and SIGTERM into "save and stop after this step"; a second one stops at once.

    A context manager: the signals' former handlers are put back at its end.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._former = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: Any) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = number
        tqdm.write("stopping: saving a checkpoint after this step (again to stop at once)")

    @property
    def exit_code(self) -> int:
        """The shell's code for the signal."""
        return 128 + (self.received or signal.SIGTERM)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all of them get the same answer."""
        flag = torch.tensor(float(self.received is not None), device=accelerator.device)
        return bool(accelerator.reduce(flag, reduction="sum") > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
