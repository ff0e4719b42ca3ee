"""From options to everything a run needs: data, batch layout, model, averaged copy, optimizer, pipeline."""

import functools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from d_emo.common.digests import weights_digest
from d_emo.images.autoencoders import LatentSpace, doubtful_scale
from d_emo.images.features import StoredTeacher
from d_emo.images.latent_cache import LatentCache
from d_emo.images.source import ImageSource
from d_emo.models import ClassConditionalTransformer2DModel, create_model
from d_emo.models.flops import count_macs, count_parameters
from d_emo.pipelines import DEMOPipeline, default_steps
from d_emo.train.diffusion.alignment import add_projector
from d_emo.train.diffusion.choose_objective import make_objective
from d_emo.train.diffusion.config import (
    WSD,
    DiffusionRunOptions,
    TrainConfig,
)
from d_emo.train.diffusion.encode_plan import describe_cache, macs_of_encoding
from d_emo.train.diffusion.init_from import InitialWeights
from d_emo.train.diffusion.latent_spaces import OWN, check_latents, choose_space, identity_of, resolution_of, side_of
from d_emo.train.diffusion.lora import add_lora, set_mode
from d_emo.train.diffusion.memory import DiffusionStep
from d_emo.train.diffusion.network_config import depth_of, network_config
from d_emo.train.diffusion.objectives import Objective, prediction_of
from d_emo.train.diffusion.on_gpus import GpuPlan
from d_emo.train.diffusion.optimizer import WITHOUT_WARMUP, describe_optimizer, make_optimizer
from d_emo.train.diffusion.resolving import (
    COLORS,
    check_fid,
    choose_vae,
    in_color,
    initial_weights,
    max_train_steps,
    model_name,
    output_dir,
    vae_name,
)
from d_emo.train.diffusion.teacher import Teacher
from d_emo.train.diffusion.terms import Term, check_terms, depth_of_features, make_terms
from d_emo.train.diffusion.token_dropping import fusion_config
from d_emo.train.engine.batch_layout import BatchLayout, batch_layout
from d_emo.train.engine.fit import fitting_warmup, time_of_training
from d_emo.train.engine.followed import describe_snapshots
from d_emo.train.engine.memory import Launch, told

# Sampler steps of a grid, at most.
GRID_STEPS = 50


