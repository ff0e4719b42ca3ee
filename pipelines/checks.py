"""What a call of the pipeline refuses, before anything is drawn: each with the value, the rule and the remedy."""

import inspect
import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDPMParallelScheduler,
    DDPMScheduler,
    DiTTransformer2DModel,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from d_emo.common.checks import number, one_of, whole
from d_emo.common.messages import first_line, shown
from d_emo.common.ranges import Flag, take
from d_emo.schedulers.flow_paths import MAX_STEPS, SHIFT, path_of, shift_time
from d_emo.schedulers.flow_sde import FlowMatchSDEScheduler

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Beyond these a number is a mistake: images of a label in one call, values of their latents, guidance.
MAX_IMAGES, MAX_VALUES, MAX_GUIDANCE = 1_000_000, 2**31, 1000
LEARNED_VARIANCE = ("learned", "learned_range")
# Schedulers that only follow velocities, and so fit every path.
PATH_AGNOSTIC = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchODESolverScheduler")
# The scheduler of networks that take the time to jump to, of which each step asks for it.
FLOW_MAP = "FlowMapEulerDiscreteScheduler"
# The time of pure noise of flow models, whatever the scheduler.
FLOW_TIMESTEPS = 1000
# How much of a picture (a factor of it) may be left in what a scheduler takes for pure noise. DiT's schedule leaves
# 0.006 at its end, Diffusers' "leading" spacing 0.06 with four steps, 0.28 with two, and 1 with one.
MAX_LEFTOVER = 0.1
# Schedulers count as one if the share of the picture that they leave differs by no more than this, whatever the time.
SAME_SCHEDULE = 1e-3
# Ancestral and stochastic samplers need many steps, and papers give 250; solvers of an ODE are near its end at 50.
STOCHASTIC_STEPS, SOLVER_STEPS = 250, 50
# Flow maps are trained for few: their papers show one, two and four.
FLOW_MAP_STEPS = 4


class NonFiniteSampleError(ValueError):
    """A step of sampling, or the decoder, ended in NaN or infinity."""


def default_steps(scheduler: Any) -> int:
    """The number of steps that suits a scheduler, for a pipeline that was saved without one."""
    check_parts(scheduler, None)
    if _name(scheduler) == FLOW_MAP:
        return FLOW_MAP_STEPS
    stochastic = isinstance(scheduler, DDPMScheduler | DDPMParallelScheduler | FlowMatchSDEScheduler)
    return STOCHASTIC_STEPS if stochastic else SOLVER_STEPS


def check_parts(scheduler: Any, vae: Any) -> None:
    """Refuse what is no scheduler, or no decoder."""
    if not isinstance(scheduler, SchedulerMixin):
        raise ValueError(f"scheduler={shown(scheduler)} is none; pass one of Diffusers' or of d_emo.schedulers.")
    if vae is not None and not (isinstance(vae, torch.nn.Module) and hasattr(vae, "config")):
        raise ValueError(f"vae={shown(vae)} is none; pass one of Diffusers' autoencoders, or None for pixels.")


def check_guidance(scale: Any, interval: Any, guided_channels: Any, channels: int) -> None:
    """Refuse a guidance that is out of range."""
    number(scale, "guidance_scale", 1, MAX_GUIDANCE, "1.0 turns guidance off, values up to 10 are usual")
    rule = "(start, stop) with 0 <= start < stop <= 1"
    if isinstance(interval, str) or not isinstance(interval, Sequence) or len(interval) != 2:
        raise ValueError(f"guidance_interval={shown(interval)} is not {rule}; (0.0, 1.0) guides all steps.")
    start, stop = (number(end, "guidance_interval", 0, 1, rule) for end in interval)
    if not start < stop:
        raise ValueError(f"guidance_interval={interval} is not {rule}.")
    if guided_channels is not None:
        whole(guided_channels, "guidance_channels", 1, channels, "None guides all channels")


def check_output(output_type: Any, return_dict: Any) -> None:
    """Refuse an unknown output."""
    one_of(output_type, "output_type", OUTPUT_TYPES)
    take("DEMOPipeline", {"return_dict": return_dict}, {"return_dict": Flag()})


