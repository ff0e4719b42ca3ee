"""Diffusers' autoencoders of images as one kind of thing: what they take, what they give, how their latents are scaled.

`autoencoder_kinds` says what a class does otherwise than others; whatever else there is asks `latent_space` (numbers)
or `latents` (tensors). `open_vae` is the one way from a name to an autoencoder.
"""

import contextlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from d_emo.common import checks
from d_emo.common.messages import first_line, shown
from d_emo.common.output import unsaid
from d_emo.common.ranges import Each, Flag, Maybe, OneOf, Real, Table, Whole, take
from d_emo.common.saved_folders import LOADING_ERRORS, different, held_in, kind_of, read_object
from d_emo.images.autoencoder_kinds import KINDS

RANGES: Table = {
    "autoencoder": OneOf(tuple(KINDS)),
    **dict.fromkeys(("channels", "image_channels"), Whole(1, 65_536)),
    "factor": Whole(1, 1024),
    "pixel_range": Each(Real(-1, 1), 2, 2),
    "deterministic": Flag(),
    **dict.fromkeys(("input_size", "output_size"), Maybe(Whole(1, 65_536))),
    "mean": Each(Real(), 1, 65_536),
    "std": Each(Real(0, positive=True), 1, 65_536),
}
# Statistics count as equal up to what half precision makes of them: Flux2's lie among its weights.
SAME_STATISTICS = 1e-2
# Fields that Diffusers writes beside those of some classes, and then warns of.
NOTES = {"block_out_channels", "force_upcast"}


