"""How samples are drawn for a score: the settings, the protocols of the literature by name, the samplers.

Published FIDs differ in choices that papers mention in passing. A preset fixes all of them; a score that departs from
its preset says so. `PUBLICATIONS` has the sources.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from d_emo.common.command_line import flag
from d_emo.common.numbers import finite_by
from d_emo.common.ranges import RELATIVE_LENGTH, Maybe, OneOf, Real, Rule, Table, Whole
from d_emo.eval.fid.names import GUIDERS
from d_emo.images.autoencoders import LatentSpace
from d_emo.pipelines import DEMOPipeline
from d_emo.pipelines.checks import MAX_GUIDANCE, takes_guidance
from d_emo.pipelines.samplers import fitting_samplers, make_scheduler, own_shift, predicted
from d_emo.schedulers import FlowMatchODESolverScheduler
from d_emo.schedulers.flow_ode import ADAPTIVE
from d_emo.schedulers.flow_paths import SHIFT, dimension_shift, path_of

FT_MSE = "stabilityai/sd-vae-ft-mse"
FT_EMA = "stabilityai/sd-vae-ft-ema"
# What these two decode; presets that name one of them are for models of such latents.
SD_LATENTS = LatentSpace(autoencoder="AutoencoderKL", channels=4, factor=8, std=(1 / 0.18215,))
PUBLISHED_COUNT = 50_000
ADM_STATISTICS = "ADM's file"

SamplerName = Literal["ddpm", "ddim", "euler", "heun", "sde", "sde-heun", "flow-map", "own", "fast"]
LabelRule = Literal["random", "balanced"]
Weights = Literal["averaged", "raw"]
Type = Literal["float32", "bfloat16", "float16"]
AUTO_SHIFT: Literal["auto"] = "auto"
EVERYWHERE = (0.0, 1.0)
# What "fast" stands for, one a kind of model.
FAST: tuple[SamplerName, ...] = ("ddim", "euler", "flow-map")


@dataclass(frozen=True)
class Interval(Rule):
    """A part of the way from noise (0) to data (1): two numbers, START below STOP."""

    def take(self, value: Any) -> tuple[float, float]:
        """See `Rule`."""
        if isinstance(value, str) or not isinstance(value, list | tuple) or len(value) != 2:
            raise ValueError
        start, stop = (float(Real(0, 1).take(end)) for end in value)
        if not start < stop:
            raise ValueError
        return start, stop

    def __str__(self) -> str:
        return "START and STOP with 0 <= START < STOP <= 1 (0 1 guides everywhere)"


@dataclass(frozen=True)
class Shift(Rule):
    """What schedulers take, or "auto"."""

    def take(self, value: Any) -> float | str:
        """See `Rule`."""
        return AUTO_SHIFT if isinstance(value, str) and value == AUTO_SHIFT else SHIFT.take(value)

    def __str__(self) -> str:
        return f"{SHIFT} or {AUTO_SHIFT}"


def read_shift(text: str) -> float | str:
    """The type of an argparse option that takes a shift."""
    return text if text == AUTO_SHIFT else finite_by(SHIFT)(text)


RULES: Table = {
    **dict.fromkeys(("num_images", "steps"), Whole(1)),
    "guidance_channels": Maybe(Whole(1)),
    "guidance_interval": Interval(),
    "time_shift": Maybe(Shift()),
    "guidance_scale": Real(1, MAX_GUIDANCE, hint="1 is no guidance, 0 would draw without class"),
    "guider": Maybe(OneOf(GUIDERS)),
    "internal_guidance": Real(1, MAX_GUIDANCE, hint="1 is none, 1.4 is the paper's"),
    "seed": Whole(0, 2**32 - 1),
    "sampler": OneOf(get_args(SamplerName)),
    "labels": OneOf(get_args(LabelRule)),
    "weights": OneOf(get_args(Weights)),
    "dtype": OneOf(get_args(Type)),
    "ema": Maybe(RELATIVE_LENGTH),
}


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Every choice that moves the samples.

    Attributes:
        num_images: how many are drawn; images 0 to num_images - 1 of the seed.
        sampler: ddpm (ancestral, DiT's), ddim; euler, heun, sde (Euler-Maruyama), sde-heun for flow models; flow-map;
            own: the pipeline's scheduler as it is; fast: ddim, euler or flow-map, as fits the model.
        steps: sampler steps; one step of heun or sde-heun evaluates the model twice.
        guidance_scale: classifier-free guidance, 1.0 is none.
        guidance_channels: guide the first so many channels only; None is all.
        guidance_interval: guide in this part of the way only, from 0 (noise) to 1 (data); a flow's 1 - time.
        guider: Diffusers' formula in the place of the plain one; see `DEMOPipeline`.
        guide: weaker model that is steered away from in the place of "no class", a folder, packaged name or Hub id.
        internal_guidance: away from the model's second output head, 1.0 is none.
        time_shift: of a flow's even steps, s -> shift s / (1 + (shift - 1) s) with noise at s = 1, so that above 1 more
            of them are near the noise; "auto" is RAE's rule, the square root of a latent's values over 4,096; None is
            what the pipeline's own scheduler has.
        labels: random: uniformly drawn classes (DiT); balanced: classes in turn.
        vae: decoder, a Hub id or folder; None: the one the pipeline carries, or none for pixels.
        seed: image i is a function of (seed, i).
        weights: the averaged weights, which pipelines hold, or the raw ones of a training checkpoint.
        dtype: of model and decoder: float32, bfloat16 or float16.
        ema: relative length of the power-function average that is made of a run's snapshots; None: the weights as they
            are stored.
    """

    num_images: int = PUBLISHED_COUNT
    sampler: SamplerName = "own"
    steps: int = 250
    guidance_scale: float = 1.0
    guidance_channels: int | None = None
    guidance_interval: tuple[float, float] = EVERYWHERE
    guider: str | None = None
    guide: str | None = None
    internal_guidance: float = 1.0
    time_shift: float | Literal["auto"] | None = None
    labels: LabelRule = "random"
    vae: str | None = None
    seed: int = 0
    weights: Weights = "averaged"
    dtype: Type = "float32"
    ema: float | None = None

    def __post_init__(self):
        for name, rule in RULES.items():
            object.__setattr__(self, name, rule.check(getattr(self, name), flag(name)))


