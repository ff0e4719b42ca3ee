"""What a plan says of GPUs that are not here (`--dry-run --on 64xH100`): memory, speed, time, reading, checkpoints."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from d_emo.common.gpus import Fleet
from d_emo.common.messages import readable_size
from d_emo.images.latent_manifest import latent_bytes
from d_emo.models import DEMOTransformer2DModel
from d_emo.train.diffusion.config import TrainConfig
from d_emo.train.diffusion.memory import DiffusionStep
from d_emo.train.diffusion.recipe_options import RecipeOptions
from d_emo.train.engine import fleet as engine
from d_emo.train.engine.batch_layout import MIN_MICRO_BATCH, BatchLayout
from d_emo.train.engine.memory import TrainingMemory, told
from d_emo.train.engine.rehearsal import size_of
from d_emo.train.engine.roofline import AVERAGE_BYTES, COMPILED, OPTIMIZER_BYTES, UNCOMPILED

# Of the activations that are kept without it, what compiled blocks keep: `d_emo.eval.benchmarks.gpu.planned` has them.
KEPT_BY_COMPILED, KEPT_BY_COMPILED_DIT = 0.88, 0.72
# Pictures of 256 x 256 that a core reads and decodes in a second ("Reading latents and pictures" in docs/speed.md).
DECODED, DECODED_SIDE = 2000, 256


@dataclass(frozen=True, kw_only=True)
class GpuPlan:
    """A run on GPUs that are not here.

    Attributes:
        config: its options.
        step: what a step computes; its launch names the GPUs.
        layout: of the global batch.
        size: the model's name, where it is one of the package's as it is; else "".
        steps: in all.
        epochs: the same, for people.
        image_bytes: of an image's latents; None for pictures.
        resolution: of pictures.
        macs_before: counts the multiply-adds of what is done with an image before its step: by the autoencoder, a
            teacher, a flow.
    """

    config: TrainConfig
    step: DiffusionStep
    layout: BatchLayout
    size: str
    steps: int
    epochs: str
    image_bytes: int | None
    resolution: int
    macs_before: Callable[[], int]

    @property
    def fleet(self) -> Fleet:
        """The GPUs."""
        assert self.step.launch.fleet is not None
        return self.step.launch.fleet

    @property
    def checkpointing(self) -> bool:
        """Whether activations are computed again."""
        return self.config.model.gradient_checkpointing

    @property
    def trained(self) -> int:
        """Values that are trained."""
        return sum(parameter.numel() for parameter in self.step.model.parameters() if parameter.requires_grad)

    def with_fsdp(self) -> "GpuPlan":
        """The same with FSDP2."""
        return replace(self, step=replace(self.step, launch=replace(self.step.launch, sharded=True)))

    def lines(self) -> dict[str, str]:
        """What the plan says, by topic."""
        counted = {
            "memory": self.describe_memory,
            "fits": self.fits,
            "speed": self.speed,
            "length": self.length,
            "reading": self.reading,
            "checkpoint": self.checkpoints,
        }
        about = f"{self.fleet.describe()}: planned from shapes, nothing was run on them"
        return {"gpus": about} | {topic: told(describe) for topic, describe in counted.items()}

    def describe_memory(self) -> str:
        """What a step holds, by parts."""
        micro = self.layout.micro_batch_size
        return self.memory(self.checkpointing, micro).describe(self.step.optimizer, f"micro batch {micro}")

    def length(self) -> str:
        """How long the run takes."""
        return f"{self.steps:,} steps, {self.epochs}, {_time(self.steps * self.time.total)}"

    def memory(self, checkpointing: bool, micro_batch: int) -> TrainingMemory:
        """What a step of so many images holds on a GPU."""
        key = checkpointing, micro_batch
        if key not in self.counted:  # a large network takes seconds
            memory = self.step.of(micro_batch).memory(checkpointing)
            ours = isinstance(self.step.model, DEMOTransformer2DModel)
            kept = KEPT_BY_COMPILED if ours else KEPT_BY_COMPILED_DIT
            squeezed = self.config.model.compile and not checkpointing
            self.counted[key] = engine.compiled(memory, kept) if squeezed else memory
        return self.counted[key]

    @functools.cached_property
    def counted(self) -> dict[tuple[bool, int], TrainingMemory]:
        """What was counted so far, by checkpointing and images."""
        return {}

    def fits(self) -> str:
        """Whether a step fits a GPU, and how much more would."""
        micro, room = self.layout.micro_batch_size, engine.room(self.fleet)
        said = [engine.verdict(self.memory(self.checkpointing, micro), self.fleet)]
        for checkpointing in sorted({self.checkpointing, True}):
            most = engine.largest_micro_batch(functools.partial(self.memory, checkpointing), micro, room)
            how = " with --gradient-checkpointing true" * (checkpointing and not self.checkpointing)
            said.append(f"up to {most:,} images at once{how}" if most else f"not one image{how}")
        if self.fleet.count > 1 and self.config.model.lora_rank is None and not self.step.launch.sharded:
            sharded = self.with_fsdp().memory(self.checkpointing, micro)
            said.append(f"with FSDP2 {engine.verdict(sharded, self.fleet)}")
        if micro < MIN_MICRO_BATCH:
            said.append(f"BatchNorm sees {micro} image{'s' * (micro > 1)} at once, which is few")
        return "; ".join(said)

    @functools.cached_property
    def measured(self) -> float | None:
        """Seconds of a micro batch, if they were measured."""
        model, (height, width) = self.config.model, self.step.model.sample_shape
        as_measured = (
            self.size
            and self.step.launch.autocast
            and self.step.optimizer == "AdamW"
            and self.config.recipe == RecipeOptions()
            and model.compile_mode == "blocks"
            and (self.step.model.config.in_channels, width) == (4, height)
        )
        if not as_measured:
            return None
        micro = self.layout.micro_batch_size
        return engine.measured_seconds(self.fleet.gpu.name, self.size, micro, height, model.compile, self.checkpointing)

    @functools.cached_property
    def computing(self) -> float:
        """Seconds that a GPU computes in an optimizer step."""
        gpu, shares, launch = self.fleet.gpu, COMPILED if self.config.model.compile else UNCOMPILED, self.step.launch
        own = self.trained / (launch.processes if launch.sharded else 1)  # values that a GPU changes
        averaging = shares.rest * AVERAGE_BYTES * (1 + self.step.followed) * own / gpu.bandwidth
        before = shares.products * 2 * self.macs_before() * self.layout.micro_batch_size / gpu.tf32  # taken as float32
        if self.measured is not None:
            return self.layout.accumulation * (self.measured + before) + averaging
        work = self.step.work(self.checkpointing)
        once = work.seconds(gpu, gpu.bfloat16 if launch.autocast else gpu.tf32, shares)
        optimizing = shares.rest * OPTIMIZER_BYTES * own / gpu.bandwidth
        return self.layout.accumulation * (once + before) + optimizing + averaging

    @functools.cached_property
    def time(self) -> engine.StepTime:
        """Of an optimizer step."""
        sharded = self.step.launch.sharded
        return engine.step_time(self.fleet, self.computing, self.trained, self.layout.accumulation, sharded)

    @property
    def images_per_second(self) -> float:
        """Of all GPUs."""
        return self.layout.global_batch_size / self.time.total

    def speed(self) -> str:
        """Images a second, and of what a step is made."""
        rate, time, fleet = self.images_per_second, self.time, self.fleet
        how = "by a roofline of its operators" if self.measured is None else "measured on one GPU"
        said = (
            f"{rate:,.0f} images/s, {rate / fleet.count:,.0f} a GPU; of a step {_milliseconds(time.computing)} are "
            f"computing, {how}"
        )
        if fleet.count > 1:
            what = "weights and gradients" if self.step.launch.sharded else "gradients"
            between = "between machines" if fleet.machines > 1 else "in the machine"
            said += (
                f", and {_milliseconds(time.waiting)} waiting for {what}, which take "
                f"{_milliseconds(time.exchange)} at {fleet.share_of_network / 1e9:.3g} GB/s a GPU {between}"
            )
        return said if self.config.model.compile else f"{said}; --compile true is faster on GPUs"

    def reading(self) -> str:
        """What the loaders of a machine have to bring."""
        rate = self.images_per_second / self.fleet.machines
        if self.image_bytes is not None:
            return f"{rate:,.0f} images/s a machine, {readable_size(round(rate * self.image_bytes))}/s of latents"
        cores = rate / DECODED * (self.resolution / DECODED_SIDE) ** 2
        return f"{rate:,.0f} images/s a machine, decoded by about {math.ceil(cores):,} core{'s' * (cores > 1)}"

    def checkpoints(self) -> str:
        """What is written, and how often."""
        run, memory = self.config.run, self.memory(self.checkpointing, self.layout.micro_batch_size)
        share = self.step.launch.processes if self.step.launch.sharded else 1
        size = size_of(self.step.model.state_dict()) + share * (memory.optimizer + memory.average)
        count = -(-self.steps // run.checkpoint_every)
        kept = min(count, run.keep_checkpoints or count)
        every = _time(run.checkpoint_every * self.time.total)
        return (
            f"{readable_size(size)} every {run.checkpoint_every:,} steps, {every}; {kept} kept: "
            f"{readable_size(kept * size)}"
        )


def bytes_read(source_latents: object) -> int | None:
    """Bytes that are read of an image's latents, one view; None for pictures."""
    manifest = getattr(source_latents, "manifest", None)
    return None if manifest is None else latent_bytes(manifest.latent_space, manifest.shape, 1, manifest.dtype)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g} ms" if seconds < 10 else f"{seconds:,.0f} s"


def _time(seconds: float) -> str:
    if seconds < 90 * 60:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:,.1f} hours" if seconds < 100 * 3600 else f"{seconds / 86400:,.1f} days"
