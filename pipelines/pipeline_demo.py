"""DEMOPipeline: class labels in, images out, with any Diffusers scheduler that fits the model's objective.

Sources: classifier-free guidance, arXiv 2207.12598; DiT's sampler and its guidance on the first three channels,
arXiv 2212.09748; guidance in a limited interval, arXiv 2404.07724.

Shapes: N images, C latent (or image) channels, H x W latent (or image) size.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDPMParallelScheduler, DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from d_emo.common.choices import one_of
from d_emo.images.labels import LabelLike, LabelResolver, normalize_id2label
from d_emo.images.latents import decode_latents, vae_scale_factor
from d_emo.models import ClassConditionalTransformer2DModel
from d_emo.schedulers import FlowMatchODESolverScheduler
from d_emo.schedulers.flow_paths import path_numbers, path_of, sample_interval

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LEARNED_VARIANCE = ("learned", "learned_range")

# Schedulers that only follow velocities, and so fit every path.
PATH_AGNOSTIC = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchODESolverScheduler")
# The last moment of a guidance interval that lasts to 1.
PROGRESS_END = 1.0 - 1e-6

Generators = torch.Generator | list[torch.Generator] | None
# (sample, timestep, progress from 0 to 1) -> what the scheduler takes
Predict = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass
class DEMOPipelineOutput(BaseOutput):
    """What a sampling run returns.

    Attributes:
        images: list of N PIL images; or a float array (N, H, W, channels) or tensor (N, channels, H, W) in [0, 1]; or
            latents (N, C, H, W), by `output_type`.
        class_labels: the N class ids drawn; empty for an unconditional model.
        settings: everything that moves the result: sampler, its configuration, steps, guidance scale, channels and
            interval, dtype. Plain values, ready for JSON.
    """

    images: Any
    class_labels: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


class DEMOPipeline(DiffusionPipeline):
    """Class-conditional image generation with D-EMOv2, or with the DiT baseline.

    Args:
        transformer: `DEMOTransformer2DModel` or `DiTBaselineTransformer2DModel`.
        scheduler: any Diffusers scheduler of the model's kind: `DDPMScheduler`, `DDIMScheduler`,
            `DPMSolverMultistepScheduler` for DiT's diffusion; `FlowMatchEulerDiscreteScheduler` and others for flow
            models, whatever these predict.
        vae: decodes latents; without one the model works on pixels.
        id2label: class names by id, saved with the pipeline. A name may list synonyms separated by commas.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ClassConditionalTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        # JSON turns integer keys into strings; without registering the table again it would be lost on saving.
        table = normalize_id2label(id2label or {}, transformer.config.num_classes)
        self.register_to_config(id2label=table or None)
        self.label_resolver = LabelResolver(table, transformer.config.num_classes)
        self.vae_scale_factor = vae_scale_factor(vae) if vae is not None else 1
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by id; empty where the model carries none."""
        return self.label_resolver.id2label

    def get_label_ids(self, label: LabelLike | Sequence[LabelLike] | torch.Tensor) -> list[int]:
        """Class ids of a name, an id, or a sequence of either.

        Raises:
            ValueError: unknown or ambiguous name, id out of range, or an unconditional model.
            TypeError: an element is neither a name nor an integer.
        """
        if not self.transformer.config.num_classes:
            raise ValueError("this model is unconditional; leave class_labels out.")
        if isinstance(label, torch.Tensor | np.ndarray):
            label = label.tolist()
        labels: Any = label if isinstance(label, list | tuple | range) else [label]
        return [self.label_resolver.resolve(item) for item in labels]

    @torch.no_grad()
    def __call__(
        self,
        class_labels: LabelLike | Sequence[LabelLike] | torch.Tensor | None = None,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.5,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        num_images_per_label: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw images.

        Args:
            class_labels: a class name, an id, or a sequence of either. Left out for an unconditional model only.
            num_inference_steps: denoising steps. 250 DDPM steps are the DiT protocol.
            guidance_scale: 1.0 is off, larger follows the label more closely at the cost of variety. An
                unconditional model takes no guidance, whatever the value of this default.
            guidance_interval: the part of the steps in which guidance acts, as fractions from 0 (pure noise) to 1.
            guidance_channels: guide only the first so many channels; DiT's script guides three of four. None: all.
            num_images_per_label: images of each label, next to each other in the result.
            height, width: image size in pixels; by default the size that the model was configured for.
            generator: one generator, or a list of one an image; with a list an image does not depend on its batch.
            latents: (N, C, H, W) standard-normal noise to start from, instead of drawing it.
            eta: DDIM's noise fraction; ignored by schedulers without it.
            output_type: "pil", "np", "pt" (both in [0, 1]) or "latent".
            return_dict: return a `DEMOPipelineOutput` instead of a tuple of the images.
            callback_on_step_end: called after each step as f(pipeline, step index, timestep, tensors); may return
                replaced tensors.
            callback_on_step_end_tensor_inputs: tensors that the callback gets; only "latents" exists.

        Returns:
            A `DEMOPipelineOutput`, or a tuple of its images alone.

        Raises:
            ValueError: an argument is out of range, or scheduler and model do not fit; the message gives the remedy.
        """
        conditional = bool(self.transformer.config.num_classes)
        labels = self._labels(class_labels, num_images_per_label)
        batch = len(labels) if conditional else num_images_per_label
        guided = conditional and guidance_scale > 1.0
        channels = self.transformer.config.in_channels
        self._check_arguments(
            guidance_scale, guidance_interval, guidance_channels, output_type, callback_on_step_end_tensor_inputs
        )
        self._check_scheduler()

        device = self._execution_device
        latents = self._prepare_latents(latents, batch, height, width, generator, device)  # (N, C, H, W)
        null = self.transformer.null_label
        label_ids = torch.tensor(labels if conditional else [null] * batch, device=device)  # (N,)
        null_ids = torch.full_like(label_ids, null)  # (N,)

        def predict(sample: torch.Tensor, timestep: torch.Tensor, progress: float) -> torch.Tensor:
            """What the scheduler takes at a sample (N, C, H, W), of the model's one or two predictions."""
            scaled = self._scale_model_input(sample, timestep)  # (N, C, H, W)
            if guided and guidance_interval[0] <= progress < guidance_interval[1]:
                both = self._predict(scaled.repeat(2, 1, 1, 1), timestep, torch.cat([label_ids, null_ids]))
                prediction = _guide(both, guidance_scale, guidance_channels or channels)
            else:
                prediction = self._predict(scaled, timestep, label_ids)  # (N, C or 2C, H, W)
            return self._as_scheduler_takes_it(prediction, sample, timestep)

        with _eval_mode(self.transformer, self.vae):
            if isinstance(self.scheduler, FlowMatchODESolverScheduler):
                latents = self._integrate(predict, latents, num_inference_steps, callback_on_step_end)
            else:
                latents = self._step_through(
                    predict, latents, num_inference_steps, callback_on_step_end, self._step_arguments(generator, eta)
                )
            images = self._decode(latents, output_type)

        self.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        settings = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale if guided else 1.0,
            "guidance_interval": tuple(guidance_interval),
            "guidance_channels": guidance_channels or channels,
            "eta": eta,
        }
        return DEMOPipelineOutput(images=images, class_labels=labels, settings={**self._sampler_settings(), **settings})

    def _step_through(
        self,
        predict: Predict,
        latents: torch.Tensor,
        num_inference_steps: int,
        callback: Callable | None,
        step_arguments: dict[str, Any],
    ) -> torch.Tensor:
        """From noise to a sample, (N, C, H, W), in a scheduler's own steps."""
        self._set_timesteps(num_inference_steps, latents.device)
        timesteps = self.scheduler.timesteps
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                prediction = predict(latents, timestep, step / len(timesteps))
                latents = self.scheduler.step(prediction, timestep, latents, **step_arguments, return_dict=False)[0]
                if callback is not None:
                    replaced = callback(self, step, timestep, {"latents": latents}) or {}
                    latents = replaced.get("latents", latents)
                progress_bar.update()
        return latents

    def _integrate(
        self, predict: Predict, latents: torch.Tensor, num_inference_steps: int, callback: Callable | None
    ) -> torch.Tensor:
        """The same by an ODE solver, which asks for velocities when it wants them."""
        if callback is not None:
            raise ValueError("callback_on_step_end: an ODE solver has no steps of the pipeline; use another scheduler.")
        _require_steps(num_inference_steps)
        end, start = sample_interval(*self._flow())
        with self.progress_bar(total=100) as progress_bar:  # percent of the way: how many steps it takes is not known

            def velocity(timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
                time = float(timestep) / self.scheduler.config.num_train_timesteps
                progress = (start - time) / (start - end)
                progress_bar.update(max(0, round(100 * progress) - progress_bar.n))
                return predict(sample, timestep, min(progress, PROGRESS_END))

            return self.scheduler.integrate(velocity, latents, start, end, num_inference_steps)

    def _sampler_settings(self) -> dict[str, Any]:
        config = {name: value for name, value in self.scheduler.config.items() if not name.startswith("_")}
        dtype = str(self.transformer.dtype).removeprefix("torch.")
        return {"scheduler": type(self.scheduler).__name__, "scheduler_config": config, "dtype": dtype}

    def _labels(self, class_labels: Any, num_images_per_label: int) -> list[int]:
        if num_images_per_label < 1:
            raise ValueError(f"num_images_per_label={num_images_per_label} is below 1; ask for at least one image.")
        if class_labels is None:
            if self.transformer.config.num_classes:
                raise ValueError(
                    f"class_labels is missing and the model has {self.transformer.config.num_classes} classes; "
                    "pass a class name or id, or a list of them."
                )
            return []
        ids = self.get_label_ids(class_labels)
        if not ids:
            raise ValueError("class_labels is empty; pass at least one class name or id.")
        return [label_id for label_id in ids for _ in range(num_images_per_label)]

    def _check_arguments(
        self,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        guidance_channels: int | None,
        output_type: str,
        callback_tensors: Sequence[str],
    ) -> None:
        if not guidance_scale >= 1.0:
            raise ValueError(
                f"guidance_scale={guidance_scale} is below 1; 1.0 turns guidance off. (0 would draw without a class.)"
            )
        start, stop = guidance_interval
        if not 0.0 <= start < stop <= 1.0:
            raise ValueError(f"guidance_interval={guidance_interval} is not (start, stop) with 0 <= start < stop <= 1.")
        channels = self.transformer.config.in_channels
        if guidance_channels is not None and not 1 <= guidance_channels <= channels:
            raise ValueError(
                f"guidance_channels={guidance_channels} is not between 1 and {channels}; None guides all channels."
            )
        one_of("output_type", output_type, OUTPUT_TYPES)
        unknown = set(callback_tensors) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; use {self._callback_tensor_inputs}."
            )

    def _check_scheduler(self) -> None:
        """Refuse pairs of model and scheduler that would run and draw noise."""
        name, config = type(self.scheduler).__name__, self.scheduler.config
        path = path_of(self.transformer.config)
        wanted = "epsilon" if path is None else "flow_prediction"  # whatever a flow model predicts becomes its flow
        is_flow = name.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
        given = "flow_prediction" if is_flow else config.get("prediction_type", "epsilon")
        if given != wanted:
            model = self.transformer.config.prediction_type + (f" on the {path} path" if path else "")
            raise ValueError(
                f"{name} is set up for prediction_type={given!r}, the model predicts {model!r}; "
                "use a DDPM, DDIM or DPM-Solver scheduler for epsilon, a FlowMatch one for flow models "
                "(or a solver with use_flow_sigmas=True, prediction_type='flow_prediction')."
            )
        stored = config.get("flow_path", "linear")
        if path not in (None, stored) and (name not in PATH_AGNOSTIC or config.get("stochastic_sampling")):
            raise ValueError(
                f"{name} works on the {stored} path, the model on {path}; use {', '.join(PATH_AGNOSTIC)} or "
                f"FlowMatchEulerMaruyamaScheduler(flow_path={path!r})."
            )
        has_variance = self.transformer.config.learn_sigma
        learned = config.get("variance_type") in LEARNED_VARIANCE
        if self._takes_learned_variance():
            if not has_variance:
                raise ValueError(
                    f"{name} expects a learned variance that this model does not predict; "
                    f"use {name}.from_config(config, variance_type='fixed_small')."
                )
        elif learned and "variance_type" in inspect.signature(type(self.scheduler).__init__).parameters:
            raise ValueError(
                f"{name} inherited variance_type={config.variance_type!r} and cannot use a learned variance; "
                f"use {name}.from_config(pipe.scheduler.config, variance_type=None)."
            )

    def _takes_learned_variance(self) -> bool:
        ancestral = isinstance(self.scheduler, DDPMScheduler | DDPMParallelScheduler)
        return ancestral and self.scheduler.config.variance_type in LEARNED_VARIANCE

    def _prepare_latents(
        self,
        latents: torch.Tensor | None,
        batch: int,
        height: int | None,
        width: int | None,
        generator: Generators,
        device: torch.device,
    ) -> torch.Tensor:
        default_height, default_width = self.transformer.sample_shape
        step = self.vae_scale_factor * self.transformer.config.patch_size
        size = []
        for name, value, default in (("height", height, default_height), ("width", width, default_width)):
            pixels = default * self.vae_scale_factor if value is None else value
            if pixels < step or pixels % step:
                raise ValueError(
                    f"{name}={pixels} is not a positive multiple of {step} (patch_size "
                    f"{self.transformer.config.patch_size} x VAE factor {self.vae_scale_factor}); "
                    f"use {max(step, pixels - pixels % step)}."
                )
            size.append(pixels // self.vae_scale_factor)
        shape = (batch, self.transformer.config.in_channels, *size)
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"{len(generator)} generators for {batch} images; pass one an image, or a single one.")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif latents.shape != shape:
            raise ValueError(f"latents have the shape {tuple(latents.shape)}; these arguments need {shape}.")
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def _set_timesteps(self, num_inference_steps: int, device: torch.device) -> None:
        _require_steps(num_inference_steps)
        accepted = inspect.signature(self.scheduler.set_timesteps).parameters
        path, prediction_type = self._flow()
        start = sample_interval(path, prediction_type)[1] if path else 1.0
        if type(self.scheduler).__name__.startswith("FlowMatch") and "sigmas" in accepted:
            # Even steps from 1 to 0 (SiT's); the scheduler's default ends at sigma = 0.001 and jumps to 0.
            sigmas = np.linspace(start, 0.0, num_inference_steps + 1)[:-1]
            self.scheduler.set_timesteps(sigmas=sigmas.tolist(), device=device)
        elif "start" in accepted:
            self.scheduler.set_timesteps(num_inference_steps, device=device, start=start)
        elif start < 1.0:
            raise ValueError(
                f"{type(self.scheduler).__name__} starts at pure noise, where a {prediction_type} model on the {path} "
                "path has no velocity; use FlowMatchEulerDiscreteScheduler or "
                "FlowMatchODESolverScheduler(method='heun2')."
            )
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)

    def _flow(self) -> tuple[Any, str]:
        """The model's path, None if it is no flow model, and what it predicts."""
        config = self.transformer.config
        return path_of(config), config.prediction_type

    def _as_scheduler_takes_it(
        self, prediction: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """A model's prediction (N, C or 2C, H, W): as velocity for flows, with its variance where that is wanted."""
        path, prediction_type = self._flow()
        if path is not None and prediction_type != "flow_prediction":
            time = float(timestep) / self.scheduler.config.num_train_timesteps
            return path_numbers(path, time).velocity_of(prediction_type, prediction, sample)
        if self._takes_learned_variance():
            return prediction
        return prediction[:, : self.transformer.config.in_channels]

    def _scale_model_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scale = getattr(self.scheduler, "scale_model_input", None)
        return scale(latents, timestep) if scale is not None else latents

    def _step_arguments(self, generator: Generators, eta: float) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        arguments = {"generator": generator, "eta": eta}
        return {name: value for name, value in arguments.items() if name in accepted}

    def _predict(self, latents: torch.Tensor, timestep: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        # Caches (FirstBlockCache and others) keep one state a context; guided and unguided steps differ in batch size.
        with self.transformer.cache_context(f"batch of {len(latents)}"):
            prediction = self.transformer(
                latents.to(self.transformer.dtype), timestep.expand(len(latents)), label_ids, return_dict=False
            )[0]
        return prediction.float()

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        if output_type == "latent":
            return latents
        images = decode_latents(self.vae, latents) if self.vae is not None else latents
        # Already float32, so that PIL output is rounded there and not in half precision.
        return self.image_processor.postprocess(images, output_type=output_type)


def _require_steps(num_inference_steps: int) -> None:
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps} is below 1.")


def _guide(both: torch.Tensor, scale: float, channels: int) -> torch.Tensor:
    """Classifier-free guidance on the first `channels` channels; the others, variance too, stay conditional."""
    conditional, unconditional = both.chunk(2)
    guided = unconditional[:, :channels] + scale * (conditional[:, :channels] - unconditional[:, :channels])
    return torch.cat([guided, conditional[:, channels:]], dim=1)


@contextlib.contextmanager
def _eval_mode(*modules: torch.nn.Module | None) -> Iterator[None]:
    """Put modules in eval mode, then restore each submodule's own mode.

    In training mode sampling would use, and move, BatchNorm's batch statistics.
    """
    submodules = [sub for module in modules if module is not None for sub in module.modules()]
    modes = [sub.training for sub in submodules]
    try:
        for module in modules:
            if module is not None:
                module.eval()
        yield
    finally:
        for sub, mode in zip(submodules, modes, strict=True):
            sub.training = mode