PRESETS: dict[str, SamplingSettings] = {
    "dit-400k": SamplingSettings(sampler="ddpm", steps=250, vae=FT_MSE),
    "dit-script": SamplingSettings(sampler="ddpm", steps=250, guidance_scale=1.5, guidance_channels=3, vae=FT_EMA),
    "sit-sde": SamplingSettings(sampler="sde", steps=250, vae=FT_EMA),
    "sit-ode": SamplingSettings(sampler="heun", steps=125, vae=FT_EMA),
    "repa": SamplingSettings(sampler="sde", steps=250, guidance_scale=1.8, guidance_interval=(0.3, 1.0), vae=FT_EMA),
    "lightningdit": SamplingSettings(
        sampler="euler",
        steps=250,
        guidance_scale=6.7,
        guidance_channels=3,
        guidance_interval=(0.125, 1.0),
        time_shift=1 / 0.3,
    ),
    "rae": SamplingSettings(sampler="euler", steps=50, labels="balanced", time_shift=AUTO_SHIFT),
    "jit": SamplingSettings(
        sampler="heun", steps=50, labels="balanced", guidance_scale=3.0, guidance_interval=(0.1, 1.0)
    ),
    "quick": SamplingSettings(sampler="fast", steps=50, num_images=5_000),
}


@dataclass(frozen=True, kw_only=True)
class Publication:
    """Where a preset's settings are published, and what belongs to them besides sampling.

    Attributes:
        sources: of which settings, where.
        sides: image sizes with published scores; none for a preset of our own.
        unguided: whether the same settings without guidance are published too.
        statistics: file of a reference of its own; most take ADM's.
        note: what a reader should know, the other published guidance foremost.
    """

    sources: tuple[tuple[str, str], ...]
    sides: tuple[int, ...] = (256,)
    unguided: bool = False
    statistics: str | None = None
    note: str = ""

    def reference(self, side: int | str) -> str:
        """What its scores at a size are against."""
        return self.statistics.format(side=side) if self.statistics else ADM_STATISTICS


