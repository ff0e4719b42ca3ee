"""Guidance in all its forms: what a call asks of one or two networks at a step, and what it makes of their answers.

Sources: classifier-free guidance, arXiv 2207.12598; on the first channels only, DiT's script (arXiv 2212.09748); in a
limited interval, arXiv 2404.07724; by a weaker model (autoguidance), arXiv 2406.02507; by a second output head of the
same network (internal guidance), arXiv 2512.24176; Diffusers' guiders: zero-star, arXiv 2503.18886, adaptive
projection, arXiv 2410.02416, tangential, arXiv 2503.18137.

All but internal guidance steer from a weak prediction to a good one: the weak one is that for no class, or that of a
weaker model for the same class.

Shapes: N images, C latent (or image) channels, O output channels (C, or 2C with learned variance), H x W.
"""

import copy
import logging
from dataclasses import dataclass
from typing import Any

import torch

from d_emo.common.checks import number
from d_emo.common.messages import nearest, shown
from d_emo.images.labels import LabelResolver
from d_emo.schedulers import FlowMatchODESolverScheduler
from d_emo.schedulers.flow_paths import path_of

from .checks import MAX_GUIDANCE, SAME_SCHEDULE, check_guidance, takes_guidance
from .decoding import DecodingMixin

# The scale of a call that names none.
DEFAULT_SCALE = 1.5
# Diffusers' guiders by the names that calls and commands take: the class, what it is made with, its scales' names.
GUIDERS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "cfg": ("ClassifierFreeGuidance", {}, ("guidance_scale",)),
    "zero-star": ("ClassifierFreeZeroStarGuidance", {}, ("guidance_scale",)),
    # As Diffusers' mixed form has it; its plain form would neither project nor remember.
    "apg": (
        "AdaptiveProjectedGuidance",
        {"eta": 0.0, "adaptive_projected_guidance_momentum": -0.5},
        ("guidance_scale",),
    ),
    "apg-mix": ("AdaptiveProjectedMixGuidance", {}, ("guidance_scale", "adaptive_projected_guidance_scale")),
    "tcfg": ("TangentialClassifierFreeGuidance", {}, ("guidance_scale",)),
}
_NO_MAPS = "it changes attention maps, which these networks do not lay open"
_WEAKER = "take guide=, a weaker pipeline, or internal_guidance"
# Diffusers' guiders that would fail, or run and change nothing, and what to take.
REFUSED = {
    "AutoGuidance": f"it drops layers by hooks that these networks have not; {_WEAKER}",
    "SkipLayerGuidance": f"it skips layers by hooks that these networks have not; {_WEAKER}",
    "PerturbedAttentionGuidance": f"{_NO_MAPS}; {_WEAKER}",
    "SmoothedEnergyGuidance": f"{_NO_MAPS}; {_WEAKER}",
    "MagnitudeAwareGuidance": "it fails outside of its own pipelines; take 'apg'",
    "FrequencyDecoupledGuidance": "it needs kornia, and has not been tried here; take 'apg'",
    "LTX2Guidance": "it is for LTX2's video and sound; take 'cfg'",
}


@dataclass(frozen=True)
class Guidance:
    """How a call is guided.

    Attributes:
        scale: from the weak prediction (0) over the good one (1) on; 1 is none.
        interval: the part of the way in which `scale` acts, from noise (0) to data (1).
        channels: how many are guided; all but internal guidance leave the others as they are.
        guider: Diffusers' own, of this call alone; None for the plain formula.
        guide: the weaker pipeline; None where the weak prediction is that for no class.
        internal: scale of internal guidance, on the whole way; 1 is none.
    """

    scale: float
    interval: tuple[float, float]
    channels: int
    guider: Any = None
    guide: Any = None
    internal: float = 1.0

    def settings(self) -> dict[str, Any]:
        """What moves the result, ready for JSON."""
        guider, guide = self.guider, self.guide
        config = {} if guider is None else {k: v for k, v in guider.config.items() if k[0] != "_"}
        return {
            "guidance_scale": self.scale,
            "guidance_interval": tuple(self.interval),
            "guidance_channels": self.channels,
            "guider": None if guider is None else {"class": type(guider).__name__, **config},
            "guide": None if guide is None else guide.name_or_path or type(guide.transformer).__name__,
            "internal_guidance": self.internal,
        }


