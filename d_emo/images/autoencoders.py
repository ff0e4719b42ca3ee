"""Diffusers' autoencoders of images as one kind of thing: what they take, what they give, how their latents are scaled.

Each class has habits of its own: AutoencoderRAE works in [0, 1] and takes pictures of another size than it gives,
AutoencoderKLFlux2 keeps its statistics in a BatchNorm and groups latents by 2 x 2, some have a posterior and some do
not. `KINDS` says so once a class; whatever else there is asks `latent_space` (numbers) or `latents` (tensors).

Sources: the classes of Diffusers 0.42 and the pipelines there that use them; RAE arXiv 2510.11690, DC-AE 2410.10733,
asymmetric VQGAN 2306.04632.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from d_emo.common import checks
from d_emo.common.messages import first_line, shown
from d_emo.common.ranges import Each, Flag, Maybe, OneOf, Real, Table, Whole, take
from d_emo.common.saved_folders import LOADING_ERRORS, held_in, kind_of, read_object

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
RANGES: Table = {
    **dict.fromkeys(("channels", "image_channels"), Whole(1, 65_536)),
    "factor": Whole(1, 1024),
    "pixel_range": Each(Real(-1, 1), 2, 2),
    "deterministic": Flag(),
    **dict.fromkeys(("input_size", "output_size"), Maybe(Whole(1, 65_536))),
    "mean": Each(Real(), 1, 65_536),
    "std": Each(Real(0, positive=True), 1, 65_536),
}


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

    def __post_init__(self):
        OneOf(tuple(KINDS)).check(self.autoencoder, "autoencoder")
        for name, value in take("", vars(self), RANGES).items():
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

    def describe(self) -> str:
        """In a line, for people."""
        sizes = f"takes {self.input_size} pixels, gives {self.output_size}, " if self.input_size else ""
        draws = "deterministic" if self.deterministic else "mean and deviation"
        scale = "one value" if len(self.std) == 1 else "a value a channel"
        if self.mean == (0.0,) and self.std == (1.0,):
            scale = "its own normalisation"
        measured = f", measured on {self.measured_on}" if self.measured_on else ""
        return f"{self.autoencoder}, {self.channels} channels, factor {self.factor}, {sizes}{draws}, {scale}{measured}"

    def differences(self, other: "LatentSpace") -> list[str]:
        """What another space has otherwise, as "NAME this -> that"; numbers count as equal up to rounding."""
        ours, theirs = vars(self), vars(other)
        free = ("measured_on", "mean", "std") if self.measured_on or other.measured_on else ("measured_on",)
        return [f"{name} {_brief(ours[name])} -> {_brief(theirs[name])}" for name in ours if name not in free
                and not _equal(ours[name], theirs[name])]  # fmt: skip


def _by_channel(values: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(math.isclose(a, b, rel_tol=1e-6) for a, b in zip(one, other, strict=True))
    return one == other


def _brief(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return f"{value[0]:g}" if len(value) == 1 else f"({value[0]:g}, ... {len(value)} values)"


def _from_shift_and_scale(vae: Any) -> Statistics:
    """Diffusers' convention for AutoencoderKL: per-channel values come first, `scaling_factor` multiplies either."""
    config = vae.config
    scale = Real(0, 1e6, positive=True).check(config.get("scaling_factor", 1.0), "scaling_factor")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return (float(config.get("shift_factor") or 0.0),), (1.0 / scale,)
    if mean is None or std is None:
        raise ValueError("it has one of latents_mean and latents_std; restore the other in its config.json")
    return _flat(mean), tuple(value / scale for value in _flat(std))


def _from_batch_norm(vae: Any) -> Statistics:
    """Flux2: running statistics of the grouped latents."""
    std = (vae.bn.running_var.double() + vae.config.batch_norm_eps).sqrt()
    return tuple(vae.bn.running_mean.double().tolist()), tuple(std.tolist())


def _own_normalization(vae: Any) -> Statistics:
    """`encode` and `decode` normalise themselves."""
    return (0.0,), (1.0,)


def _flat(values: Any) -> tuple[float, ...]:
    return tuple(torch.as_tensor(values, dtype=torch.float64).flatten().tolist())


