"""DEMOPipeline: class labels in, images out, with any Diffusers scheduler that fits the model's objective.

Sources: classifier-free guidance, arXiv 2207.12598; DiT's sampler and its guidance on the first three channels,
arXiv 2212.09748; guidance in a limited interval, arXiv 2404.07724; its other forms are in `guidance.py`.

Shapes: N images, C latent (or image) channels, H x W latent (or image) size.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from d_emo.common.messages import shown
from d_emo.common.ranges import Maybe, checked
from d_emo.images.labels import LabelLike, LabelResolver, normalize_id2label
from d_emo.models import ClassConditionalTransformer2DModel
from d_emo.schedulers import FlowMatchODESolverScheduler
from d_emo.schedulers.flow_paths import STEPS, path_numbers, path_of, sample_interval, way_done

from . import checks
from .decoding import DecodingMixin
from .folders import FolderMixin
from .guidance import DEFAULT_SCALE, Guided, make_guidance
from .habits import DecoderSwitches, names_arguments
from .lora import LoraMixin

# Where a transformer remembers the class names of its last pipeline, so that they survive Diffusers' ways of making a
# new pipeline of an old one's parts.
REMEMBERED_NAMES = "names_of_its_pipeline"

Generators = torch.Generator | list[torch.Generator] | None
# (sample, timestep, how much of the way is done) -> what the scheduler takes
Predict = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@dataclass
class DEMOPipelineOutput(BaseOutput):
    """What a sampling run returns.

    Attributes:
        images: list of N PIL images; or a float array (N, H, W, channels) or tensor (N, channels, H, W) in [0, 1]; or
            latents (N, C, H, W), by `output_type`.
        class_labels: the N class ids drawn; empty for an unconditional model.
        settings: everything that moves the result: sampler, its configuration, steps, guidance, dtype; and what an
            image cost, in evaluations of the network and of the one that guides. Plain values, ready for JSON.
    """

    images: Any
    class_labels: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


class DEMOPipeline(FolderMixin, LoraMixin, DecodingMixin, DecoderSwitches, DiffusionPipeline):
    """Class-conditional image generation with D-EMOv2, or with the DiT baseline.

    Args:
        transformer: `DEMOTransformer2DModel` or `DiTBaselineTransformer2DModel`.
        scheduler: any Diffusers scheduler of the model's kind: `DDPMScheduler`, `DDIMScheduler`,
            `DPMSolverMultistepScheduler` for DiT's diffusion; `FlowMatchEulerDiscreteScheduler` and others for flow
            models, whatever these predict.
        vae: decodes latents, any of the classes of docs/autoencoders.md; without one the model works on pixels.
        id2label: class names by id, or a list of them in the order of the ids; saved with the pipeline. A name may list
            synonyms separated by commas. Left out, the names of the pipeline that the transformer was in before hold.
        default_num_inference_steps: steps of a call that names no number, saved with the pipeline. None: what suits the
            scheduler, 250 for ancestral and stochastic ones, 4 for flow maps, 50 for the others.
        latent_space: which latents the model was trained on, `dataclasses.asdict` of a `LatentSpace`; saved with the
            pipeline. Left out, those of the autoencoder. With measured statistics, decoding goes by these.

    Raises:
        ValueError: the transformer is none of this package's, or names or autoencoder do not fit it; the message gives
            the remedy.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    _interrupt = False
    _guidance_scale = 1.0
    _num_timesteps = 0

    @checked({"default_num_inference_steps": Maybe(STEPS)})
    def __init__(
        self,
        transformer: ClassConditionalTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        id2label: Mapping[Any, str] | Sequence[str] | None = None,
        default_num_inference_steps: int | None = None,
        latent_space: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        checks.check_transformer(transformer)
        checks.check_parts(scheduler, vae)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        self.register_to_config(default_num_inference_steps=default_num_inference_steps)
        # Schedulers that are assigned later have to share it: their defaults differ.
        self.trained_schedule: torch.Tensor | None = getattr(scheduler, "alphas_cumprod", None)
        self.name_classes(getattr(transformer, REMEMBERED_NAMES, None) if id2label is None else id2label)
        self.describe_latents(latent_space)

    def name_classes(self, id2label: Mapping[Any, str] | Sequence[str] | None) -> None:
        """Replace the class names; see the argument of the class.

        Raises:
            ValueError: an id that the model does not have, or a name that is no text.
        """
        classes = self.transformer.config.num_classes
        table = normalize_id2label(_by_id(id2label), classes)
        # JSON turns integer keys into strings; without registering the table again it would be lost on saving.
        self.register_to_config(id2label=table or None)
        setattr(self.transformer, REMEMBERED_NAMES, table or None)
        self.label_resolver = LabelResolver(table, classes)

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "DEMOPipeline":
        """A new pipeline of another one's parts, class names and default number of steps; nothing is copied.

        Args:
            pipeline: a pipeline whose transformer is one of this package's.
            kwargs: parts and settings to replace, by their names in the constructor; `torch_dtype` or `dtype` turns the
                shared weights to a type (Diffusers would turn them to float32 without being asked).
        """
        dtype = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        accepted = list(inspect.signature(cls.__init__).parameters)[1:]
        unknown = sorted(set(kwargs) - set(accepted))
        if unknown:
            raise ValueError(f"from_pipe takes no {unknown}; parts and settings are {accepted}.")
        given = {**pipeline.config, **pipeline.components, **kwargs}
        made = cls(**{name: given[name] for name in accepted if name in given})
        made.trained_schedule = getattr(pipeline, "trained_schedule", made.trained_schedule)
        if (chosen := dtype[0] or dtype[1]) is not None:
            made.to(dtype=chosen)
        return made

    @property
    def guidance_scale(self) -> float:
        """Of the call in progress; a callback may set `_guidance_scale`, as in Diffusers."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call in progress asks the model twice a step, where no weaker one is asked in its place."""
        return checks.takes_guidance(self.transformer.config) and self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Steps of the scheduler in the call in progress."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the call in progress is to end after this step; a callback sets `_interrupt`, as in Diffusers."""
        return self._interrupt

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
        checks.check_flat(labels)
        plain: list[Any] = [
            item.tolist() if isinstance(item, torch.Tensor | np.ndarray | np.generic) else item for item in labels
        ]
        return [self.label_resolver.resolve(item) for item in plain]

    @names_arguments
    @torch.no_grad()
    def __call__(
        self,
        class_labels: LabelLike | Sequence[LabelLike] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float = DEFAULT_SCALE,
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
        guider: Any = None,
        guide: "DEMOPipeline | None" = None,
        internal_guidance: float = 1.0,
    ) -> Any:
        """Draw images.

        Args:
            class_labels: a class name, an id, or a sequence of either. Left out for an unconditional model only.
            num_inference_steps: denoising steps. Left out: the number that was saved with the pipeline, or what suits
                the scheduler: 250 for DDPM (the DiT protocol) and stochastic flows, 4 for flow maps, 50 for the others.
            guidance_scale: 1.0 is off, larger follows the label more closely at the cost of variety. An
                unconditional model takes no guidance, whatever the value of this default, nor does a flow map that was
                trained with it (`distilled_guidance`).
            guidance_interval: the part of the way in which guidance acts, from 0 (pure noise) to 1 (data), its end not
                included: 1 - time for flow models, whatever their steps; the share of the steps for others.
            guidance_channels: guide only the first so many channels; DiT's script guides three of four. None: all.
            num_images_per_label: images of each label, next to each other in the result.
            height, width: image size in pixels; by default the size that the model was configured for.
            generator: one generator, or a list of one an image; with a list an image does not depend on its batch.
            latents: (N, C, H, W) standard-normal noise to start from, instead of drawing it.
            eta: DDIM's noise fraction; other schedulers have none, and take 0 only.
            output_type: "pil", "np", "pt" (both in [0, 1]) or "latent".
            return_dict: return a `DEMOPipelineOutput` instead of a tuple of the images.
            callback_on_step_end: called after each step as f(pipeline, step index, timestep, tensors); may return
                replaced tensors, and may set `pipeline._interrupt = True` to end the call with what there is. One of
                Diffusers' callback objects will do, too.
            callback_on_step_end_tensor_inputs: tensors that the callback gets; only "latents" exists.
            guider: another formula than the plain one, by Diffusers (experimental there): "cfg", "zero-star", "apg",
                "apg-mix" or "tcfg" with this call's `guidance_scale`; or an instance, which has its own scale, start
                and stop (shares of the steps). Nothing of one call stays for the next.
            guide: a weaker pipeline of the same latents and classes, an earlier checkpoint or a smaller model, that is
                steered away from in the place of "no class" (autoguidance); 2 is a usual `guidance_scale`.
            internal_guidance: the same away from the second output head of a model that was trained with
                `--guide-block`, at no cost; of both predictions where there are two. 1.0 is off, 1.4 the paper's.

        Returns:
            A `DEMOPipelineOutput`, or a tuple of its images alone.

        Raises:
            ValueError: an argument is out of range, scheduler and model do not fit, or a step ended in NaN; the message
                gives the remedy. But for the last, nothing was drawn from a generator.
        """
        config = self.transformer.config
        conditional = bool(config.num_classes)
        labels = self._labels(class_labels, num_images_per_label)
        batch = len(labels) if conditional else num_images_per_label
        guidance = make_guidance(
            self, guidance_scale, guidance_interval, guidance_channels, guider, guide, internal_guidance
        )
        checks.check_output(output_type, return_dict)
        self._check_decoder(output_type)
        checks.check_eta(eta, self.scheduler)
        tensors = checks.check_callback(
            callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs
        )
        checks.check_scheduler(self.scheduler, config, self.trained_schedule)
        steps = checks.check_steps(self._steps(num_inference_steps), self.scheduler)
        device = self._execution_device
        shape = checks.check_size((batch, config.in_channels, *self._latent_size(height, width)))
        generator = checks.check_generator(generator, batch, device)
        if latents is not None:
            checks.check_latents(latents, shape)

        self._interrupt, self._guidance_scale = False, guidance.scale
        label_ids = torch.tensor(
            labels if conditional else [self.transformer.null_label] * batch, device=device
        )  # (N,)
        predict = Guided(self, guidance, label_ids)

        def start() -> torch.Tensor:
            """Standard-normal noise (N, C, H, W), drawn when everything else is known to fit."""
            if latents is None:
                return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
            return latents.to(device, torch.float32)

        def after_step(step: int, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
            """What the callback makes of a sample (N, C, H, W)."""
            if callback_on_step_end is None:
                return sample
            answer = callback_on_step_end(self, step, timestep, dict.fromkeys(tensors, sample))
            return checks.replaced_latents(answer, sample)

        with _eval_mode(self.transformer, self.vae, guide and guide.transformer):
            if isinstance(self.scheduler, FlowMatchODESolverScheduler):
                if callback_on_step_end is not None:
                    raise ValueError(
                        "callback_on_step_end: an ODE solver has no steps of the pipeline; use another scheduler."
                    )
                sample = self._integrate(predict, start, steps)
            else:
                arguments = self._step_arguments(generator, float(eta))
                sample = self._step_through(predict, start, steps, device, after_step, arguments)
            images = self._decode(sample, output_type, generator)

        for pipeline in (self, guide):
            if pipeline is not None:
                pipeline.maybe_free_model_hooks()
        if not return_dict:
            return (images,)
        settings = {
            **self._sampler_settings(),
            "num_inference_steps": steps,
            **guidance.settings(),
            "network_evaluations": predict.evaluations,
            "guide_evaluations": predict.guide_evaluations,
            "eta": eta,
        }
        return DEMOPipelineOutput(images=images, class_labels=labels, settings=settings)

    def _step_through(
        self,
        predict: Predict,
        start: Callable[[], torch.Tensor],
        steps: int,
        device: torch.device,
        after_step: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
        step_arguments: dict[str, Any],
    ) -> torch.Tensor:
        """From noise to a sample, (N, C, H, W), in a scheduler's own steps."""
        self._lay_timesteps(steps, device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        moments = way_done(timesteps, self.scheduler.config.num_train_timesteps if self._flow()[0] else None)
        # The scale of the noise is that of the first timestep, so it is known only now.
        latents = start() * getattr(self.scheduler, "init_noise_sigma", 1.0)
        finite = []
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if self._interrupt:
                    break
                prediction = predict(latents, timestep, moments[step])
                latents = self.scheduler.step(prediction, timestep, latents, **step_arguments, return_dict=False)[0]
                latents = after_step(step, timestep, latents)
                finite.append(torch.isfinite(latents).all())
                progress_bar.update()
        checks.check_finite(finite, self.transformer, self._guidance_scale, self.scheduler)
        return latents

    def _integrate(self, predict: Predict, start: Callable[[], torch.Tensor], steps: int) -> torch.Tensor:
        """The same by an ODE solver, which asks for velocities when it wants them."""
        end, first = sample_interval(*self._flow())
        count = self.scheduler.config.num_train_timesteps
        latents = start()
        with self.progress_bar(total=100) as progress_bar:  # percent of the way: how many steps it takes is not known

            def velocity(timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
                if self._interrupt:
                    # From another thread; a solver cannot be left, but it soon ends where nothing moves.
                    return torch.zeros_like(sample)
                progress = (first - float(timestep) / count) / (first - end)
                progress_bar.update(max(0, round(100 * progress) - progress_bar.n))
                return predict(sample, timestep, way_done(timestep[None], count)[0])

            latents = self.scheduler.integrate(velocity, latents, first, end, steps)
        checks.check_finite([torch.isfinite(latents).all()], self.transformer, self._guidance_scale, self.scheduler)
        return latents

    def _sampler_settings(self) -> dict[str, Any]:
        config = {name: value for name, value in self.scheduler.config.items() if not name.startswith("_")}
        dtype = str(self.transformer.dtype).removeprefix("torch.")
        return {"scheduler": type(self.scheduler).__name__, "scheduler_config": config, "dtype": dtype}

    def _labels(self, class_labels: Any, num_images_per_label: int) -> list[int]:
        checks.check_count(num_images_per_label)
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

    def check_steps(self, num_inference_steps: int) -> None:
        """Refuse, as a call would, a number of steps that does not begin at pure noise; nothing is drawn."""
        steps = checks.check_steps(num_inference_steps, self.scheduler)
        if not isinstance(self.scheduler, FlowMatchODESolverScheduler):
            self._lay_timesteps(steps, torch.device("cpu"))

    def _lay_timesteps(self, steps: int, device: torch.device) -> None:
        path, prediction_type = self._flow()
        first = sample_interval(path, prediction_type)[1] if path else 1.0
        checks.lay_timesteps(self.scheduler, steps, device, first, f"{prediction_type} model on the {path} path")

    def _steps(self, num_inference_steps: int | None) -> int:
        """The steps of a call: its own, those saved with the pipeline, or what suits the scheduler."""
        saved = self.config.default_num_inference_steps
        chosen = saved if num_inference_steps is None else num_inference_steps
        return checks.default_steps(self.scheduler) if chosen is None else chosen

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
        if checks.takes_learned_variance(self.scheduler):
            return prediction
        return prediction[:, : self.transformer.config.in_channels]

    def _scale_model_input(self, latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        scale = getattr(self.scheduler, "scale_model_input", None)
        return scale(latents, timestep) if scale is not None else latents

    def _step_arguments(self, generator: Generators, eta: float) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        arguments = {"generator": generator, "eta": eta}
        return {name: value for name, value in arguments.items() if name in accepted}

    def _predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, label_ids: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """All that the network predicts, (N, O, H, W) each: its prediction, then a second head's if it has one."""
        # Caches (FirstBlockCache and others) keep one state a context; guided and unguided steps differ in batch size.
        end = checks.end_of_step(self.scheduler, timestep)
        ends = {} if end is None else {"end_timestep": end.expand(len(latents))}
        with self.transformer.cache_context(f"batch of {len(latents)}"):
            predictions = self.transformer(
                latents.to(self.transformer.dtype), timestep.expand(len(latents)), label_ids, return_dict=False, **ends
            )
        return tuple(prediction.float() for prediction in predictions)


def _by_id(id2label: Mapping[Any, str] | Sequence[str] | None) -> dict[Any, str]:
    """Names by id as the user wrote the ids; of a list, its indices."""
    if id2label is None:
        return {}
    if isinstance(id2label, Mapping):
        table = dict(id2label)
    elif isinstance(id2label, Sequence) and not isinstance(id2label, str):
        table = dict(enumerate(id2label))
    else:
        raise ValueError(
            f"id2label={shown(id2label)} is a {type(id2label).__name__}; pass names by id ({{0: 'cat', ...}}), or a "
            "list."
        )
    for key, name in table.items():
        if not isinstance(name, str):
            remedy = " (ids and names are the other way round?)" if isinstance(key, str) else ""
            raise ValueError(f"id2label has {key!r}: {name!r}; names are text{remedy}.")
    if len({str(key) for key in table}) < len(table):
        raise ValueError(f"id2label has an id twice, as number and as text: {sorted(map(repr, table))}.")
    return table


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
