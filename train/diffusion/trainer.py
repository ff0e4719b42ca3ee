"""From the diffusion trainer's options to a trained pipeline: set up, step, show, save."""

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from d_emo.common.processes import agreed, is_sharded
from d_emo.common.snapshots import delete_after
from d_emo.eval.fid.extractors import make_extractor
from d_emo.images.latents import draw_latents, encode_images
from d_emo.kernels import use_backend
from d_emo.models.compiling import compile_network
from d_emo.models.transformer_base import ClassConditionalOutput
from d_emo.train.data.batches import Batch, Pixels, TrainingLatents
from d_emo.train.data.sources import check_output, load_source
from d_emo.train.diffusion import lora
from d_emo.train.diffusion.config import TrainConfig
from d_emo.train.diffusion.draws import Draws
from d_emo.train.diffusion.in_loop_fid import make_in_loop_fid
from d_emo.train.diffusion.objectives import Jumps
from d_emo.train.diffusion.on_track import published_loss
from d_emo.train.diffusion.optimizer import make_lr_schedule, make_optimizer
from d_emo.train.diffusion.plan import Plan, make_pipeline, make_plan
from d_emo.train.diffusion.resolving import output_dir
from d_emo.train.diffusion.run import Run
from d_emo.train.diffusion.show import plot_losses, score_fid, show_samples
from d_emo.train.diffusion.terms import Drawn, depth_of_features
from d_emo.train.engine import checkpoints, hub, loader, loop, saving, start
from d_emo.train.engine.followed import load_followed, write_followed
from d_emo.train.engine.prefetch import prefetched


def run(config: TrainConfig) -> None:
    """Set up, train, save."""
    source = load_source(config.data)
    check_output(config.data, output_dir(config, source))
    accelerator = start.make_accelerator(
        config.run, config.optimization.mixed_precision, output_dir(config, source), on_gpus=config.run.on is not None
    )
    config = start.with_precision(config, accelerator)
    with use_backend(config.model.kernels):
        plan = make_plan(config, source, accelerator)
        start.announce(plan, accelerator, "--dataset or --train-data-dir")
        with start.claimed(plan, accelerator, TrainConfig().flat()) as claim:
            if config.run.dry_run:
                rehearse(plan, accelerator)
                return
            diffusion = make_run(plan, accelerator)
            loop.run_to_the_end(diffusion, lambda: train(diffusion, claim))


def rehearse(plan: Plan, accelerator: Accelerator) -> None:
    """Make of a plan what a run makes of it, for what that refuses, but no weights: a model of any size passes."""
    options = plan.config.run
    with torch.device("meta"):
        plain, model = plan.build_model(), plan.build_trained()
    with plan.launch.rehearsed(model):
        optimizer = make_optimizer(model, plan.config.optimization)
        make_lr_schedule(optimizer, plan.config.optimization, plan.warmup_steps, plan.max_train_steps)
    make_pipeline(plain, plan)
    if options.fid_every:
        make_extractor(options.fid_features, options.fid_inception_weights)
    if options.push_to_hub:
        agreed(accelerator, lambda: hub.check_repository(repository_name(plan)))


def make_run(plan: Plan, accelerator: Accelerator) -> Run:
    """Build model, average, optimizer and schedule, and hand them to Accelerate."""
    config = plan.config
    set_seed(config.run.seed % 2**32)
    model = plan.build_trained()
    if config.model.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if plan.vae is not None:
        plan.vae.to(accelerator.device)
    if plan.live_teacher is not None:
        plan.live_teacher.to(accelerator.device)
    optimizer = make_optimizer(model, config.optimization)
    compile_model = (
        functools.partial(compile_network, model, config.model.compile_mode) if config.model.compile else None
    )
    schedule = make_lr_schedule(optimizer, config.optimization, plan.warmup_steps, plan.max_train_steps)
    parts = start.prepare(plan, accelerator, model, optimizer, schedule, compile_model, config.followed)
    plain: Any = parts.average.module
    if is_sharded(accelerator) or config.model.lora_rank is not None:
        plain = plan.build_model().eval().requires_grad_(False).to(accelerator.device)
    return Run(
        **vars(parts),
        plan=plan,
        accelerator=accelerator,
        pipeline=make_pipeline(plain, plan),
        draws=Draws(plan, accelerator.device),
        published=published_loss(plan),
    )


def begin(run: Run, claim: start.Claim) -> None:
    """Load the checkpoint if there is one, open log and tracker, prepare FID and repository."""
    options = run.plan.config.run
    start.begin(run, claim, lambda path: load_checkpoint(run, path))
    if run.accelerator.is_main_process:
        delete_after(run.output_dir, run.step)
    run.fid = make_in_loop_fid(run.plan, run.accelerator)
    if options.push_to_hub and run.accelerator.is_main_process:
        run.repository = hub.claim_repository(repository_name(run.plan), options.hub_private)


def repository_name(plan: Plan) -> str:
    """Where --push-to-hub uploads to."""
    return plan.config.run.hub_model_id or plan.output_dir.name