def check_eta(eta: Any, scheduler: Any) -> None:
    """Refuse a share of noise that DDIM does not have, and any that a scheduler would leave out without a word."""
    if number(eta, "eta", 0, 1, "0 is DDIM, 1 DDPM's noise") and not (
        hasattr(scheduler, "step") and _accepts(scheduler.step, "eta")
    ):
        raise ValueError(
            f"eta={eta}: {_name(scheduler)} has no share of noise to set; use DDIMScheduler, or leave it out."
        )


def check_flat(labels: Sequence[Any]) -> None:
    """Refuse lists in a list of labels."""
    for item in labels:
        if isinstance(item, Mapping | Set | Iterator | list | tuple):
            kind = type(item).__name__
            raise TypeError(f"class_labels holds a {kind}; pass a class name or id, or one flat list of them.")


def check_count(images: Any) -> None:
    """Refuse a number of images a label that is none, or more than any machine draws at once."""
    whole(images, "num_images_per_label", 1, MAX_IMAGES, "draw more in several calls")


def check_size(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Refuse pictures that no machine has room for."""
    if math.prod(shape) > MAX_VALUES:
        raise ValueError(
            f"height, width and the number of images ask for latents of {shape}, more than {MAX_VALUES} values; draw "
            "smaller pictures, or fewer at once."
        )
    return shape


def check_callback(callback: Any, wanted: Any, known: Sequence[str]) -> list[str]:
    """Names of the tensors that a callback gets; Diffusers' callback objects tell theirs."""
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        wanted = callback.tensor_inputs
    elif callback is not None and not callable(callback):
        raise ValueError(
            f"callback_on_step_end={shown(callback)} cannot be called; pass a function (pipeline, step, timestep, "
            "tensors), or several as diffusers.callbacks.MultiPipelineCallbacks."
        )
    if isinstance(wanted, str) or not isinstance(wanted, Sequence):
        raise ValueError(f"callback_on_step_end_tensor_inputs={shown(wanted)} is no list of names; use {list(known)}.")
    unknown = sorted(map(str, set(wanted) - set(known)))
    if unknown:
        raise ValueError(f"callback_on_step_end_tensor_inputs has {unknown}; use {list(known)}.")
    return list(wanted)


def replaced_latents(answer: Any, latents: torch.Tensor) -> torch.Tensor:
    """The latents that a callback answered with, or those that it was given."""
    if answer is None:
        return latents
    if not isinstance(answer, Mapping):
        raise ValueError(f'callback_on_step_end answered with a {type(answer).__name__}; return {{"latents": ...}}.')
    replaced = answer.get("latents", latents)
    if not isinstance(replaced, torch.Tensor) or replaced.shape != latents.shape:
        shape = tuple(replaced.shape) if isinstance(replaced, torch.Tensor) else type(replaced).__name__
        raise ValueError(
            f"callback_on_step_end answered with latents {shape}; they have to stay {tuple(latents.shape)}."
        )
    return replaced.to(latents.device, latents.dtype)


def check_generator(generator: Any, batch: int, device: torch.device) -> torch.Generator | list[torch.Generator] | None:
    """A generator, or one an image, on the CPU or where images are drawn."""
    if generator is None:
        return None
    several = isinstance(generator, list | tuple)
    for item in generator if several else [generator]:
        if not isinstance(item, torch.Generator):
            seed = item if isinstance(item, numbers.Integral) and not isinstance(item, bool) else 0
            raise ValueError(
                f"generator={shown(item)} is a {type(item).__name__}; pass torch.Generator().manual_seed({seed}), or a "
                "list of generators, one an image."
            )
        if item.device.type not in ("cpu", device.type):
            raise ValueError(
                f"a generator is on {item.device}, images are drawn on {device}; pass one of the CPU "
                "(torch.Generator()), which serves every device, or move the pipeline."
            )
    if not several:
        return generator
    if len(generator) != batch:
        raise ValueError(f"{len(generator)} generators for {batch} images; pass one an image, or a single one.")
    return list(generator)


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Refuse starting noise of another kind or shape."""
    if not isinstance(latents, torch.Tensor):
        kind = type(latents).__name__
        remedy = "pass torch.from_numpy(latents)" if isinstance(latents, np.ndarray) else "pass a tensor"
        raise ValueError(f"latents are a {kind}; {remedy} of shape {shape}.")
    if latents.shape != shape:
        raise ValueError(f"latents have the shape {tuple(latents.shape)}; these arguments need {shape}.")
    if latents.layout != torch.strided or latents.is_meta:
        raise ValueError(f"latents are {latents.layout} on {latents.device}; pass a plain tensor of numbers.")
    if not latents.is_floating_point():
        raise ValueError(f"latents are {latents.dtype}; pass standard-normal noise, torch.randn({shape}).")
    if not torch.isfinite(latents).all():
        raise ValueError("latents hold NaN or infinity; pass standard-normal noise.")


def check_steps(steps: Any, scheduler: Any) -> int:
    """A number of steps that a scheduler can take."""
    limit = MAX_STEPS if is_flow(scheduler) else scheduler.config.num_train_timesteps
    most = f"{_name(scheduler)} takes no more; leave it out for the model's own number"
    return whole(steps, "num_inference_steps", 1, limit, most)


def is_flow(scheduler: Any) -> bool:
    """Whether a scheduler follows velocities."""
    return _name(scheduler).startswith(("FlowMatch", "FlowMap")) or bool(scheduler.config.get("use_flow_sigmas", False))


def takes_guidance(model_config: Any) -> bool:
    """Whether guidance can act: a model has classes, and no guidance in its weights yet."""
    return bool(model_config.num_classes) and model_config.get("distilled_guidance", 1.0) == 1


def end_of_step(scheduler: Any, timestep: torch.Tensor) -> torch.Tensor | None:
    """The timestep that a flow map's step at `timestep` ends at; None for the schedulers of other models."""
    if _name(scheduler) != FLOW_MAP:
        return None
    return scheduler.sigmas[scheduler.index_for_timestep(timestep) + 1] * scheduler.config.num_train_timesteps


def takes_learned_variance(scheduler: Any) -> bool:
    """Whether a scheduler reads the second half of a prediction as its variance."""
    ancestral = isinstance(scheduler, DDPMScheduler | DDPMParallelScheduler)
    return ancestral and scheduler.config.variance_type in LEARNED_VARIANCE


def check_transformer(transformer: Any) -> None:
    """Refuse networks of other packages, which the pipeline could not drive."""
    config = getattr(transformer, "config", None)
    if hasattr(config, "num_classes") and hasattr(transformer, "sample_shape"):
        return
    kind = type(transformer).__name__
    if isinstance(transformer, DiTTransformer2DModel):
        remedy = (
            "it is Diffusers' own DiT: DEMOPipeline.from_pretrained and DiTBaselineTransformer2DModel.from_pretrained "
            "convert its folders, as train/convert_dit.py does; to draw with it as it is, use diffusers.DiTPipeline"
        )
    elif isinstance(getattr(transformer, "module", None), torch.nn.Module):
        remedy = "pass the model itself: transformer.module, or accelerator.unwrap_model(transformer)"
    else:
        remedy = "pass a DEMOTransformer2DModel or DiTBaselineTransformer2DModel (d_emo.create_model makes them)"
    raise ValueError(f"transformer is a {kind}, which DEMOPipeline does not drive; {remedy}.")


def check_scheduler(scheduler: Any, model_config: Any, trained: torch.Tensor | None = None) -> None:
    """Refuse pairs of model and scheduler that would run and draw noise.

    Args:
        scheduler: of the call.
        model_config: of the transformer.
        trained: the noise schedule that came with the model, if it is of a diffusion in steps.
    """
    name = _name(scheduler)
    config: Any = getattr(scheduler, "config", {})
    path = path_of(model_config)
    fitting = (
        "use a DDPM, DDIM or DPM-Solver scheduler for epsilon, a FlowMatch one for flow models "
        "(or a solver with use_flow_sigmas=True, prediction_type='flow_prediction')"
    )
    if "num_train_timesteps" not in config or "Inverse" in name or not _steps_by_prediction(scheduler):
        raise ValueError(f"scheduler is a {name}, which makes no picture of noise and predictions alone; {fitting}.")
    is_map = model_config.get("end_block") is not None
    if is_map != (name == FLOW_MAP):
        model, remedy = (
            (f"a flow map (end_block={model_config.end_block})", f"use {FLOW_MAP}")
            if is_map
            else ("no flow map (its end_block is None), which is asked for a jump's end", fitting)
        )
        raise ValueError(f"{name} does not fit: the model is {model}; {remedy}.")
    wanted = "epsilon" if path is None else "flow_prediction"  # whatever a flow model predicts becomes its flow
    given = "flow_prediction" if is_flow(scheduler) else config.get("prediction_type") or "epsilon"
    if given != wanted:
        model = model_config.prediction_type + (f" on the {path} path" if path else "")
        raise ValueError(f"{name} is set up for prediction_type={given!r}, the model predicts {model!r}; {fitting}.")
    _check_noise_schedule(scheduler, path, trained)
    stored = config.get("flow_path", "linear")
    if path not in (None, stored) and (name not in PATH_AGNOSTIC or config.get("stochastic_sampling")):
        raise ValueError(
            f"{name} works on the {stored} path, the model on {path}; use {', '.join(PATH_AGNOSTIC)} or "
            f"FlowMatchEulerMaruyamaScheduler(flow_path={path!r})."
        )
    if takes_learned_variance(scheduler):
        if not model_config.learn_sigma:
            raise ValueError(
                f"{name} expects a learned variance that this model does not predict; "
                f"use {name}.from_config(config, variance_type='fixed_small')."
            )
    elif config.get("variance_type") in LEARNED_VARIANCE and _accepts(type(scheduler).__init__, "variance_type"):
        raise ValueError(
            f"{name} inherited variance_type={config.variance_type!r} and cannot use a learned variance; "
            f"use {name}.from_config(pipe.scheduler.config, variance_type=None)."
        )


def _check_noise_schedule(scheduler: Any, path: str | None, trained: torch.Tensor | None) -> None:
    """Refuse configurations that no model can have been trained on, and others than this one's."""
    name, config = _name(scheduler), scheduler.config
    whole(config.num_train_timesteps, f"{name}'s num_train_timesteps", hint=f"models here have {FLOW_TIMESTEPS}")
    if path is not None:
        if config.num_train_timesteps != FLOW_TIMESTEPS:
            raise ValueError(
                f"{name} has num_train_timesteps={config.num_train_timesteps}; a flow model's pure noise is at "
                f"{FLOW_TIMESTEPS}: {name}.from_config(pipe.scheduler.config, num_train_timesteps={FLOW_TIMESTEPS})."
            )
        if config.get("use_dynamic_shifting"):
            raise ValueError(
                f"{name} has use_dynamic_shifting=True, which shifts times by a picture's size; models of this package "
                "are trained without: set use_dynamic_shifting=False."
            )
        if config.get("shift") is not None:
            SHIFT.check(config.shift, f"{name}'s shift")
        return
    left = getattr(scheduler, "alphas_cumprod", None)
    if left is None:
        raise ValueError(
            f"{name} has no noise schedule of a diffusion in steps (alphas_cumprod), which this model was trained on; "
            "use a DDPM, DDIM, DPM-Solver, UniPC or Euler scheduler."
        )
    if not (torch.isfinite(left).all() and (left > 0).all() and (left <= 1).all() and (left.diff() <= 0).all()):
        raise ValueError(
            f"{name}'s noise schedule is broken (beta_start={config.get('beta_start')}, "
            f"beta_end={config.get('beta_end')}, beta_schedule={config.get('beta_schedule')!r}): the share of the "
            "picture has to fall from 1 towards 0 and stay above it. DiT's is beta_start=0.0001, beta_end=0.02, "
            "beta_schedule='linear', without rescale_betas_zero_snr."
        )
    if trained is not None and (left.shape != trained.shape or (left.cpu() - trained).abs().max() > SAME_SCHEDULE):
        raise ValueError(
            f"{name} has another noise schedule (beta_start={config.get('beta_start')}, "
            f"beta_end={config.get('beta_end')}, beta_schedule={config.get('beta_schedule')!r}, {len(left)} timesteps) "
            "than the one that came with the model, which it was trained on; make it of that one's configuration: "
            f"{name}.from_config(pipe.scheduler.config)."
        )


def check_start(scheduler: Any, steps: int) -> None:
    """Refuse timesteps that do not begin at pure noise, which is what sampling begins with."""
    timesteps = scheduler.timesteps
    name, count = _name(scheduler), scheduler.config.num_train_timesteps
    first = float(timesteps[0]) if len(timesteps) else math.nan
    if is_flow(scheduler):
        wrong = not first >= (1.0 - MAX_LEFTOVER) * count
    else:
        table = scheduler.alphas_cumprod
        wrong = not 0 <= first < count or float(table[round(first)].sqrt()) > MAX_LEFTOVER
    if not wrong:
        return
    if "timestep_spacing" in scheduler.config and scheduler.config.timestep_spacing != "trailing":
        remedy = f"use {name}.from_config(pipe.scheduler.config, timestep_spacing='trailing'), or more steps"
    else:
        remedy = "use more steps or another scheduler"
    raise ValueError(
        f"num_inference_steps={steps}: {name} would begin at timestep {first:g} of {count}, where half-clean pictures "
        f"are expected, but sampling begins with pure noise; {remedy}."
    )


def lay_timesteps(scheduler: Any, steps: int, device: torch.device, start: float, prediction: str) -> None:
    """Tell a scheduler its steps; `start` is the time of the noise, below 1 where the model cannot be asked there.

    Raises:
        ValueError: the scheduler cannot lay that many, begins elsewhere, or begins where the model has no answer.
    """
    name = _name(scheduler)
    # Even steps from 1 to 0 (SiT's); the scheduler's default ends at sigma = 0.001 and jumps to 0.
    even = name.startswith("FlowMatch") and _accepts(scheduler.set_timesteps, "sigmas")
    takes_start = _accepts(scheduler.set_timesteps, "start")
    if start < 1.0 and not (even or takes_start):
        raise ValueError(
            f"{name} starts at pure noise, where a {prediction} has no velocity; use "
            "FlowMatchEulerDiscreteScheduler or FlowMatchODESolverScheduler(method='heun2')."
        )
    try:
        if even:
            first = shift_time(start, 1 / scheduler.shift)  # which the scheduler shifts back
            scheduler.set_timesteps(sigmas=np.linspace(first, 0.0, steps + 1)[:-1].tolist(), device=device)
        elif takes_start:
            scheduler.set_timesteps(steps, device=device, start=start)
        else:
            if isinstance(scheduler, FlowMatchHeunDiscreteScheduler):
                # It shifts all times between these two, which its constructor has shifted already.
                scheduler.sigma_max, scheduler.sigma_min = 1.0, 1 / scheduler.config.num_train_timesteps
            scheduler.set_timesteps(steps, device=device)
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error).rstrip(".")
        raise ValueError(
            f"num_inference_steps={steps}: {name} cannot lay that many ({reason}); use more, or another scheduler."
        ) from error
    check_start(scheduler, steps)