PUBLICATIONS: dict[str, Publication] = {
    "dit-400k": Publication(
        sources=(("all", "arXiv 2212.09748, section 5; arXiv 2412.06674, Table XIV"),),
        note="Table XIV states neither guidance nor decoder",
    ),
    "dit-script": Publication(
        sources=(("all", "facebookresearch/DiT, sample_ddp.py, its defaults"),),
        sides=(256, 512),
    ),
    "sit-sde": Publication(
        sources=(("all", "arXiv 2401.08740; willisma/SiT, sample_ddp.py"),),
        sides=(256, 512),
        note="its guided rows: 1.5",
    ),
    "sit-ode": Publication(
        sources=(("all", "arXiv 2401.08740; willisma/SiT, sample_ddp.py"),), note="249 evaluations of the model"
    ),
    "repa": Publication(
        sources=(
            ("sampler, steps, guidance", "sihyun-yu/REPA, README.md, section 4; arXiv 2410.06940"),
            ("part of the way", "README.md, --guidance-high=0.7; samplers.py, whose time is 1 at the noise"),
            ("labels, decoder", "generate.py: drawn; ema by default"),
            ("sizes", "generate.py, --resolution"),
        ),
        sides=(256, 512),
        unguided=True,
        note="unguided it is sit-sde",
    ),
    "lightningdit": Publication(
        sources=(
            (
                "sampler, steps, shift, guidance, part of the way",
                "hustvl/LightningDiT (all read in amudide/LightningDiT), "
                "configs/reproductions/lightningdit_xl_vavae_f16d32_800ep_cfg.yaml: timestep_shift 0.3, "
                "cfg_interval_start 0.125 of a time that is 0 at the noise",
            ),
            ("channels", "models/lightningdit.py, forward_with_cfg: 3 of 32"),
            ("labels", "inference.py: drawn"),
            ("reference", "the configuration's fid_reference_file"),
        ),
        unguided=True,
        note="guidance of its model of 64 epochs: 10; its 250 points of time make 249 steps",
    ),
    "rae": Publication(
        sources=(
            (
                "sampler, steps, guidance",
                "bytetriper/RAE, configs/training/ImageNet256/DiTDH-XL_DINOv2-B.yaml; arXiv 2510.11690",
            ),
            ("shift", "the same, time_dist_shift_dim and _base; src/sample_ddp.py: the root of their ratio"),
            (
                "labels, reference",
                "README.md (read in a fork), --label-sampling equal, its default for FID (about 0.1 lower than drawn "
                "ones), and Evaluation",
            ),
            ("sizes", "arXiv 2510.11690"),
        ),
        sides=(256, 512),
        note="its guided rows: 1.42 by a second, weaker model, on the whole way (configs/stage2/sampling/ImageNet256/"
        "DiTDHXL-DINOv2-B_AG.yaml, read in Namtk214/RAE); its 50 points of time make 49 steps",
    ),
    "jit": Publication(
        sources=(
            ("sampler, steps", "LTH14/JiT (all read in forks), main_jit.py, its defaults; arXiv 2511.13720"),
            (
                "guidance, part of the way",
                "README.md, Evaluation; denoiser.py: its time, 0 at the noise, above 0.1",
            ),
            ("labels, reference", "engine_jit.py: as many of each class; fid_stats/ by torch-fidelity"),
            ("sizes", "README.md"),
        ),
        sides=(256, 512),
        statistics="jit_in{side}_stats.npz",
        note="guidance of the model B; L: 2.4 (512: 2.5), H: 2.2 (512: 2.3)",
    ),
    "quick": Publication(sources=(("all", "ours"),), sides=(), note="for curves within a run"),
}
# FID-50K at 400K steps, ImageNet 256 x 256 (Table XIV of arXiv 2412.06674, where DiT's and SiT's are quoted too), by
# model and by what it predicts.
PUBLISHED_400K = {
    ("D-EMOv2-S-2", "epsilon"): 46.3,
    ("D-EMOv2-B-2", "epsilon"): 24.8,
    ("D-EMOv2-L-2", "epsilon"): 11.2,
    ("D-EMOv2-XL-2", "epsilon"): 9.6,
    ("DiT-S-2", "epsilon"): 68.4,
    ("DiT-B-2", "epsilon"): 43.5,
    ("DiT-L-2", "epsilon"): 23.3,
    ("DiT-XL-2", "epsilon"): 19.5,
    ("DiT-S-2", "flow_prediction"): 57.6,
    ("DiT-B-2", "flow_prediction"): 33.5,
    ("DiT-L-2", "flow_prediction"): 18.8,
    ("DiT-XL-2", "flow_prediction"): 17.2,
}
PUBLISHED_STEPS = 400_000


