"""Train D-EMOv2, DiT or SiT on class-labelled images.

    accelerate launch train/train_dit.py --config train/configs/digits.yaml
    accelerate launch train/train_dit.py --model D-EMOv2-B-2 --train-data-dir imagenet/train --resolution 256

The same script runs on a CPU, a GPU or many; options are in `config.py`. It writes a folder that
`DEMOPipeline.from_pretrained` loads.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, set_seed
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from d_emo.files import remove_partial, write_json
from d_emo.images import UnreadableImageError
from d_emo.kernels import set_backend
from d_emo.latents import encode_images, sample_latents
from d_emo.processes import LaunchError, end_workers, is_dead_worker, is_sharded, keep_freed_memory, start_processes
from d_emo.train import checkpoints, hub, loading, lora, stream, stream_loader
from d_emo.train.averaging import WeightAverage
from d_emo.train.batch_norm import StepStatistics, average_statistics
from d_emo.train.config import DATA_SOURCES, TrainConfig, parse_config
from d_emo.train.data import Batch, load_source
from d_emo.train.in_loop_fid import make_in_loop_fid
from d_emo.train.model_card import model_card
from d_emo.train.on_track import published_loss
from d_emo.train.reporting import LOG_FILE, log_progress, plot_losses, score_fid, show_samples, truncate_log
from d_emo.train.run import LoaderError, NonFiniteLossError, Run
from d_emo.train.setup import Plan, make_lr_schedule, make_optimizer, make_pipeline, make_plan, output_dir
from d_emo.train.stopping import StopRequest


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
    except (UnreadableImageError, NonFiniteLossError, checkpoints.SaveError, hub.PushError) as error:
        sys.exit(f"train_dit: {error}")
    except RuntimeError as error:
        if not isinstance(error, LoaderError) and not is_dead_worker(error):
            raise
        sys.exit(f"train_dit: {error if isinstance(error, LoaderError) else loading.loader_error(run, error)}")
    finally:
        accelerator.end_training()
        end_workers()
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
    if config.model.lora_rank is not None and is_sharded(accelerator):
        raise ValueError(f"--lora-rank {config.model.lora_rank}: adapters are small; launch without FSDP.")
    model = plan.build_trained()
    statistics = StepStatistics(model, constant=config.model.compile)
    average = WeightAverage(model, config.optimization).to(accelerator.device)
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
    average.shard_like(model)
    published = average.module
    if is_sharded(accelerator) or config.model.lora_rank is not None:
        published = plan.build_model().eval().requires_grad_(False).to(accelerator.device)
    pipeline = make_pipeline(published, plan)
    return Run(plan, accelerator, model, average, optimizer, statistics, lr_schedule, pipeline, published_loss(plan))


def start_or_resume(run: Run) -> None:
    """Claim the output folder, load the checkpoint if one was asked for, open log and tracker, prepare FID."""
    config, accelerator = run.plan.config, run.accelerator
    identity = run.plan.identity()
    resuming = config.run.resume_from is not None
    checkpoints.check_run_folder(run.output_dir, identity, resuming, TrainConfig().flat())
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
    if config.run.push_to_hub and accelerator.is_main_process:
        run.repository = hub.claim_repository(run.plan)


def load_checkpoint(run: Run, path: Path, manifest: dict[str, Any]) -> None:
    """Restore weights, average, optimizer, schedule and generators exactly."""
    run.accelerator.load_state(str(path / checkpoints.STATE_FOLDER))
    if run.plan.config.model.lora_rank is None:
        stored = type(run.pipeline.transformer).from_pretrained(path / "transformer").state_dict()
    else:
        stored = lora.load_average(path / checkpoints.STATE_FOLDER)
    run.average.load_whole_state(stored)
    run.step = manifest["step"]
    run.average.n_averaged.fill_(1 + run.step)
    if run.plan.source.stream is not None:
        run.place, note = stream_loader.load_place(path / checkpoints.STATE_FOLDER, run.accelerator)
        run.say(note)


def train(run: Run) -> int:
    """Step until the end, or until the user interrupts; log, sample and save on the way.

    Returns:
        The exit code: 0, or the shell's code for the signal that stopped the run.
    """
    options, accelerator = run.plan.config.run, run.accelerator
    batches = iter(loading.make_loader(run))
    lora.set_mode(run.model, frozen_norms=run.plan.config.model.lora_rank is not None)
    with (
        StopRequest() as stop,
        tqdm(
            total=options.max_train_steps, initial=run.step, unit="step", disable=not accelerator.is_main_process
        ) as bar,
    ):
        while run.step < options.max_train_steps:
            started = time.perf_counter()
            loss, grad_norm = train_step(run, batches)
            run.seconds += time.perf_counter() - started
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.4f}", grad=f"{grad_norm:.2f}", refresh=False)
            stopping = stop.agreed(accelerator)
            saving = stopping or run.step == options.max_train_steps or run.step % options.checkpoint_every == 0
            # A line before every checkpoint, so that a resumed run has no losses of half an interval to remember.
            if saving or run.step % options.log_every == 0:
                log_progress(run, grad_norm)
            if options.sample_every and run.step % options.sample_every == 0:
                show_samples(run)
            if saving:
                save(run)
            if run.fid and run.step % options.fid_every == 0 and not stopping:
                score_fid(run, run.fid)
            if stopping:
                run.say(f"stopped at step {run.step}; continue with --resume-from latest")
                return stop.exit_code
    finish(run)
    return 0


def save(run: Run) -> None:
    """Write a checkpoint, then delete the older ones that the user does not keep."""
    run.refresh_pipeline()
    options, card = run.plan.config.run, model_card(run.plan, run.step)

    def write_more(folder: Path) -> None:
        if run.plan.source.stream is not None:
            stream_loader.save_place(folder / checkpoints.STATE_FOLDER, run.accelerator, run.place)
        if run.plan.config.model.lora_rank is not None and run.accelerator.is_main_process:
            lora.save_average(run.average.module, run.model, folder / checkpoints.STATE_FOLDER)
            lora.save_adapters(run.average.module, folder)

    path = checkpoints.save_checkpoint(run.accelerator, run.pipeline, run.output_dir, run.step, card, write_more)
    run.say(f"step {run.step}: saved {path}")
    if run.accelerator.is_main_process:
        checkpoints.prune_checkpoints(run.output_dir, options.keep_checkpoints, options.keep_every)


def train_step(run: Run, batches: Iterator[Batch]) -> tuple[torch.Tensor, float]:
    """One optimizer step over its micro batches.

    Returns:
        This process's mean loss, and the gradient's norm over all processes.

    Raises:
        NonFiniteLossError: before the weights change.
        UnreadableImageError: a batch holds an unreadable image and the user chose to stop.
        LoaderError: a loader process died.
    """
    accelerator, options = run.accelerator, run.plan.config.optimization
    losses, positions, place = [], [], run.place
    for index in range(run.plan.layout.accumulation):
        run.statistics.begin_micro_batch(index, run.plan.layout.accumulation)
        batch = loading.next_batch(run, batches)
        place = batch.place or place
        report_bad_images(run, batch)
        with accelerator.accumulate(run.model):
            loss = batch_loss(run, batch)
            accelerator.backward(loss)
        losses.append(loss.detach())
        positions += batch.positions
    loss = torch.stack(losses).mean()
    norm = accelerator.clip_grad_norm_(run.model.parameters(), options.max_grad_norm or float("inf"))
    grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if not (grad_norm < float("inf") and bool(torch.isfinite(loss))):
        raise NonFiniteLossError(describe_non_finite(run, losses, grad_norm, positions))
    run.optimizer.step()
    run.lr_schedule.step()
    run.optimizer.zero_grad()
    model = accelerator.unwrap_model(run.model)
    average_statistics(model, accelerator)
    run.average.update_parameters(model)
    run.step += 1
    run.place = place
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


def finish(run: Run) -> None:
    """Show the result, save the pipeline into the run's folder, say what to do next."""
    options = run.plan.config.run
    if options.sample_every and run.step % options.sample_every:
        show_samples(run)
    run.refresh_pipeline()
    if run.accelerator.is_main_process:

        def write_more(folder: Path) -> None:
            if run.plan.config.model.lora_rank is not None:
                lora.save_adapters(run.average.module, folder)

        card = model_card(run.plan, run.step)
        checkpoints.publish_pipeline(run.pipeline, run.output_dir, card, write_more)
        plot_losses(run)
        names = run.plan.source.id2label
        run.say(f'done: DEMOPipeline.from_pretrained("{run.output_dir}")({repr(names[0]) if names else ""}).images[0]')
        if run.repository:
            run.say(f"uploaded: {hub.push(run.output_dir, run.repository, run.step)}")
    run.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(sys.argv[1:])
