"""What a plan says of GPUs that are not here (`--dry-run --on 64xH100`): memory, speed, time, reading, checkpoints."""

import functools
from dataclasses import dataclass, replace

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from d_emo.common.gpus import Fleet
from d_emo.common.messages import readable_size
from d_emo.kernels.dispatch import chosen_backend
from d_emo.models import DEMOTransformer2DModel
from d_emo.train.diffusion.config import TrainConfig
from d_emo.train.diffusion.memory import DiffusionStep
from d_emo.train.diffusion.recipe_options import RecipeOptions
from d_emo.train.engine import fleet as engine
from d_emo.train.engine.batch_layout import MIN_MICRO_BATCH, BatchLayout
from d_emo.train.engine.memory import TrainingMemory, told
from d_emo.train.engine.rehearsal import size_of
from d_emo.train.engine.roofline import AVERAGE_BYTES, COMPILED, GRAPHS, OPTIMIZER_BYTES, UNCOMPILED, Shares

# Of the activations that are kept without it, what compiled blocks keep: `d_emo.eval.benchmarks.gpu.planned` has them.
KEPT_BY_COMPILED, KEPT_BY_COMPILED_DIT = 0.88, 0.72
# JPEGs of 256 x 256 that a core reads and decodes in a second ("Reading latents and pictures" in docs/speed.md).
DECODED = 2000
# Images below which no compiled step was measured.
FEW = 64


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
        image_bytes: that are read of an image; None for pictures.
    """

    config: TrainConfig
    step: DiffusionStep
    layout: BatchLayout
    size: str
    steps: int
    epochs: str
    image_bytes: int | None

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
        """The same with FSDP2, where every process holds a whole network to draw with, too."""
        launch = replace(self.step.launch, sharded=True)
        return replace(self, step=replace(self.step, launch=launch, plain=self.step.model))

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
        """How long the run takes, at the rate of bare steps."""
        return f"{self.steps:,} steps, {self.epochs}, {_time(self.steps * self.time.total)} of such steps"

    def memory(self, checkpointing: bool, micro_batch: int) -> TrainingMemory:
        """What a step of so many images holds on a GPU."""
        key = checkpointing, micro_batch
        if key not in self.counted:  # a large network takes seconds
            memory = self.step.of(micro_batch).memory(checkpointing)
            squeezed = self.config.model.compile and not checkpointing
            self.counted[key] = engine.compiled(memory, kept_by_compiled(self.step.model)) if squeezed else memory
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
        normalised = any(isinstance(part, _BatchNorm) and part.training for part in self.step.model.modules())
        if normalised and micro < MIN_MICRO_BATCH:
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
            and (chosen_backend() != "reference" or not isinstance(self.step.model, DEMOTransformer2DModel))
            and (self.step.model.config.in_channels, width) == (4, height)
        )
        if not as_measured:
            return None
        micro = self.layout.micro_batch_size
        return engine.measured_seconds(self.fleet.gpu.name, self.size, micro, height, model.compile, self.checkpointing)

    @property
    def shares(self) -> Shares:
        """How near to the card's rates the network's operators come."""
        if not self.config.model.compile:
            return UNCOMPILED
        return GRAPHS if self.config.model.compile_mode == "graphs" else COMPILED

    @functools.cached_property
    def passes(self) -> float:
        """Seconds of the forward and backward passes of a micro batch."""
        gpu, launch = self.fleet.gpu, self.step.launch
        if self.measured is not None:
            return self.measured - self.shares.rest * OPTIMIZER_BYTES * self.trained / gpu.bandwidth
        flops = gpu.bfloat16 if launch.autocast else gpu.tf32
        return self.step.work(self.checkpointing).seconds(gpu, flops, self.shares)

    @functools.cached_property
    def computing(self) -> float:
        """Seconds that a GPU computes in an optimizer step."""
        gpu, launch = self.fleet.gpu, self.step.launch
        before = sum(
            work.seconds(gpu, gpu.bfloat16 if autocast and launch.autocast else gpu.tf32, UNCOMPILED)
            for work, autocast in self.step.before()
        )
        own = self.trained / (launch.processes if launch.sharded else 1)  # values that a GPU changes
        moved = OPTIMIZER_BYTES + AVERAGE_BYTES * (1 + self.step.followed)
        products, _, _ = self.step.optimizing().least(gpu, gpu.bfloat16)
        optimizing = self.shares.rest * moved * own / gpu.bandwidth + self.shares.products * products
        return self.layout.accumulation * (self.passes + before) + optimizing

    @functools.cached_property
    def time(self) -> engine.StepTime:
        """Of an optimizer step."""
        accumulation = self.layout.accumulation
        passes = accumulation * self.passes
        sharded = self.step.launch.sharded
        return engine.step_time(self.fleet, self.computing, passes, self.trained, accumulation, sharded)

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
            said += (
                f", and {_milliseconds(time.waiting)} waiting for {what}, which take "
                f"{_milliseconds(time.exchange)} at {fleet.ring / 1e9:.3g} GB/s from GPU to GPU"
            )
        if not self.config.model.compile:
            return f"{said}; --compile true is faster on GPUs"
        few = self.measured is None and self.layout.micro_batch_size < FEW
        return f"{said}; with so few images a GPU launches are the limit, which are guessed" if few else said

    def reading(self) -> str:
        """What the loaders of a machine have to bring."""
        rate = self.images_per_second / self.fleet.machines
        if self.image_bytes is not None:
            return f"{rate:,.0f} images/s a machine, {readable_size(round(rate * self.image_bytes))}/s of latents"
        return f"{rate:,.0f} images/s a machine (a core decodes about {DECODED:,} JPEGs of 256 x 256 a second)"

    def checkpoints(self) -> str:
        """What is written, and how often: the pipeline, and the state of weights, optimizer and averages."""
        run, step, memory = self.config.run, self.step, self.memory(self.checkpointing, self.layout.micro_batch_size)
        state = size_of(step.model.state_dict())
        published = state if step.plain is None else size_of(step.plain.state_dict())
        moments = memory.optimizer * (step.launch.processes if step.launch.sharded else 1)
        size = published + memory.encoder + state * (1 + step.followed) + moments
        kept = checkpoints_kept(self.steps, run.checkpoint_every, run.keep_checkpoints, run.keep_every)
        every = _time(run.checkpoint_every * self.time.total)
        return (
            f"{readable_size(size)} every {run.checkpoint_every:,} steps, {every}; {kept} kept: "
            f"{readable_size(kept * size)}"
        )


def checkpoints_kept(steps: int, every: int, last: int | None, also_every: int | None) -> int:
    """How many checkpoints a run leaves; see `checkpoints.prune_checkpoints`.

    Args:
        steps: of the run, whose last one is saved, too.
        every: steps between two.
        last: of the newest so many stay; None keeps all.
        also_every: those at multiples of so many steps stay as well.
    """
    saved = [*range(every, steps, every), steps]
    older = saved[: -last if last else len(saved)] if last else []
    return len(saved) - sum(also_every is None or step % also_every != 0 for step in older)


def kept_by_compiled(model: torch.nn.Module) -> float:
    """The share of activations that a network's compiled blocks keep."""
    return KEPT_BY_COMPILED if isinstance(model, DEMOTransformer2DModel) else KEPT_BY_COMPILED_DIT


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f} ms" if seconds >= 0.1 else f"{1e3 * seconds:.3g} ms"


def _time(seconds: float) -> str:
    if seconds < 90:
        return "under a second" if seconds < 1 else f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:,.1f} hours" if seconds < 100 * 3600 else f"{seconds / 86400:,.1f} days"
