"""How samples are drawn for a score: the settings, the protocols of the literature by name, the samplers.

Published FIDs differ in choices that papers mention in passing. A preset fixes all of them; a score that departs from
its preset says so.

Sources: DiT arXiv 2212.09748 (section 5; its sampling script's defaults for `dit-script`), SiT arXiv 2401.08740 (both
samplers with about 250 evaluations), EMOv2 arXiv 2412.06674 (Table XIV: 250 ancestral steps, no guidance).
"""

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from d_emo.common.command_line import flag
from d_emo.common.ranges import Maybe, OneOf, Real, Table, Whole
from d_emo.images.autoencoders import LatentSpace
from d_emo.pipelines import DEMOPipeline
from d_emo.schedulers import (
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchODESolverScheduler,
    FlowMatchSDEHeunScheduler,
)
from d_emo.schedulers.flow_ode import ADAPTIVE
from d_emo.schedulers.flow_paths import path_of

FT_MSE = "stabilityai/sd-vae-ft-mse"
FT_EMA = "stabilityai/sd-vae-ft-ema"
# What these two decode; presets that name one of them are for models of such latents.
SD_LATENTS = LatentSpace(autoencoder="AutoencoderKL", channels=4, factor=8, std=(1 / 0.18215,))
PUBLISHED_COUNT = 50_000
# DiT's noise schedule (its `linear` betas).
DIT_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}

SamplerName = Literal["ddpm", "ddim", "euler", "heun", "sde", "sde-heun", "own", "fast"]
LabelRule = Literal["random", "balanced"]
Weights = Literal["averaged", "raw"]
Type = Literal["float32", "bfloat16", "float16"]
RULES: Table = {
    **dict.fromkeys(("num_images", "steps"), Whole(1)),
    "guidance_channels": Maybe(Whole(1)),
    "guidance_scale": Real(1, hint="1 is no guidance, 0 would draw without class"),
    "seed": Whole(0, 2**32 - 1),
    "sampler": OneOf(get_args(SamplerName)),
    "labels": OneOf(get_args(LabelRule)),
    "weights": OneOf(get_args(Weights)),
    "dtype": OneOf(get_args(Type)),
}


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Every choice that moves the samples.

    Attributes:
        num_images: how many are drawn; images 0 to num_images - 1 of the seed.
        sampler: ddpm (ancestral, DiT's), ddim; euler, heun, sde (Euler-Maruyama), sde-heun for flow models; own: the
            pipeline's scheduler as it is; fast: ddim or euler, as fits the model.
        steps: sampler steps; one step of heun or sde-heun evaluates the model twice.
        guidance_scale: classifier-free guidance, 1.0 is none.
        guidance_channels: guide the first so many channels only; None is all.
        labels: random: uniformly drawn classes (DiT); balanced: classes in turn.
        vae: decoder, a Hub id or folder; None: the one the pipeline carries, or none for pixels.
        seed: image i is a function of (seed, i).
        weights: the averaged weights, which pipelines hold, or the raw ones of a training checkpoint.
        dtype: of model and decoder: float32, bfloat16 or float16.
    """

    num_images: int = PUBLISHED_COUNT
    sampler: SamplerName = "own"
    steps: int = 250
    guidance_scale: float = 1.0
    guidance_channels: int | None = None
    labels: LabelRule = "random"
    vae: str | None = None
    seed: int = 0
    weights: Weights = "averaged"
    dtype: Type = "float32"

    def __post_init__(self):
        for name, rule in RULES.items():
            object.__setattr__(self, name, rule.check(getattr(self, name), flag(name)))


PRESETS: dict[str, SamplingSettings] = {
    "dit-400k": SamplingSettings(sampler="ddpm", steps=250, vae=FT_MSE),
    "dit-script": SamplingSettings(sampler="ddpm", steps=250, guidance_scale=1.5, guidance_channels=3, vae=FT_EMA),
    "sit-sde": SamplingSettings(sampler="sde", steps=250, vae=FT_EMA),
    "sit-ode": SamplingSettings(sampler="heun", steps=125, vae=FT_EMA),
    "quick": SamplingSettings(sampler="fast", steps=50, num_images=5_000),
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
    """What settings change of a preset, as "name: preset's -> given", the number and seed of images aside."""
    changes = []
    for field in fields(settings):
        wanted, given = getattr(PRESETS[preset], field.name), getattr(settings, field.name)
        if field.name == "vae" and wanted and given and given.rstrip("/").split("/")[-1] == wanted.split("/")[-1]:
            continue  # a local copy under its own name
        if field.name not in ("num_images", "seed") and given != wanted:
            changes.append(f"{field.name}: {wanted} -> {given}")
    return changes


def with_settings(preset: str, changes: dict[str, Any]) -> SamplingSettings:
    """A preset with changes; those that are None are left out."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"--preset {preset}: unknown; choose one of {', '.join(PRESETS)}.")
    return replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})


def make_sampler(name: SamplerName, pipeline: DEMOPipeline) -> Any:
    """The scheduler of a name for a pipeline's model.

    Raises:
        ValueError: it does not fit what the model predicts; the message gives those that do.
    """
    config = pipeline.transformer.config
    path = path_of(config)
    flow = path is not None
    if name == "own":
        solver = pipeline.scheduler
        if isinstance(solver, FlowMatchODESolverScheduler) and solver.config.method in ADAPTIVE:
            raise ValueError(
                f"--sampler own: {solver.config.method} chooses its steps for a batch, so an image would depend on the "
                "others of its batch; use heun, or a solver of fixed steps."
            )
        return solver
    if name == "fast":
        name = "euler" if flow else "ddim"
    if flow != (name in ("euler", "heun", "sde", "sde-heun")):
        flows = "euler, heun, sde, sde-heun (presets sit-sde, sit-ode, quick)"
        fitting = flows if flow else "ddpm, ddim (dit-400k, dit-script)"
        raise ValueError(
            f"--sampler {name}: the model predicts {'the flow' if flow else 'noise'} and is sampled by {fitting}."
        )
    if name == "ddpm":
        variance = "learned_range" if config.learn_sigma else "fixed_small"
        return DDPMScheduler(**DIT_BETAS, variance_type=variance, timestep_spacing="linspace")
    if name == "ddim":
        return DDIMScheduler(**DIT_BETAS, timestep_spacing="leading", set_alpha_to_one=True)
    shift = pipeline.scheduler.config.get("shift") or 1.0  # belongs to the model, like the noise schedule
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    if name == "heun":
        return FlowMatchHeunDiscreteScheduler(shift=shift)
    stochastic = FlowMatchSDEHeunScheduler if name == "sde-heun" else FlowMatchEulerMaruyamaScheduler
    return stochastic(flow_path=path or "linear", shift=shift)


def describe_settings(settings: SamplingSettings) -> str:
    """One line with everything that moves the number."""
    channels = "all channels" if settings.guidance_channels is None else f"{settings.guidance_channels} channels"
    guidance = f"guidance {settings.guidance_scale:g} on {channels}" if settings.guidance_scale > 1 else "no guidance"
    decoder = f"decoder {settings.vae}" if settings.vae else "the pipeline's own decoder, if any"
    return (
        f"{settings.num_images:,} images, {settings.sampler} {settings.steps} steps, {guidance}, "
        f"{settings.labels} labels, {decoder}, {settings.weights} weights, {settings.dtype}, seed {settings.seed}"
    )