def load_checkpoint(run: Run, path: Path) -> None:
    """Restore the averages; the rest is restored already."""
    if run.plan.config.model.lora_rank is None:
        stored = type(run.pipeline.transformer).from_pretrained(path / "transformer").state_dict()
    else:
        stored = lora.load_average(path / checkpoints.STATE_FOLDER)
    run.average.load_whole_state(stored)
    load_followed(run, path / checkpoints.STATE_FOLDER)


def train(run: Run, claim: start.Claim) -> int:
    """Begin or go on, step until the end or until the user interrupts; log, sample and save on the way.

    Args:
        run: what is trained.
        claim: of its folder.

    Returns:
        The exit code: 0, or the shell's code for the signal that stopped the run.
    """
    options = run.plan.config.run
    begin(run, claim)
    lora.set_mode(run.model, frozen_norms=run.plan.config.model.lora_rank is not None)

    def show() -> None:
        if run.followed and (run.step % options.snapshot_every == 0 or run.step == run.plan.max_train_steps):
            write_followed(run)
        if options.sample_every and run.step % options.sample_every == 0:
            show_samples(run)

    def score() -> None:
        if run.fid and run.step % options.fid_every == 0:
            score_fid(run, run.fid)

    stopped = loop.train_until_done(
        run,
        iter(make_loader(run)),
        lambda batch: batch_loss(run, batch),
        show=show,
        score=score,
    )
    if stopped is not None:
        return stopped
    finish(run)
    return 0


def make_loader(run: Run) -> Iterable[Batch]:
    """The rest of the run's batches."""
    plan, seed = run.plan, run.plan.config.run.seed
    latents = (
        None if plan.source.latents is None else TrainingLatents(plan.source, plan.flip, seed, plan.stored_teacher)
    )
    batches = loader.make_loader(run, Pixels(plan.source.channels, plan.resolution, plan.flip, seed), latents)
    return prefetched(iter(batches), run.draws.ready)


def batch_loss(run: Run, batch: Batch) -> torch.Tensor:
    """Mean loss of a micro batch; every random number is a function of (seed, position)."""
    plan, device = run.plan, run.accelerator.device
    data = batch.images.to(device, non_blocking=True)  # (B, channels, side, side)
    wanted = None if batch.features is None else batch.features.to(device, non_blocking=True).permute(0, 2, 3, 1)
    if plan.live_teacher is not None:
        with run.accelerator.autocast():
            wanted = plan.live_teacher.features(data)  # before the network's pass holds its activations
    drawn = batch.draws or run.draws.of(batch.positions)
    if run.draws.on_device:
        drawn = drawn | run.draws.normal(batch.positions)
    labels = drop_labels(batch.labels, drawn["label_dropout"], run.plan)
    drawn = {name: tensor.to(device, non_blocking=True) for name, tensor in drawn.items()}
    if plan.space is not None:
        draw = drawn.get("vae")
        if plan.source.latents is None:
            data = encode_images(plan.vae, plan.space, data, draw)
        else:
            data = draw_latents(plan.space, data, draw)

    depth = depth_of_features(plan.terms)
    outputs: list[ClassConditionalOutput] = []

    def network(
        noisy: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, end: torch.Tensor | None = None
    ) -> torch.Tensor:
        outputs.append(
            run.model(noisy, timestep, class_labels, features_after=depth, end_timestep=end, kept=drawn.get("kept"))
        )
        return outputs[-1].sample

    def teacher(
        noisy: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        with run.accelerator.autocast():
            return run.average.ask(noisy, timestep, class_labels, end_timestep=end).sample

    labels = labels.to(device, non_blocking=True)
    drawn_now = Drawn(data, labels, drawn["noise"], drawn["time"], wanted)
    jumps = Jumps(drawn["end"], teacher, len(plan.source.id2label)) if "end" in drawn else None
    loss = plan.objective.losses(network, data, labels, drawn["noise"], drawn["time"], jumps)["loss"].mean()
    return sum((term(outputs[-1], drawn_now) for term in plan.terms), start=loss)


def drop_labels(labels: torch.Tensor, uniform: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Labels (B,) in which a share, by a number in [0, 1) drawn once a sample, became "no class" (the next id)."""
    return labels.masked_fill(uniform < plan.config.optimization.class_dropout_prob, len(plan.source.id2label))


def finish(run: Run) -> None:
    """Show the result, save the pipeline into the run's folder, say what to do next."""
    options = run.plan.config.run
    if options.sample_every and run.step % options.sample_every:
        show_samples(run)
    saving.publish(run, "model_index.json")
    if run.accelerator.is_main_process:
        plot_losses(run)
        names = run.plan.source.id2label
        run.say(f'done: DEMOPipeline.from_pretrained("{run.output_dir}")({repr(names[0]) if names else ""}).images[0]')
        if run.repository:
            run.say(f"uploaded: {hub.push(run.output_dir, run.repository, run.step)}")
    run.accelerator.wait_for_everyone()
