"""The classes of autoencoders that models here work with, and what each does otherwise than the others.

AutoencoderRAE works in [0, 1] and takes pictures of another size than it gives, AutoencoderKLFlux2 keeps its statistics
in a BatchNorm and groups latents by 2 x 2, ConsistencyDecoderVAE draws noise to decode, some have a posterior and some
a latent. `KINDS` has a line a class; `autoencoders` reads it.

Sources: the classes of Diffusers 0.42 and the pipelines there that use them (statistics by channel as in
StableDiffusionXLPipeline, BatchNorm as in Flux2Pipeline); RAE arXiv 2510.11690, DC-AE 2410.10733, asymmetric VQGAN
2306.04632.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from d_emo.common.ranges import Each, Maybe, Real, Table, Whole

# Mean and standard deviation of latents, one value or one a channel.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A class of autoencoders.

    Attributes:
        factor: of a configuration: pixels per pixel of a latent, along a side and before grouping.
        ranges: what its configuration may say, else it would ask for more memory than there is, or end in NaN.
        output: attribute of what `encode` answers; "latent_dist" is a posterior, others a latent.
        statistics: mean and deviation of the latents of an instance.
        pixel_range: of images.
        in_channels: field of the configuration with the images' channels.
        channels: field with the latents' channels, before grouping.
        sizes: fields with the side that it resizes to, and the one that it gives; None where any is taken.
        group: field with the (height, width) by which latents are grouped into channels; empty for none.
        draws: whether `decode` draws noise, and takes a generator.
        slices: whether `decode` works picture by picture where that is switched on.
        tiles: whether an instance's `decode` gives the right picture in tiles, where that is switched on.
    """

    factor: Callable[[Any], int]
    ranges: Table
    output: str = "latent_dist"
    statistics: Callable[[Any], Statistics]
    pixel_range: tuple[float, float] = (-1.0, 1.0)
    in_channels: str = "in_channels"
    channels: str = "latent_channels"
    sizes: tuple[str, str] | None = None
    group: str = ""
    draws: bool = False
    slices: bool = True
    tiles: Callable[[Any], bool] = lambda _: False


def _from_configuration(vae: Any) -> Statistics:
    """Diffusers' convention: values by channel come before `shift_factor`; `scaling_factor` multiplies in either."""
    config = vae.config
    scale = config.get("scaling_factor", 1.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return (float(config.get("shift_factor") or 0.0),), (1.0 / scale,)
    if mean is None or std is None:
        raise ValueError("it has one of latents_mean and latents_std; restore the other in its config.json")
    return tuple(map(float, mean)), tuple(value / scale for value in std)


def _from_batch_norm(vae: Any) -> Statistics:
    """Running statistics of the grouped latents."""
    std = (vae.bn.running_var.double() + vae.config.batch_norm_eps).sqrt()
    return tuple(vae.bn.running_mean.double().tolist()), tuple(std.tolist())


def _applied_by_itself(_: Any) -> Statistics:
    """`encode` and `decode` normalise."""
    return (0.0,), (1.0,)


def _halvings(*names: str) -> Callable[[Any], int]:
    """The factor where a side is halved between blocks, whose channels these fields of a configuration list."""

    def factor(config: Any) -> int:
        levels = {name: len(config[name]) for name in names if config.get(name)}
        if len({*levels.values()}) > 1:
            listed = " and ".join(f"{count} {name}" for name, count in levels.items())
            raise ValueError(f"it has {listed}; restore its config.json")
        return 2 ** (next(iter(levels.values())) - 1)

    return factor


def _tiles_of_kl(vae: Any) -> bool:
    """Whether what is kept of a decoded tile is as long as the way to the next; `sample_size` decides it."""
    tile, overlap = vae.tile_sample_min_size, vae.tile_overlap_factor
    if not isinstance(tile, int):
        return False
    way = int(vae.tile_latent_min_size * (1 - overlap)) * _halvings("block_out_channels")(vae.config)
    return way == tile - int(tile * overlap)


def _tiles_of_dc(vae: Any) -> bool:
    """Whether tiles and the ways between them are whole pixels of a latent."""
    sides = (vae.tile_sample_min_height, vae.tile_sample_min_width,
             vae.tile_sample_stride_height, vae.tile_sample_stride_width)  # fmt: skip
    return not any(side % vae.spatial_compression_ratio for side in sides)


def _tiles_of_tiny(vae: Any) -> bool:
    """Whether it is of the factor and channels that the class takes for granted in its tiles."""
    return vae.config.out_channels == 3 and vae.spatial_scale_factor == 2 ** (len(vae.config.block_out_channels) - 1)


_BLOCKS = Each(Whole(1, 16_384), 1, 16)
_CHANNELS: Table = dict.fromkeys(("in_channels", "out_channels", "latent_channels"), Whole(1, 4096))
_SCALE: Table = {"scaling_factor": Real(0, 1e4, positive=True), "shift_factor": Maybe(Real(-1e4, 1e4))}
_KL: Table = {
    **_CHANNELS,
    **_SCALE,
    "block_out_channels": _BLOCKS,
    "layers_per_block": Whole(1, 64),
    "norm_num_groups": Whole(1, 16_384),
}
_TWO_SIDES: Table = {
    **_SCALE,
    **dict.fromkeys(("encoder_block_out_channels", "decoder_block_out_channels"), _BLOCKS),
}
_RAE: Table = {
    **dict.fromkeys(("encoder_hidden_size", "decoder_hidden_size", "decoder_intermediate_size"), Whole(1, 65_536)),
    **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), Whole(1, 256)),
    **dict.fromkeys(("encoder_patch_size", "patch_size"), Whole(1, 256)),
    "encoder_input_size": Whole(1, 4096),
    "image_size": Maybe(Whole(1, 4096)),
    "num_channels": Whole(3, 3),
    "scaling_factor": Real(0, 1e4, positive=True),
}