@dataclass(frozen=True)
class Plan:
    """A run, resolved: no option is left at "default".

    Attributes:
        resolution: image side in pixels.
        max_train_steps: optimizer steps in all.
        warmup_steps: of them.
        vae: the autoencoder, or None for pixels.
        space: its latents as they are normalised, or None for pixels.
        scale: where their mean and deviation come from, for people; empty for the autoencoder's own.
        flip: whether images are mirrored at random.
        initial: what the run starts from, if not from fresh weights.
        model_config: overrides for `create_model`; with `initial`, the whole configuration.
        latent_shape: (C, H, W) of what the model sees.
        launch: what it is computed on.
    """

    config: TrainConfig
    source: ImageSource
    objective: Objective
    layout: BatchLayout
    resolution: int
    max_train_steps: int
    warmup_steps: int
    vae: Any
    space: LatentSpace | None
    scale: str
    flip: bool
    output_dir: Path
    initial: InitialWeights | None
    model_config: dict[str, Any]
    latent_shape: tuple[int, int, int]
    launch: Launch

    def build_model(self) -> ClassConditionalTransformer2DModel:
        """The model with fresh weights, or with those of --init-from."""
        if self.initial is not None:
            return self.initial.build(self.model_config, self.source.id2label)
        return create_model(self.config.model.model, **self.model_config)

    def build_trained(self) -> ClassConditionalTransformer2DModel:
        """The model as it is trained: with adapters where --lora-rank asks for them, with a projector for --align."""
        model, options = self.build_model(), self.config.model
        if options.lora_rank is not None:
            add_lora(model, options.lora_rank, options.lora_alpha or options.lora_rank)
        if self.teacher is not None:
            add_projector(model, self.teacher.shape[-1])
        return model

    @functools.cached_property
    def terms(self) -> list[Term]:
        """What is added to the objective's loss."""
        return make_terms(
            self.config.recipe, self.objective, self.model_config.get("guide_block"), len(self.source.id2label)
        )

    @functools.cached_property
    def teacher(self) -> Teacher | StoredTeacher | None:
        """What the network is aligned with, on the processor, or its features beside the latents."""
        name, (_, height, width) = self.config.recipe.align, self.latent_shape
        if name is None:
            return None
        with torch.device("meta"):
            patch = self.build_model().config.patch_size
        grid = height // patch, width // patch
        if grid == (1, 1):
            raise ValueError(
                f"--align {name}: {self.model_name} has one token for all of an image, and alignment is about where "
                "things are; choose a model of smaller patches, or larger images."
            )
        if isinstance(self.source.latents, LatentCache):
            return StoredTeacher(name, self.source.latents)
        return Teacher(name, grid)

    @property
    def live_teacher(self) -> Teacher | None:
        """What looks at every image of a step."""
        return self.teacher if isinstance(self.teacher, Teacher) else None

    @property
    def stored_teacher(self) -> StoredTeacher | None:
        """Whose features are read with the latents."""
        return self.teacher if isinstance(self.teacher, StoredTeacher) else None

    @property
    def model_name(self) -> str:
        """What to call the model."""
        return model_name(self.config)

    def identity(self) -> dict[str, Any]:
        """What decides a run's results: its options with defaults resolved, and its data."""
        options = self.config.optimization
        # A constant rate does not depend on the run's length, but for a warm-up that had to be shortened.
        shortened = self.warmup_steps != options.lr_warmup_steps
        constant = options.lr_scheduler == "constant" or (
            options.lr_scheduler == "constant_with_warmup" and not shortened
        )
        return {
            **self.config.flat(),
            # --max-train-steps may change on resuming, unless it shapes the learning rate.
            "lr_schedule_steps": None if constant else self.max_train_steps,
            "resolution": self.resolution,
            "time_shift": self.objective.time_shift,
            "color": COLORS.get(self.source.channels, self.config.model.color),
            "random_flip": self.flip,
            "vae_digest": weights_digest(self.vae),
            "latent_space": None if self.space is None else identity_of(self.space),
            # Statistics that are measured later do not concern a run that began without.
            "latent_statistics": OWN if self.space and not self.scale else self.config.model.latent_statistics,
            **({} if self.teacher is None else {"align_digest": self.teacher.digest}),
            **self.source.identity(),
        }

    def describe(self) -> str:
        """What would run, for people."""
        with torch.device("meta"):
            model, trained = self.build_model(), self.build_trained()
        adapters = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
        options, layout, macs = self.config, self.layout, count_macs(model)
        classes, doubt = len(self.source.id2label), self._doubt()
        space = "pixels"
        if self.space is not None:
            named = vae_name(options.model, self.source, self.resolution, self.initial)
            space = f"latents of {named} ({self.space.describe()})"
        shape = " x ".join(map(str, self.latent_shape))
        seen = self.max_train_steps * layout.global_batch_size
        epochs = f"{seen / self.source.size:,.1f} epochs" if self.source.size else f"{seen:,} images"
        lines = {
            "model": f"{self.model_name}: {count_parameters(model):,} parameters, "
            f"{macs / 1e9:.3f} GMACs an image (forward)"
            + ("" if options.model.lora_rank is None else f"; {adapters:,} trained, LoRA and labels"),
            "data": f"{self.source.name}: {self.source.describe_size()}, {classes or 'no'} classes, "
            f"{self.resolution} x {self.resolution}, {'' if self.flip else 'not '}mirrored at random",
            "space": f"{space}, {shape}{self.cache_hint()}",
            **({"statistics": self.scale} if self.scale else {}),
            "objective": f"{options.optimization.objective} ({prediction_of(self.objective.prediction_type)}"
            f"{f' on the {self.objective.flow_path} path' if self.objective.flow_path else ''}{self._shift()}), "
            f"{self._jumps(model)}"
            "label dropout "
            f"{options.optimization.class_dropout_prob if classes else 0}",
            **({} if self.teacher is None else {"alignment": self._alignment(self.teacher)}),
            "optimizer": f"{describe_optimizer(trained, options.optimization)}, learning rate "
            f"{options.optimization.learning_rate:g} ({options.optimization.lr_scheduler}{self._warmup()}"
            f"{self._cooldown()}), averaging {options.optimization.ema_decay}",
            "batch": layout.describe(),
            **self._cost(self.step(model, trained), macs, seen, epochs),
            **({"snapshots": self._snapshots(model)} if self.config.followed else {}),
            "kernels": self.launch.kernels(),
            "output": str(self.output_dir),
            **({"note": f"{doubt}."} if doubt else {}),
        }
        return "\n".join(f"  {name:<10} {value}" for name, value in lines.items())

    def _alignment(self, teacher: Teacher | StoredTeacher) -> str:
        """What the plan says of alignment."""
        options = self.config.recipe
        return f"with {teacher.describe()}, after block {options.align_block}, weight {options.align_weight:g}"

    def _warmup(self) -> str:
        """What the plan says of the warm-up, also where the schedule has none."""
        if not self.warmup_steps:
            return ""
        said = f", {self.warmup_steps:,} steps of warm-up"
        if self.config.optimization.lr_scheduler not in WITHOUT_WARMUP:
            return said
        return f"{said}, which this schedule leaves out: --lr-scheduler constant_with_warmup has them"

    def _cooldown(self) -> str:
        """What the plan says of a schedule's last part, where it has one."""
        options = self.config.optimization
        if options.lr_scheduler != WSD:
            return ""
        return f", {options.lr_cooldown} down over the last {options.lr_cooldown_share:.0%}"

    def _jumps(self, model: ClassConditionalTransformer2DModel) -> str:
        """What the plan says of a flow map."""
        block = model.config.end_block
        if block is None:
            return ""
        guidance = self.config.flow_map.flow_map_guidance
        told = "" if guidance == 1 else f", guidance {guidance:g} in the weights"
        return f"{block} of {model.config.num_layers} blocks see the present time, the rest a jump's end{told}, "

    def _shift(self) -> str:
        """What the plan says of the time shift: that of this run, and of the one that it starts from."""
        given = self.objective.time_shift
        trained = given if self.initial is None else self.initial.time_shift
        text = "" if given == 1 else f", times shifted by {given:.4g}"
        return text if trained == given else f"{text}; --init-from was trained with --time-shift {trained:.4g}"

    def _snapshots(self, model: torch.nn.Module) -> str:
        """What snapshots take."""
        config = self.config
        return describe_snapshots(model, config.followed, config.run.snapshot_every, self.max_train_steps)

    def _doubt(self) -> str:
        """What looks wrong about the autoencoder's own statistics, where a run on them begins."""
        taken = self.vae is not None and not self.scale and (self.initial is None or self.initial.space is None)
        return doubtful_scale(self.vae) if taken else ""

    def _cost(self, step: DiffusionStep, macs: int, seen: int, epochs: str) -> dict[str, str]:
        """What the run takes of time and memory, by topic.

        Args:
            step: its step.
            macs: multiply-adds of the network's forward pass of an image.
            seen: images of the whole run.
            epochs: the same, for people.
        """
        if self.launch.fleet is not None:
            return self._on_gpus(step, epochs).lines()
        checkpointing = self.config.model.gradient_checkpointing
        time = told(lambda: time_of_training(macs, seen, self.launch, self._macs_before(macs)))
        return {
            "length": ", ".join(filter(None, (f"{self.max_train_steps:,} steps", epochs, time))),
            "memory": told(lambda: step.describe(checkpointing)),
        }

    def _on_gpus(self, step: DiffusionStep, epochs: str) -> GpuPlan:
        """The run on the GPUs that --on names."""
        return GpuPlan(
            config=self.config,
            step=step,
            layout=self.layout,
            size="" if self.initial or self.config.model.patch_bottleneck else self.config.model.model,
            steps=self.max_train_steps,
            epochs=epochs,
            image_bytes=self._bytes_read(),
        )

    def _bytes_read(self) -> int | None:
        """Bytes that are read of an image where latents are, one view with its features; None for pictures."""
        if not isinstance(self.source.latents, LatentCache):
            return None
        read: list[LatentCache | StoredTeacher] = [
            self.source.latents,
            *([] if self.stored_teacher is None else [self.stored_teacher]),
        ]
        return sum(each.manifest.image_bytes // each.manifest.flips for each in read)

    def _macs_before(self, macs: int) -> int:
        """Multiply-adds of what is done with an image before its training step, without gradients."""
        encoded = self._encoded()
        before = 0 if encoded is None else macs_of_encoding(self.vae, encoded[1:], self.launch.device)
        before += 0 if self.live_teacher is None else self.live_teacher.macs(self.launch.device)
        return before + (2 * macs if self.model_config["end_block"] is not None else 0)  # answers to a flow map's jumps

    def _encoded(self) -> tuple[int, int, int, int] | None:
        """Shape of the images that are encoded in a step; None where none are."""
        if self.vae is None or self.source.latents is not None:
            return None
        return (self.layout.micro_batch_size, self.source.channels, self.resolution, self.resolution)

    def cache_hint(self) -> str:
        """What latents encoded beforehand would take, where every image is encoded in every epoch."""
        if self.space is None or self._encoded() is None or not self.source.size:
            return ""
        size = describe_cache(self.space, self.source.size, 1 + self.flip, self.latent_shape, "float32")
        return f", encoded in every epoch; once by train/encode_latents.py: {size}"

    def step(
        self, model: ClassConditionalTransformer2DModel, trained: ClassConditionalTransformer2DModel
    ) -> DiffusionStep:
        """What a step's memory depends on, of the model and the model as it is trained, on the meta device."""
        adapted = self.config.model.lora_rank is not None
        set_mode(trained, frozen_norms=adapted)
        return DiffusionStep(
            model=trained,
            followed=len(self.config.followed),
            plain=model if adapted or self.launch.sharded else None,
            optimizer={"adamw": "AdamW", "muon": "Muon and AdamW"}[self.config.optimization.optimizer],
            make_optimizer=lambda module: make_optimizer(module, self.config.optimization),
            launch=self.launch,
            micro_batch=self.layout.micro_batch_size,
            accumulation=self.layout.accumulation,
            vae=self.vae,
            images=self._encoded(),
            teacher=self.live_teacher,
            aligned=None if self.teacher is None else self.teacher.shape,
            features_after=depth_of_features(self.terms),
        )


def make_plan(config: TrainConfig, source: ImageSource, accelerator: Accelerator) -> Plan:
    """Resolve every default and check that the parts fit.

    Raises:
        ValueError: they do not; the message names the option and the remedy.
    """
    launch = Launch.of(accelerator, config.run.fleet())
    if config.model.lora_rank is not None and launch.sharded:
        raise ValueError(f"--lora-rank {config.model.lora_rank}: adapters are small; launch without FSDP.")
    check_fid(config.run, source)
    initial = initial_weights(config)
    vae, resolution = choose_vae(config.model, source, initial)
    source = in_color(source, config.model.color, None if vae else initial)
    if source.latents is not None:
        check_latents(config, source.latents.manifest, vae)
    space, scale = choose_space(config, source, vae, initial)
    resolution = resolution_of(config.model.resolution, resolution, space)
    channels, side = (source.channels, resolution) if space is None else (space.channels, side_of(space, resolution))
    if space is not None and source.latents is None and space.image_channels != source.channels:
        raise ValueError(
            f"--vae {config.model.vae} takes {space.image_channels} channels, {source.name} has {source.channels}; "
            f"use --color {'grey' if space.image_channels == 1 else 'rgb'}, or --vae none."
        )
    objective = make_objective(config.optimization, (channels, side, side), config.flow_map)
    model_config = network_config(config, initial, objective, (channels, side), len(source.id2label))
    model_config |= fusion_config(config, initial, side)
    layout = batch_layout(
        config.run.global_batch_size,
        config.run.micro_batch_size,
        launch.processes,
        launch.runs_on.type == "cpu",
    )
    check_terms(config.recipe, source, layout.micro_batch_size, depth_of(config, initial))
    steps = max_train_steps(config.run, source, layout)
    plan = Plan(
        initial=initial,
        config=config,
        source=source,
        objective=objective,
        layout=layout,
        resolution=resolution,
        max_train_steps=steps,
        warmup_steps=fitting_warmup(config.optimization.lr_warmup_steps, steps),
        vae=vae,
        space=space,
        scale=scale,
        flip=source.flip if config.data.random_flip is None else config.data.random_flip,
        output_dir=output_dir(config, source),
        model_config=initial.config(model_config) if initial else model_config,
        latent_shape=(channels, side, side),
        launch=launch,
    )
    _ = plan.teacher  # refuses what does not load
    return plan


def grid_steps(options: DiffusionRunOptions, pipeline: DEMOPipeline) -> int:
    """Sampler steps of a grid: those that were asked for, else 50, or those that a sampler of few steps is made for."""
    return options.sample_steps or min(GRID_STEPS, pipeline.config.default_num_inference_steps)


def make_pipeline(model: Any, plan: Plan) -> DEMOPipeline:
    """A model (the averaged one) with what it takes to sample from it and to save it."""
    scheduler = plan.objective.make_scheduler()
    pipeline = DEMOPipeline(
        transformer=model,
        scheduler=scheduler,
        vae=plan.vae,
        id2label=plan.source.id2label,
        default_num_inference_steps=default_steps(scheduler),
        latent_space=None if plan.space is None else asdict(plan.space),
    )
    if plan.config.run.sample_every:
        pipeline.check_steps(grid_steps(plan.config.run, pipeline))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
