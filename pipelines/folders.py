"""Folders that a pipeline is loaded from: its own, strictly; Diffusers' DiT, converted; any other, refused by name."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ConfigMixin, DiTPipeline, ModelMixin, SchedulerMixin

from d_emo.common.messages import first_line
from d_emo.common.ranges import Table, take
from d_emo.common.saved_folders import LOADING_ERRORS, PLACE, held_in, kind_of, not_found, read_object
from d_emo.images.autoencoder_kinds import KINDS
from d_emo.images.autoencoders import LatentSpace, check_class, load_autoencoder
from d_emo.models import DiTBaselineTransformer2DModel
from d_emo.models.diffusers_dit import CLASSES
from d_emo.schedulers.flow_paths import TRAIN_TIMESTEPS

from .checks import takes_learned_variance

INDEX = "model_index.json"
# Whose classes a pipeline's parts may be.
LIBRARIES = ("diffusers", "d_emo")
SCHEDULER: Table = {"num_train_timesteps": TRAIN_TIMESTEPS}
# The label that Diffusers' DiTPipeline takes for "no class".
THEIR_NULL_LABEL = 1000


class FolderMixin:
    """`from_pretrained`, and the way to Diffusers' `DiTPipeline`."""

    transformer: Any
    scheduler: Any
    vae: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Diffusers' `from_pretrained`, strict; a folder of Diffusers' `DiTPipeline` is converted.

        Raises:
            ValueError: the folder holds something else, parts of it are damaged, or weights are missing or left over.
        """
        name, loading = pretrained_model_name_or_path, dict(kwargs)
        index = _index(cls, name, kwargs)
        if index:
            _check_parts(name, index, kwargs)
            _check_sizes(name, index, kwargs)
            if "transformer" not in kwargs and index["transformer"][1] in CLASSES:
                options = _options(name, "transformer", kwargs)
                loading["transformer"] = DiTBaselineTransformer2DModel.from_pretrained(name, **options)
            if "vae" not in kwargs and (index.get("vae") or [None])[0] is not None and _follows(name, kwargs):
                loading["vae"] = _load_vae(name, index["vae"][1], kwargs)
        mixed: Any = super()
        return mixed.from_pretrained(name, **loading)

    @classmethod
    def extract_init_dict(cls, config_dict: Any, **kwargs: Any) -> Any:
        """Diffusers' own; an autoencoder that Diffusers then loads, also for `DiffusionPipeline`, is read strictly."""
        mixed: Any = super()
        parts, *others = mixed.extract_init_dict(config_dict, **kwargs)
        entry = parts.get("vae")
        if isinstance(entry, list) and len(entry) == 2 and entry[0] == "diffusers" and entry[1] in KINDS:
            parts["vae"] = [StrictAutoencoder.__module__, StrictAutoencoder.__name__]
        return parts, *others

    def to_dit_pipeline(self) -> DiTPipeline:
        """This pipeline as Diffusers' `DiTPipeline`: network, schedule, decoder and class names; weights are copied.

        Its `save_pretrained` writes a folder for those who have Diffusers alone. There the variance is not read, so
        that a scheduler with a learned one gets a fixed one.

        Raises:
            ValueError: the network cannot become Diffusers' DiT, or there is no decoder; the message says why.
        """
        transformer = self.transformer.to_diffusers()
        if self.vae is None:
            raise ValueError("a model of pixels has no VAE, which DiTPipeline needs; save transformer.to_diffusers().")
        _check_one_scale(self.latent_space)  # type: ignore[attr-defined]
        classes = self.transformer.config.num_classes
        if classes != THEIR_NULL_LABEL:
            warnings.warn(
                f"DiTPipeline asks for label {THEIR_NULL_LABEL} where no class is meant, and this model has {classes} "
                "classes: draw there with guidance_scale=1.0 only.",
                stacklevel=2,
            )
        scheduler = self.scheduler
        if takes_learned_variance(scheduler):
            scheduler = type(scheduler).from_config(scheduler.config, variance_type="fixed_small")
        names = dict(self.id2label) or None  # type: ignore[attr-defined]
        made = DiTPipeline(transformer=transformer, vae=self.vae, scheduler=scheduler, id2label=names)
        made.register_to_config(id2label=names)  # which it reads from a folder, but would not write
        return made


class StrictAutoencoder(ModelMixin, ConfigMixin):
    """In place of an autoencoder's class while Diffusers loads a pipeline: makes the class that the folder names.

    Diffusers itself fills weights that are missing with random ones.
    """

    config_name = "config.json"

    @classmethod
    def from_pretrained(cls, name: Any, **options: Any) -> Any:
        """An autoencoder of its folder.

        Raises:
            ValueError: weights are missing or left over, or the configuration is out of range.
        """
        try:
            config = diffusers.AutoencoderKL.load_config(name)
            check_class(config.get("_class_name"))
            return load_autoencoder(name, config, **options)
        except LOADING_ERRORS as error:
            reason = first_line(error).removeprefix(f"{name}: ").rstrip(".")
            raise ValueError(f"{name}: this vae does not load ({reason}); restore that folder.") from error

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Any:
        """One without weights, by which Diffusers plans where parts go."""
        return getattr(diffusers, check_class(config.get("_class_name"))).from_config(config, **options)