def preset_changes(settings: SamplingSettings, preset: str) -> list[str]:
    """What settings change of a preset, as "name: preset's -> given", the number and seed of images aside.

    No guidance is no change where it is published too, and what guidance is limited to does not matter without it.
    """
    changes = []
    wanted_all = PRESETS[preset]
    if settings.guidance_scale == 1 and (PUBLICATIONS[preset].unguided or wanted_all.guidance_scale == 1):
        guidance = ("guidance_scale", "guidance_channels", "guidance_interval")
        wanted_all = replace(wanted_all, **{name: getattr(settings, name) for name in guidance})
    for field in fields(settings):
        wanted, given = getattr(wanted_all, field.name), getattr(settings, field.name)
        if field.name == "vae" and wanted and given and given.rstrip("/").split("/")[-1] == wanted.split("/")[-1]:
            continue  # a local copy under its own name
        if field.name not in ("num_images", "seed") and given != wanted:
            changes.append(f"{field.name}: {show_setting(wanted)} -> {show_setting(given)}")
    return changes


def show_setting(value: Any) -> str:
    """A setting for people."""
    if isinstance(value, tuple):
        return " to ".join(f"{end:g}" for end in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def with_settings(preset: str, changes: dict[str, Any]) -> SamplingSettings:
    """A preset with changes; those that are None are left out."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"--preset {preset}: unknown; choose one of {', '.join(PRESETS)}.")
    return replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})


def shift_of(settings: SamplingSettings, pipeline: DEMOPipeline) -> float:
    """The shift of a flow's steps as a number; 1 is none."""
    if settings.time_shift is None:
        return own_shift(pipeline.scheduler)
    if settings.time_shift == AUTO_SHIFT:
        height, width = pipeline.transformer.sample_shape
        return dimension_shift(pipeline.transformer.config.in_channels * height * width)
    return float(settings.time_shift)


def make_sampler(settings: SamplingSettings, pipeline: DEMOPipeline) -> Any:
    """The scheduler that settings name, for a pipeline's model.

    Raises:
        ValueError: it does not fit what the model predicts; the message gives those that do.
    """
    config, name = pipeline.transformer.config, settings.sampler
    if settings.guidance_scale > 1 and config.num_classes and not takes_guidance(config):
        raise ValueError(
            f"--guidance-scale {settings.guidance_scale:g}: the model was trained with a guidance of "
            f"{config.distilled_guidance:g} in its weights and takes no other; leave it out."
        )
    flow = path_of(config) is not None
    if settings.time_shift is not None and (name == "own" or not flow):
        reason = (
            "the pipeline's own sampler has its own" if flow else "the model is none of a flow, whose times it moves"
        )
        raise ValueError(f"--time-shift {show_setting(settings.time_shift)}: {reason}; leave it out.")
    if name == "own":
        solver = pipeline.scheduler
        if isinstance(solver, FlowMatchODESolverScheduler) and solver.config.method in ADAPTIVE:
            raise ValueError(
                f"--sampler own: {solver.config.method} chooses its steps for a batch, so an image would depend on the "
                "others of its batch; use heun, or a solver of fixed steps."
            )
        return solver
    fitting = fitting_samplers(config)
    if name == "fast":
        name = next(sampler for sampler in FAST if sampler in fitting)
    if name not in fitting:
        presets = [preset for preset, one in PRESETS.items() if one.sampler in (*fitting, "fast")]
        raise ValueError(
            f"--sampler {name}: the model predicts {predicted(config)} and is sampled by "
            f"{', '.join(fitting)} (presets {', '.join(presets)})."
        )
    return make_scheduler(name, config, shift_of(settings, pipeline))


def describe_settings(settings: SamplingSettings) -> str:
    """One line with everything that moves the number."""
    channels = "all channels" if settings.guidance_channels is None else f"{settings.guidance_channels} channels"
    part = f" from {show_setting(settings.guidance_interval)} of the way" * (settings.guidance_interval != EVERYWHERE)
    guided = settings.guidance_scale > 1
    by = f" by {settings.guider}" * (settings.guider is not None)
    away = f" away from {settings.guide}" * (settings.guide is not None)
    guidance = f"guidance {settings.guidance_scale:g}{by}{away} on {channels}{part}" if guided else "no guidance"
    if settings.internal_guidance > 1:
        guidance += f", internal guidance {settings.internal_guidance:g}"
    shift = "" if settings.time_shift is None else f", time shift {show_setting(settings.time_shift)}"
    decoder = f"decoder {settings.vae}" if settings.vae else "the pipeline's own decoder, if any"
    average = "" if settings.ema is None else f" (power-function average of relative length {settings.ema:g})"
    return (
        f"{settings.num_images:,} images, {settings.sampler} {settings.steps} steps{shift}, {guidance}, "
        f"{settings.labels} labels, {decoder}, {settings.weights} weights{average}, {settings.dtype}, "
        f"seed {settings.seed}"
    )