class Guided:
    """What the scheduler takes at a sample, of the predictions that guidance asks for; one call's.

    Args:
        pipeline: of the call; its `_guidance_scale` is followed, which a callback may set.
        guidance: how.
        label_ids: (N,) classes.

    Attributes:
        evaluations: of the pipeline's network, an image.
        guide_evaluations: of the weaker one.
    """

    def __init__(self, pipeline: Any, guidance: Guidance, label_ids: torch.Tensor):
        self.pipeline, self.guidance, self.label_ids = pipeline, guidance, label_ids
        self.null_ids = torch.full_like(label_ids, pipeline.transformer.null_label)  # (N,)
        self.channels = pipeline.transformer.config.in_channels
        self.guidable = takes_guidance(pipeline.transformer.config) or guidance.guide is not None
        self.evaluations = self.guide_evaluations = 0
        self._step = 0

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, progress: float) -> torch.Tensor:
        """The guided prediction (N, C or 2C, H, W) at a sample (N, C, H, W), so much of the way from noise."""
        pipeline, how = self.pipeline, self.guidance
        scaled = pipeline._scale_model_input(sample, timestep)  # (N, C, H, W)
        acts = self.guidable and pipeline._guidance_scale > 1.0 and how.interval[0] <= progress < how.interval[1]
        if how.guider is not None:
            return self._by_guider(scaled, sample, timestep, acts)
        good, weak = self._ask(scaled, timestep, two=acts)  # (N, O, H, W)
        if weak is not None:
            guided = extrapolated(weak, good, pipeline._guidance_scale, how.channels)
            good = torch.cat([guided, good[:, how.channels :]], dim=1)  # (N, O, H, W)
        return pipeline._as_scheduler_takes_it(good, sample, timestep)

    def _by_guider(
        self, scaled: torch.Tensor, sample: torch.Tensor, timestep: torch.Tensor, acts: bool
    ) -> torch.Tensor:
        """By Diffusers' guider, of what the scheduler takes: not all of them are linear, and papers guide that."""
        guider, channels = self.guidance.guider, self.guidance.channels
        guider.set_state(self._step, self.pipeline.num_timesteps, timestep)
        self._step += 1
        predictions = self._ask(scaled, timestep, two=acts and guider.num_conditions == 2)
        good, weak = (
            None if prediction is None else self.pipeline._as_scheduler_takes_it(prediction, sample, timestep)
            for prediction in predictions
        )
        assert good is not None
        pair = tuple(None if prediction is None else prediction[:, :channels] for prediction in (good, weak))
        batches = guider.prepare_inputs({"noise_pred": pair})  # also where it does not act: here it begins anew
        return torch.cat([guider(batches)[0], good[:, channels:]], dim=1) if acts else good

    def _ask(self, scaled: torch.Tensor, timestep: torch.Tensor, two: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The good prediction (N, O, H, W), and the weak one if it is wanted."""
        guide = self.guidance.guide
        if two and guide is None:
            both = self._own(scaled.repeat(2, 1, 1, 1), timestep, torch.cat([self.label_ids, self.null_ids]))
            good, weak = both.chunk(2)
            return good, weak
        good = self._own(scaled, timestep, self.label_ids)
        if not two:
            return good, None
        self.guide_evaluations += 1
        return good, guide._predict(scaled, timestep, self.label_ids)[0]

    def _own(self, scaled: torch.Tensor, timestep: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """The network's prediction (N or 2N, O, H, W), each steered away from that of its own second head."""
        self.evaluations += len(scaled) // len(self.label_ids)
        prediction, *heads = self.pipeline._predict(scaled, timestep, label_ids)
        if self.guidance.internal <= 1.0:
            return prediction
        steered = extrapolated(heads[0], prediction, self.guidance.internal, self.channels)
        return torch.cat([steered, prediction[:, self.channels :]], dim=1)


def extrapolated(weak: torch.Tensor, good: torch.Tensor, scale: float, channels: int) -> torch.Tensor:
    """weak + scale (good - weak), of the first channels (N, channels, H, W)."""
    weak, good = weak[:, :channels], good[:, :channels]
    return weak + scale * (good - weak)


def make_guidance(
    pipeline: Any,
    guidance_scale: Any = DEFAULT_SCALE,
    guidance_interval: Any = (0.0, 1.0),
    guidance_channels: Any = None,
    guider: Any = None,
    guide: Any = None,
    internal_guidance: Any = 1.0,
) -> Guidance:
    """How a call is guided, of its arguments.

    Raises:
        ValueError: one is out of range, or they do not fit the model or each other; the message gives the remedy.
    """
    config, scale = pipeline.transformer.config, guidance_scale
    check_guidance(scale, guidance_interval, guidance_channels, config.in_channels)
    check_internal(internal_guidance, pipeline.transformer)
    if guide is not None:
        check_guide(guide, pipeline)
    guidable = takes_guidance(config) or guide is not None
    if guider is not None:
        if not guidable:
            raise ValueError(
                f"guider={shown(guider)}: the model is unconditional, or has guidance in its weights, so that there is "
                "nothing to steer from; leave guider out."
            )
        guider, scale = make_guider(guider, scale)
        check_guider(guider, pipeline)
    return Guidance(
        scale=float(scale) if guidable else 1.0,
        interval=tuple(guidance_interval),
        channels=guidance_channels or config.in_channels,
        guider=guider,
        guide=guide,
        internal=float(internal_guidance),
    )


def check_internal(scale: Any, transformer: Any) -> None:
    """Refuse internal guidance of a network that has no second head, or whose blocks a cache leaves out."""
    if number(scale, "internal_guidance", 1, MAX_GUIDANCE, "1.0 turns it off, 1.4 is the paper's") == 1:
        return
    if transformer.config.get("guide_block") is None:
        raise ValueError(
            f"internal_guidance={scale}: the model has no second output head; train one with --guide-block, or guide "
            "by guidance_scale."
        )
    if transformer.is_cache_enabled:
        raise ValueError(
            f"internal_guidance={scale}: a cache is on, which leaves out the blocks that the second head is between; "
            "call transformer.disable_cache(), or leave internal_guidance out."
        )


def make_guider(guider: Any, scale: float) -> tuple[Any, float]:
    """A guider of this call alone, and its scale as ours: a name's with the call's scale, or a copy of an instance.

    Raises:
        ValueError: no such guider, one that does nothing here, or a scale that it has itself.
    """
    import diffusers.guiders as theirs

    if isinstance(guider, str):
        if guider in REFUSED:
            raise ValueError(f"guider={guider!r}: {REFUSED[guider]}.")
        if guider not in GUIDERS:
            near = nearest(guider, GUIDERS, f"use one of {', '.join(GUIDERS)}.")
            raise ValueError(f"guider={shown(guider)} is none of Diffusers' that fit here; {near}")
        name, arguments, scales = GUIDERS[guider]
        with _quiet():
            return getattr(theirs, name)(**arguments, **dict.fromkeys(scales, float(scale))), scale
    kind, kinds = type(guider).__name__, {name: getattr(theirs, name) for name, *_ in GUIDERS.values()}
    if kind in REFUSED:
        raise ValueError(f"guider is a {kind}: {REFUSED[kind]}.")
    if not any(isinstance(guider, one) for one in kinds.values()):
        raise ValueError(
            f"guider={shown(guider)} is a {kind}; pass one of {', '.join(GUIDERS)}, or an instance of Diffusers' "
            f"{', '.join(kinds)}."
        )
    # Its original formula counts from the good prediction on.
    own = guider.guidance_scale + bool(guider.use_original_formulation)
    number(own, "guider's guidance_scale", 1, MAX_GUIDANCE, "1.0 turns guidance off, values up to 10 are usual")
    if scale not in (DEFAULT_SCALE, own):
        raise ValueError(f"guidance_scale={scale}: the guider has its own, {own:g}; set it there, or pass its name.")
    return copy.deepcopy(guider), own


def check_guider(guider: Any, pipeline: Any) -> None:
    """Refuse a guider that the scheduler or what it predicts has no place for."""
    if isinstance(pipeline.scheduler, FlowMatchODESolverScheduler):
        raise ValueError(
            f"guider: {type(guider).__name__} counts steps, and an ODE solver has none; use another scheduler, or "
            "guidance_scale alone."
        )
    if getattr(guider, "zero_init_steps", 0) and path_of(pipeline.transformer.config) is None:
        raise ValueError(
            f"guider: {type(guider).__name__} begins with a velocity of zero, and the model predicts noise; pass it "
            "with zero_init_steps=0, or take 'apg' or 'tcfg'."
        )


def check_guide(guide: Any, pipeline: Any) -> None:
    """Refuse a weaker pipeline whose predictions do not belong beside those of the pipeline itself."""
    if not isinstance(guide, DecodingMixin):
        raise ValueError(
            f"guide={shown(guide)} is a {type(guide).__name__}; pass a weaker DEMOPipeline, such as that of an earlier "
            "checkpoint: DEMOPipeline.from_pretrained('runs/B-2/checkpoint-0100000')."
        )
    if guide.transformer is pipeline.transformer:
        raise ValueError("guide is the pipeline's own model, which steers nowhere; pass a weaker one.")
    differences = _differences(guide, pipeline)
    if differences:
        raise ValueError(
            f"guide: the weaker model {'; '.join(differences)}; take an earlier checkpoint of the same run, or a "
            "smaller model trained on the same data."
        )
    both: tuple[Any, Any] = pipeline, guide
    here, there = (one._execution_device for one in both)
    if here != there:
        raise ValueError(f"guide is on {there}, the pipeline on {here}; move it: guide.to({str(here)!r}).")


def _differences(guide: Any, pipeline: Any) -> list[str]:
    """What a weaker model has otherwise that has to be alike."""
    own, weak = pipeline.transformer.config, guide.transformer.config
    found = [
        f"has {said} {weak[name]!r}, not {own[name]!r}"
        for name, said in {"in_channels": "channels", "num_classes": "classes", "prediction_type": "prediction"}.items()
        if weak[name] != own[name]
    ]
    if any(config.get("end_block") is not None for config in (own, weak)):
        found.append("and the model would have to jump alike, and flow maps cannot be guided by another model")
    if path_of(own) != path_of(weak):
        found.append(f"is of the path {path_of(weak)}, not {path_of(own)}")
    if not found and _names(guide.label_resolver) != _names(pipeline.label_resolver):
        found.append("has other class names")
    trained, learned = pipeline.trained_schedule, guide.trained_schedule
    if trained is not None and learned is not None and path_of(own) is None and not _alike(trained, learned):
        found.append("was trained on another noise schedule")
    space, other = pipeline.latent_space, guide.latent_space
    if (space is None) != (other is None):
        found.append(f"draws {'pixels' if other is None else 'latents'}")
    elif space is not None and other is not None:
        found += [f"has other latents ({changed})" for changed in space.differences(other)]
    sides, patch = pipeline.transformer.sample_shape, guide.transformer.config.patch_size
    if any(side % patch for side in sides):
        found.append(f"has patches of {patch}, which do not divide {sides[0]} x {sides[1]}")
    return found


def _names(resolver: LabelResolver) -> dict[int, str] | None:
    """Class names; None where there are none, which any fit."""
    return resolver.id2label or None


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.cpu(), other.cpu(), atol=SAME_SCHEDULE, rtol=0)


class _quiet:
    """Within it, Diffusers does not warn that guiders are experimental, once a guider; docs/recipes.md says so."""

    logger = logging.getLogger("diffusers.guiders.guider_utils")

    def __enter__(self) -> None:
        self.before, self.logger.disabled = self.logger.disabled, True

    def __exit__(self, *_: object) -> None:
        self.logger.disabled = self.before