def check_finite(
    flags: list[torch.Tensor], transformer: torch.nn.Module, guidance_scale: float, scheduler: Any
) -> None:
    """Raise if any step ended in NaN or infinity; one look for all steps, so that a GPU is not held up.

    Args:
        flags: of every step, whether its latents are finite.
        transformer: what was asked.
        guidance_scale: of the run.
        scheduler: that stepped.
    """
    finite = torch.stack(flags).tolist() if flags else []
    if all(finite):
        return
    if not all(bool(torch.isfinite(tensor).all()) for tensor in transformer.state_dict().values()):
        cause = "the transformer's weights hold NaN or infinity: training diverged, or the file is damaged"
    elif any(tensor.dtype == torch.float16 for tensor in transformer.parameters()):
        cause = "float16 overflowed: load the pipeline in torch.bfloat16 or float32"
    elif guidance_scale > 20:
        cause = f"guidance_scale={guidance_scale} is very large: values from 1 to 10 are usual"
    else:
        cause = f"{_name(scheduler)}'s configuration does not suit the model or so few steps: compare the saved one"
    raise NonFiniteSampleError(
        f"step {finite.index(False) + 1} of {len(finite)} ended in NaN or infinity; likely {cause}."
    )


def check_decoded(images: torch.Tensor, vae: Any) -> None:
    """Raise where a decoder answered with NaN: half precision overflowed in it, and pictures would be black."""
    if not bool(torch.isfinite(images).all()):
        raise NonFiniteSampleError(
            f"the VAE ({type(vae).__name__}, {vae.dtype}) decoded finite latents to NaN or infinity; "
            "load it in float32: pipe.vae.to(torch.float32)."
        )


def _steps_by_prediction(scheduler: Any) -> bool:
    """Whether a step needs no more than prediction, timestep and sample; a solver takes the whole way at once."""
    if hasattr(scheduler, "integrate"):
        return True
    if not hasattr(scheduler, "step"):
        return False
    needed = [p for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty]
    return len([p for p in needed if p.kind is p.POSITIONAL_OR_KEYWORD]) <= 3


def _name(scheduler: Any) -> str:
    return type(scheduler).__name__


def _accepts(function: Callable, name: str) -> bool:
    return name in inspect.signature(function).parameters
