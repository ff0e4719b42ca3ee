"""Samplers by the names that commands take, and the noise of image i of a seed: one place for all that draws."""

from typing import Any, Literal, get_args

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)

from d_emo.common.checks import one_of
from d_emo.schedulers import FlowMatchEulerMaruyamaScheduler, FlowMatchSDEHeunScheduler
from d_emo.schedulers.flow_paths import path_of

# DiT's noise schedule (its `linear` betas).
DIT_BETAS = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False}

SamplerName = Literal["ddpm", "ddim", "euler", "heun", "sde", "sde-heun", "flow-map"]
NOISE_SAMPLERS, FLOW_SAMPLERS = ("ddpm", "ddim"), ("euler", "heun", "sde", "sde-heun")
FLOW_MAP_SAMPLERS = ("flow-map",)


def fitting_samplers(config: Any) -> tuple[str, ...]:
    """Names of the samplers of what a model predicts, the fastest first but for ancestral DDPM; `config` is its own."""
    if config.get("end_block") is not None:
        return FLOW_MAP_SAMPLERS
    return NOISE_SAMPLERS if path_of(config) is None else FLOW_SAMPLERS


def predicted(config: Any) -> str:
    """What a model predicts, in words for messages about samplers."""
    if config.get("end_block") is not None:
        return "jumps of a flow map"
    return "noise" if path_of(config) is None else "the flow"


def make_scheduler(name: str, config: Any, shift: float = 1.0) -> Any:
    """A sampler as a scheduler.

    Args:
        name: ddpm (ancestral, DiT's), ddim; euler, heun, sde (Euler-Maruyama), sde-heun for flow models; flow-map for
            flow maps, which jump from step to step.
        config: the model's.
        shift: of a flow's even steps, 1 is none; see `shift_time`.

    Raises:
        ValueError: the name is unknown, or does not fit what the model predicts; the message gives those that do.
    """
    one_of(name, "sampler", get_args(SamplerName))
    fitting = fitting_samplers(config)
    if name not in fitting:
        said = f"the model predicts {predicted(config)} and is sampled by {', '.join(fitting)}"
        raise ValueError(f"sampler={name!r}: {said}.")
    if name == "ddpm":
        variance = "learned_range" if config.learn_sigma else "fixed_small"
        return DDPMScheduler(**DIT_BETAS, variance_type=variance, timestep_spacing="linspace")
    if name == "ddim":
        return DDIMScheduler(**DIT_BETAS, timestep_spacing="leading", set_alpha_to_one=True)
    if name == "flow-map":
        return FlowMapEulerDiscreteScheduler(shift=shift)
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=shift)
    if name == "heun":
        return FlowMatchHeunDiscreteScheduler(shift=shift)
    stochastic = FlowMatchSDEHeunScheduler if name == "sde-heun" else FlowMatchEulerMaruyamaScheduler
    return stochastic(flow_path=path_of(config), shift=shift)


def own_shift(scheduler: Any) -> float:
    """The shift of a flow's even steps that a scheduler was saved with; 1 is none."""
    return float(scheduler.config.get("shift") or 1.0)


def image_generator(seed: int, index: int) -> torch.Generator:
    """The generator of one image's noise, initial and of every step. On the CPU, so that devices agree.

    torch's CPU generator takes 32 bits of a seed; the mix below maps each index of a seed to another one of them.
    """
    mixed = (seed * 0x9E3779B1 + index) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):  # MurmurHash3's finalizer: a bijection
        mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return torch.Generator().manual_seed(mixed ^ (mixed >> 16))