def _index(wanted: Any, name: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a pipeline's model_index.json says; empty where Diffusers will say that there is none."""
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"{name} is a file; pass the folder that {wanted.__name__}.save_pretrained wrote.")
    if folder.is_dir():
        if not (folder / INDEX).is_file():
            newest = max(folder.glob(f"checkpoint-*/{INDEX}"), default=None)
            remedy = (
                f"pass a folder that {wanted.__name__}.save_pretrained or a trainer wrote"
                if newest is None
                else f"a run that has not ended is drawn from by its newest checkpoint, {newest.parent.name} there"
            )
            raise ValueError(f"{name}: there is no pipeline in it (no {INDEX}), but {held_in(folder)}; {remedy}.")
        return read_object(folder / INDEX)
    try:
        return dict(wanted.load_config(name, **{key: options[key] for key in PLACE if key in options}))
    except OSError as error:
        raise not_found(name, error) from error


def _check_parts(name: Any, index: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse another kind of pipeline, and parts of classes that no pipeline here has."""
    kind = index.get("_class_name")
    for part in ("transformer", "scheduler", "vae"):
        entry = index.get(part)
        if part in given or (part == "vae" and entry in (None, [None, None])):
            continue
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(item, str) for item in entry)):
            raise ValueError(
                f"{name}: its {INDEX} is of a {kind}, which has no {part}; load it with diffusers.DiffusionPipeline."
                if entry is None
                else f"{name}: its {INDEX} names {part}={entry!r}, not a library and a class; restore it."
            )
        if entry[0] not in LIBRARIES:
            raise ValueError(
                f"{name}: its {INDEX} takes {part} from {entry[0]!r}, not from {' or '.join(LIBRARIES)}; load that "
                f"part yourself and pass it as {part}=..."
            )
        if part == "transformer" and entry[0] == "diffusers" and entry[1] not in CLASSES:
            raise ValueError(
                f"{name}: its {INDEX} is of a {kind} with a {entry[1]}, which is no network of this package; load it "
                f"with diffusers.{kind}.from_pretrained."
            )
        if part == "vae":
            try:
                check_class(entry[1])
            except ValueError as error:
                raise ValueError(f"{name}: its {INDEX} names vae={entry!r}: {error}") from error
            continue
        found = getattr(diffusers, entry[1], None)  # which knows this package's classes, too (d_emo/registration.py)
        if not (isinstance(found, type) and issubclass(found, SchedulerMixin if part == "scheduler" else ModelMixin)):
            wanted = "scheduler" if part == "scheduler" else "network"
            raise ValueError(f"{name}: its {INDEX} names {part}={entry!r}, which is no {wanted}; restore it.")


def _check_one_scale(space: LatentSpace) -> None:
    """Refuse latents that are not one factor away from the autoencoder's, which is all that DiTPipeline does to them.

    Raises:
        ValueError: they are; the message says why.
    """
    reason = ""
    if space.autoencoder != "AutoencoderKL":
        reason = f"the VAE is an {space.autoencoder}, not an AutoencoderKL as DiTPipeline takes"
    elif space.measured_on:
        reason = f"latents are normalised by statistics measured on {space.measured_on}, which DiTPipeline leaves out"
    elif len(space.std) > 1:
        reason = "the VAE has latents_std, which DiTPipeline leaves out"
    elif any(space.mean):
        reason = f"the VAE has shift_factor={space.mean[0]:g}, which DiTPipeline leaves out"
    if reason:
        raise ValueError(f"{reason}; keep the pipeline of this package.")


def _check_sizes(name: Any, index: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse what Diffusers' own parts say of themselves out of range, before they are made."""
    for part, file in (("scheduler", "scheduler_config.json"), ("vae", "config.json")):
        path = Path(name) / part / file
        if part not in given and path.is_file() and (index.get(part) or [None])[0] == "diffusers":
            kind = index[part][1]
            try:
                take(kind, read_object(path), SCHEDULER if part == "scheduler" else KINDS[kind].ranges)
            except ValueError as error:
                raise ValueError(f"{name}: in {part}/{file}, {error}") from error


def _follows(name: Any, options: Mapping[str, Any]) -> bool:
    """Whether a part can be loaded before the others, as they will be."""
    return not any(options.get(key) is not None for key in ("device_map", "quantization_config")) and (
        options.get("variant") is None or Path(name).is_dir()
    )


def _options(name: Any, part: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """How a part of a pipeline is loaded, of the options for the whole."""
    chosen = {key: options[key] for key in (*PLACE, "use_safetensors") if key in options}
    dtype = options.get("dtype", options.get("torch_dtype"))
    if isinstance(dtype, Mapping):
        dtype = dtype.get(part, dtype.get("default"))
    if dtype is not None:
        chosen["dtype"] = dtype
    variant = options.get("variant")
    if variant is not None and any((Path(name) / part).glob(f"*.{variant}.*")):
        chosen["variant"] = variant
    return {**chosen, "subfolder": part}


def _load_vae(name: Any, kind: str, options: Mapping[str, Any]) -> Any:
    """The decoder of a pipeline's folder.

    Raises:
        ValueError: its class is another than the index says; weights are missing or left over, or of another shape.
    """
    chosen = _options(name, "vae", options)
    try:
        config = diffusers.AutoencoderKL.load_config(name, **{key: chosen[key] for key in PLACE if key in chosen})
        if config.get("_class_name") != kind:
            raise ValueError(f"its config.json is of {kind_of(config)}, the {INDEX} says {kind}")
        return load_autoencoder(name, config, **chosen)
    except LOADING_ERRORS as error:
        reason = first_line(error).removeprefix(f"{name}: ").rstrip(".")
        raise ValueError(f"{name}: its vae does not load ({reason}); restore that folder.") from error