KINDS: dict[str, Kind] = {
    "AutoencoderKL": Kind(
        factor=_halvings("block_out_channels"),
        statistics=_from_configuration,
        tiles=_tiles_of_kl,
        ranges={**_KL, "latents_mean": Maybe(Each(Real(), 1, 4096)),
                "latents_std": Maybe(Each(Real(0, positive=True), 1, 4096))},
    ),
    "AutoencoderRAE": Kind(
        factor=lambda config: config.patch_size,
        output="latent",
        statistics=_applied_by_itself,
        pixel_range=(0.0, 1.0),
        in_channels="num_channels",
        channels="encoder_hidden_size",
        sizes=("encoder_input_size", "image_size"),
        ranges=_RAE,
    ),
    "AutoencoderDC": Kind(
        factor=_halvings("encoder_block_out_channels", "decoder_block_out_channels"),
        output="latent",
        statistics=_from_configuration,
        tiles=_tiles_of_dc,
        ranges={**_CHANNELS, **_TWO_SIDES},
    ),
    "AutoencoderKLFlux2": Kind(
        factor=_halvings("block_out_channels", "decoder_block_out_channels"),
        statistics=_from_batch_norm,
        group="patch_size",
        tiles=_tiles_of_kl,
        ranges={**_KL, "decoder_block_out_channels": Maybe(_BLOCKS), "patch_size": Each(Whole(1, 16), 2, 2),
                "batch_norm_eps": Real(0, 1, positive=True)},
    ),
    "AutoencoderTiny": Kind(
        factor=_halvings("encoder_block_out_channels", "decoder_block_out_channels"),
        output="latents",
        statistics=_from_configuration,
        tiles=_tiles_of_tiny,
        ranges={**_CHANNELS, **_TWO_SIDES, "upsampling_scaling_factor": Whole(2, 2)},
    ),
    "AsymmetricAutoencoderKL": Kind(
        factor=_halvings("down_block_out_channels", "up_block_out_channels"),
        statistics=_from_configuration,
        slices=False,
        ranges={**_KL, **dict.fromkeys(("down_block_out_channels", "up_block_out_channels"), _BLOCKS)},
    ),
    "ConsistencyDecoderVAE": Kind(
        factor=_halvings("encoder_block_out_channels"),
        statistics=_from_configuration,
        in_channels="encoder_in_channels",
        draws=True,
        slices=False,
        ranges={**_TWO_SIDES, "latent_channels": Whole(4, 4), "encoder_in_channels": Whole(3, 3)},
    ),
}  # fmt: skip