@dataclass(frozen=True, kw_only=True)
class LatentSpace:
    """What an autoencoder makes of images. A model is trained on z = (latent - mean) / std.

    Attributes:
        autoencoder: its class in Diffusers.
        channels: of a latent; grouped ones where the class groups them.
        factor: pixels of a decoded image per pixel of a latent, along a side.
        image_channels: 1 or 3.
        pixel_range: of the images that it takes and gives.
        deterministic: whether an image has one latent; else a mean and a deviation.
        input_size: side in pixels to which it resizes what it encodes; None if it encodes what it is given.
        output_size: the only side in pixels that it decodes to; None for any.
        mean, std: of latents, one value, or one a channel.
        measured_on: the data set that `mean` and `std` were measured on; empty where they are the autoencoder's own.

    Raises:
        ValueError: a value that no autoencoder has.
    """

    autoencoder: str
    channels: int
    factor: int
    image_channels: int = 3
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    deterministic: bool = False
    input_size: int | None = None
    output_size: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    measured_on: str = ""
    ranges: ClassVar[Table] = RANGES

    def __post_init__(self):
        for name, value in take("", vars(self), self.ranges).items():
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        if not isinstance(self.measured_on, str):
            raise ValueError(f"measured_on={shown(self.measured_on)} is not the name of a data set.")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values, latents have {self.channels} channels."
                )

    def normalized(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (..., C, h, w) as models are trained on them."""
        return (latents - _by_channel(self.mean).to(latents)) * (1 / _by_channel(self.std)).to(latents)

    def restored(self, normalized: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalized`."""
        return normalized * _by_channel(self.std).to(normalized) + _by_channel(self.mean).to(normalized)

    def side(self, resolution: int) -> int:
        """Side of a latent of an image.

        Args:
            resolution: side of the image in pixels.

        Raises:
            ValueError: the autoencoder makes no such image; the message has sides that it makes.
        """
        if self.output_size not in (None, resolution):
            raise ValueError(f"{self.autoencoder} works at {self.output_size} pixels only; use {self.output_size}.")
        if resolution % self.factor:
            near = max(1, round(resolution / self.factor)) * self.factor
            raise ValueError(f"it is not a multiple of {self.factor}, the factor of {self.autoencoder}; use {near}.")
        return resolution // self.factor

    @property
    def parts(self) -> int:
        """Values that are known of a latent's pixel: 2, mean and standard deviation, or 1 if it is deterministic."""
        return 1 if self.deterministic else 2

    def describe(self) -> str:
        """In a line, for people."""
        sizes = f"takes {self.input_size} pixels, gives {self.output_size}, " if self.input_size else ""
        draws = "deterministic" if self.deterministic else "a posterior"
        if len(self.mean) == len(self.std) == 1:
            scale = f"mean {self.mean[0]:.4g} and deviation {self.std[0]:.4g}"
        else:
            scale = f"values by channel (deviations {min(self.std):.3g} to {max(self.std):.3g})"
        if (self.mean, self.std) == ((0.0,), (1.0,)):
            scale = "itself" if self.output_size else "nothing"
        measured = f" measured on {self.measured_on}" if self.measured_on else ""
        return (
            f"{self.autoencoder}, {self.channels} channels, factor {self.factor}, {sizes}{draws}, normalised by "
            f"{scale}{measured}"
        )

    def differences(self, other: "LatentSpace") -> list[str]:
        """What another space has otherwise, as "NAME this -> that".

        Statistics count as equal up to rounding; where one of the two has measured ones, they are not compared.
        """
        ours, theirs = vars(self), vars(other)
        free = {"measured_on", *(("mean", "std") if self.measured_on or other.measured_on else ())}
        changed = [name for name in ours if name not in free and not _equal(ours[name], theirs[name])]
        return [f"{name} {_brief(ours[name])} -> {_brief(theirs[name])}" for name in changed]


def _by_channel(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(
            math.isclose(a, b, rel_tol=SAME_STATISTICS) for a, b in zip(one, other, strict=True)
        )
    return one == other


def _brief(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return f"{value[0]:g}" if len(value) == 1 else f"({value[0]:g}, ... {len(value)} values)"


def class_of(vae: Any) -> str:
    """The name of an autoencoder's class, of the one that it is derived from, or of what `torch.compile` wrapped.

    Raises:
        ValueError: it is none that models here work with; the message lists those.
    """
    own = type(getattr(vae, "_orig_mod", vae))
    return next((kind.__name__ for kind in own.__mro__ if kind.__name__ in KINDS), "") or check_class(own.__name__)


def check_class(name: Any) -> str:
    """The name of a class of autoencoders, or a refusal with the list of them."""
    if name not in KINDS:
        raise ValueError(f"{shown(name)} is no autoencoder that models here work with; use {', '.join(KINDS)}.")
    return str(name)


def group_side(vae: Any) -> int:
    """Side of the squares of latent pixels that become channels of one pixel, row by row; 1 for none.

    Raises:
        ValueError: they are no squares.
    """
    name = class_of(vae)
    if not KINDS[name].group:
        return 1
    height, width = vae.config[KINDS[name].group]
    if height != width:
        raise ValueError(f"{name} groups latents by {height} x {width}; models here take square groups.")
    return int(height)


def latent_space(vae: Any) -> LatentSpace:
    """The description of an autoencoder, of its configuration and statistics.

    Raises:
        ValueError: it is none that models here work with, or its configuration contradicts itself.
    """
    name, config = class_of(vae), vae.config
    kind, group = KINDS[name], group_side(vae)
    if config.get("reshape_to_2d") is False:
        raise ValueError(f"{name} has reshape_to_2d=False, a list of tokens; models here take a grid: set it to True.")
    taken, given = config[kind.in_channels], config.get("out_channels", config[kind.in_channels])
    if taken != given:
        raise ValueError(f"{name} takes images of {taken} channels and gives {given}; models here need one number.")
    input_size, output_size = (None, None) if kind.sizes is None else _sides(vae, *kind.sizes)
    try:
        mean, std = kind.statistics(vae)
        return LatentSpace(
            autoencoder=name,
            channels=config[kind.channels] * group**2,
            factor=kind.factor(config) * group,
            image_channels=taken,
            pixel_range=kind.pixel_range,
            deterministic=kind.output != "latent_dist",
            input_size=input_size,
            output_size=output_size,
            mean=mean,
            std=std,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {first_line(error)}") from error


def doubtful_scale(vae: Any) -> str:
    """Why an autoencoder's own statistics look wrong, and what to do, for people; empty where they do not.

    Folders of VA-VAE have values by channel that normalise by themselves, and often a `scaling_factor` only because
    Diffusers' class has a default.
    """
    import diffusers

    name, config = class_of(vae), vae.config
    if config.get("latents_std") is None:
        return ""
    scale = config.scaling_factor
    if scale == 1 or scale != inspect.signature(getattr(diffusers, name)).parameters["scaling_factor"].default:
        return ""
    return (
        f"the autoencoder has latents_std and scaling_factor={scale:g} besides, which is the default of {name}: "
        f"latents have a deviation of about {scale:.2g}. Where latents_std alone is meant, as VA-VAE's is, say "
        '"scaling_factor": 1.0 in its config.json, or measure statistics (encode_latents.py --statistics true)'
    )


def _sides(vae: Any, taken: str, given: str) -> tuple[int, int]:
    # Where the configuration leaves the second out, the class derives it.
    return int(vae.config[taken]), int(vae.config[given] or vae.decoder_image_size)


def space_of(stored: Mapping[str, Any], kind: type[LatentSpace] = LatentSpace) -> LatentSpace:
    """A description of a kind of latents, as `dataclasses.asdict` and JSON keep it.

    Raises:
        ValueError: it is none.
    """
    try:
        return kind(**stored)
    except TypeError as error:
        reason = first_line(error).rpartition("() ")[2] if isinstance(stored, Mapping) else "it is no table"
        raise ValueError(
            f"{shown(stored)} describes no latents ({reason}); pass dataclasses.asdict of a LatentSpace."
        ) from error


def open_vae(name: str, dtype: torch.dtype | None = None) -> Any:
    """An autoencoder, of the class that its folder names, in eval mode.

    Args:
        name: Hub id, its folder, or a pipeline's folder or id that has it in `vae/`.
        dtype: of its weights; None for float32.

    Raises:
        ValueError: it is neither a local folder nor reachable, of another class, or lacks weights.
    """
    name = checks.text(name, "vae")
    try:
        config, place = _stored_config(name)
    except LOADING_ERRORS as error:
        reason = first_line(error)
        if Path(name).exists():
            raise ValueError(f"{name}: its VAE does not load ({reason}); restore it, or name another.") from error
        raise ValueError(
            f"{name}: neither a VAE folder nor reachable on the Hub ({reason}). Fetch it where there is a "
            f"network (hf download {name}) and pass its folder."
        ) from error
    if config.get("_class_name") not in KINDS:
        raise ValueError(f"{name} is {kind_of(config)}, no autoencoder that models here work with: {', '.join(KINDS)}.")
    try:
        return load_autoencoder(name, config, **place, **({} if dtype is None else {"dtype": dtype}))
    except LOADING_ERRORS as error:
        reason = first_line(error).removeprefix(f"{name}: ").rstrip(".")
        raise ValueError(f"{name}: its VAE does not load ({reason}); fetch it again, or name another.") from error


def _stored_config(name: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What an autoencoder's config.json says, and the subfolder where it lies, as an argument of `from_pretrained`."""
    folder, inside = Path(name), {"subfolder": "vae"}
    if folder.is_file():
        raise ValueError("it is a file, no folder")
    if folder.is_dir():
        place = inside if (folder / "vae" / "config.json").is_file() else {}
        folder = folder / place.get("subfolder", "")
        if not (folder / "config.json").is_file():
            raise ValueError(f"it holds {held_in(folder)}, no config.json")
        return read_object(folder / "config.json"), place
    from diffusers import AutoencoderKL
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return dict(AutoencoderKL.load_config(name)), {}
    except OSError as error:
        # Where the Hub did not answer, it is not asked again: only its cache.
        answered = isinstance(error.__context__, EntryNotFoundError) and not isinstance(
            error.__context__, LocalEntryNotFoundError
        )
        try:
            return dict(AutoencoderKL.load_config(name, local_files_only=not answered, **inside)), inside
        except OSError:
            raise error from None


def load_autoencoder(name: Any, config: Mapping[str, Any], **options: Any) -> Any:
    """Diffusers' `from_pretrained` of one of the classes of `KINDS`, strict, in eval mode.

    Args:
        name: folder or Hub id.
        config: what its config.json says.
        options: of `from_pretrained`.

    Raises:
        ValueError: the configuration is out of range, or contradicts itself or the weights.
    """
    import diffusers

    name_of_class = config["_class_name"]
    kind = getattr(diffusers, name_of_class)
    take(name_of_class, config, KINDS[name_of_class].ranges)
    unknown = {key for key in config if not key.startswith("_")} - set(inspect.signature(kind).parameters)
    with contextlib.ExitStack() as quiet:
        if unknown <= NOTES:
            quiet.enter_context(unsaid("diffusers.configuration_utils", "The config attributes"))
        vae, information = kind.from_pretrained(name, output_loading_info=True, **options)
    if wrong := different(information["missing_keys"], information["unexpected_keys"]):
        raise ValueError(wrong)
    latent_space(vae)
    return vae.eval()