def _halvings(*names: str) -> Callable[[Any], int]:
    """The factor of an encoder that halves a side between its blocks, which a field of the configuration lists."""
    return lambda config: 2 ** (len(next(config[name] for name in names if config.get(name))) - 1)


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A class of autoencoders.

    Attributes:
        factor: of its configuration, before grouping.
        output: attribute of what `encode` answers; "latent_dist" is a posterior, others a latent.
        statistics: mean and deviation of the latents of an instance.
        pixel_range: of images.
        in_channels: field of the configuration with the images' channels.
        channels: field with the latents' channels.
        sizes: fields with the side that it resizes to, and the one that it gives; empty where any is taken.
        group: field with the (height, width) by which latents are grouped into channels; empty for none.
        draws: whether `decode` draws noise, and takes a generator.
        tiles: whether `decode` works in tiles after `enable_tiling`.
        ranges: what its configuration may say, else it would ask for more memory than there is, or end in NaN.
    """

    factor: Callable[[Any], int]
    output: str = "latent_dist"
    statistics: Callable[[Any], Statistics] = _from_shift_and_scale
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    in_channels: str = "in_channels"
    channels: str = "latent_channels"
    sizes: tuple[str, str] | None = None
    group: str = ""
    draws: bool = False
    tiles: bool = True
    ranges: Table = field(default_factory=dict)


_CHANNELS: Table = dict.fromkeys(("in_channels", "out_channels", "latent_channels"), Whole(1, 4096))
_BLOCKS = Each(Whole(1, 16_384), 1, 16)
_COMMON: Table = {
    **_CHANNELS,
    "block_out_channels": _BLOCKS,
    "layers_per_block": Whole(1, 64),
    "norm_num_groups": Whole(1, 16_384),
    "scaling_factor": Real(0, 1e4, positive=True),
    "shift_factor": Maybe(Real(-1e4, 1e4)),
}
_TWO_SIDES: Table = {**_CHANNELS, **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), _BLOCKS),
                     "scaling_factor": Real(0, 1e4, positive=True)}  # fmt: skip

KINDS: dict[str, Kind] = {
    "AutoencoderKL": Kind(factor=_halvings("block_out_channels"), ranges=_COMMON),
    "AutoencoderRAE": Kind(
        factor=lambda config: config.patch_size,
        output="latent",
        statistics=_own_normalization,
        pixel_range=(0.0, 1.0),
        in_channels="num_channels",
        channels="encoder_hidden_size",
        sizes=("encoder_input_size", "image_size"),
        tiles=False,
        ranges={
            **dict.fromkeys(("encoder_hidden_size", "decoder_hidden_size", "decoder_intermediate_size"), Whole(1, 65_536)),
            **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), Whole(1, 256)),
            **dict.fromkeys(("encoder_patch_size", "patch_size"), Whole(1, 256)),
            "encoder_input_size": Whole(1, 4096),
            "image_size": Maybe(Whole(1, 4096)),
            "num_channels": Whole(3, 3),
        },
    ),
    "AutoencoderDC": Kind(factor=_halvings("encoder_block_out_channels"), output="latent", ranges=_TWO_SIDES),
    "AutoencoderKLFlux2": Kind(
        factor=_halvings("block_out_channels"), statistics=_from_batch_norm, group="patch_size", ranges=_COMMON
    ),
    "AutoencoderTiny": Kind(
        factor=_halvings("encoder_block_out_channels"), output="latents", ranges=_TWO_SIDES
    ),
    "AsymmetricAutoencoderKL": Kind(
        factor=_halvings("down_block_out_channels"), tiles=False,
        ranges={**_COMMON, **dict.fromkeys(("down_block_out_channels", "up_block_out_channels"), _BLOCKS)},
    ),
    "ConsistencyDecoderVAE": Kind(
        factor=_halvings("encoder_block_out_channels"), in_channels="encoder_in_channels", draws=True, tiles=False,
        ranges={"latent_channels": Whole(4, 4), "encoder_in_channels": Whole(3, 3),
                **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), _BLOCKS),
                "scaling_factor": Real(0, 1e4, positive=True)},
    ),
}  # fmt: skip


def kind_of_autoencoder(vae: Any) -> Kind:
    """What its class does.

    Raises:
        ValueError: it is none that models here work with; the message lists those.
    """
    return KINDS[check_class(type(vae).__name__)]


def check_class(name: Any) -> str:
    """The name of a class of autoencoders, or a refusal with the list of them."""
    if name not in KINDS:
        raise ValueError(f"{shown(name)} is no autoencoder that models here work with; use {', '.join(KINDS)}.")
    return str(name)


def group_sides(vae: Any) -> tuple[int, int]:
    """(height, width) of the squares of latent pixels that become channels; (1, 1) for none."""
    kind = kind_of_autoencoder(vae)
    if not kind.group:
        return 1, 1
    height, width = vae.config[kind.group]
    return int(height), int(width)


def latent_space(vae: Any) -> LatentSpace:
    """The description of an autoencoder, of its configuration and statistics.

    Raises:
        ValueError: it is none that models here work with, or its configuration contradicts itself.
    """
    kind, name, config = kind_of_autoencoder(vae), type(vae).__name__, vae.config
    height, width = group_sides(vae)
    if height != width:
        raise ValueError(f"{name} groups latents by {height} x {width}; models here take square groups.")
    if config.get("reshape_to_2d") is False:
        raise ValueError(f"{name} has reshape_to_2d=False, a list of tokens; models here take a grid: set it to True.")
    input_size, output_size = (None, None) if kind.sizes is None else _sides(vae, kind)
    try:
        mean, std = kind.statistics(vae)
        return LatentSpace(
            autoencoder=name,
            channels=config[kind.channels] * height * width,
            factor=kind.factor(config) * height,
            image_channels=config[kind.in_channels],
            pixel_range=kind.pixel_range,
            deterministic=kind.output != "latent_dist",
            input_size=input_size,
            output_size=output_size,
            mean=mean,
            std=std,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {first_line(error)}") from error


def _sides(vae: Any, kind: Kind) -> tuple[int, int]:
    assert kind.sizes is not None
    taken, given = (vae.config[name] for name in kind.sizes)
    # Where the configuration leaves it out, the class derives it.
    return int(taken), int(given or vae.decoder_image_size)


def space_of(stored: Mapping[str, Any]) -> LatentSpace:
    """A description as `dataclasses.asdict` and JSON keep it.

    Raises:
        ValueError: it is none.
    """
    try:
        return LatentSpace(**stored)
    except TypeError as error:
        raise ValueError(f"{shown(stored)} describes no latents ({first_line(error)})") from error


def open_vae(name: str, dtype: torch.dtype | None = None) -> Any:
    """An autoencoder, of the class that its folder names, in eval mode.

    Args:
        name: Hub id, its folder, or a pipeline's folder that has it in `vae/`.
        dtype: of its weights; None for float32.

    Raises:
        ValueError: it is neither a local folder nor reachable, of another class, or lacks weights.
    """
    name = checks.text(name, "vae")
    place: dict[str, Any] = {"subfolder": "vae"} if (Path(name) / "vae" / "config.json").is_file() else {}
    try:
        config = _stored_config(name, place)
    except LOADING_ERRORS as error:
        if Path(name).exists():
            raise ValueError(
                f"{name}: its VAE does not load ({first_line(error)}); restore it, or name another."
            ) from error
        raise ValueError(
            f"{name}: neither a VAE folder nor reachable on the Hub ({first_line(error)}). Fetch it where there is a "
            f"network (hf download {name}) and pass its folder."
        ) from error
    if config.get("_class_name") not in KINDS:
        raise ValueError(f"{name} is {kind_of(config)}, no autoencoder that models here work with: {', '.join(KINDS)}.")
    try:
        return load_strictly(
            config["_class_name"], name, config, **place, **({} if dtype is None else {"dtype": dtype})
        )
    except LOADING_ERRORS as error:
        reason = first_line(error).removeprefix(f"{name}: ")
        raise ValueError(f"{name}: its VAE does not load ({reason}); fetch it again, or name another.") from error


def _stored_config(name: str, place: Mapping[str, Any]) -> dict[str, Any]:
    folder = Path(name) / place.get("subfolder", "")
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"it holds {held_in(folder)}, no config.json")
        return read_object(folder / "config.json")
    from diffusers import AutoencoderKL

    return dict(AutoencoderKL.load_config(name, **place))


def load_strictly(kind: str, name: Any, config: Mapping[str, Any], **options: Any) -> Any:
    """Diffusers' `from_pretrained` of a class of `KINDS`, in eval mode; weights that are missing or left over are errors.

    Args:
        kind: the class.
        name: folder or Hub id.
        config: what its config.json says.
        options: of `from_pretrained`.

    Raises:
        ValueError: the configuration is out of range, or configuration and weights differ.
    """
    import diffusers

    take(kind, config, KINDS[kind].ranges)
    vae, information = getattr(diffusers, kind).from_pretrained(name, output_loading_info=True, **options)
    for what, keys in (("lacks", information["missing_keys"]), ("has left over", information["unexpected_keys"])):
        if keys:
            first = sorted(keys)[0]
            raise ValueError(f"{name}: its {kind} {what} {len(keys)} weights, such as {first}; restore that folder")
    latent_space(vae)
    return vae.eval()
