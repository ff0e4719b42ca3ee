"""Every option of `train/encode_latents.py`, once."""

from dataclasses import dataclass, field

from d_emo.common.options import OptionTable, option, parse_options, positive, require
from d_emo.train.data.options import DataOptions
from d_emo.train.diffusion.config import AUTO_VAE

# Types that latents are stored in; those of `d_emo.images.latent_manifest`, which imports PyTorch.
DTYPES = ("float32", "float16")


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What is encoded, with what, and where to."""

    output_dir: str | None = option(None, "Folder of latents to write.")
    resolution: int | None = option(
        None, "Image side in pixels. Default: 256 for folders, for others as the trainer's."
    )
    vae: str = option(
        AUTO_VAE, "Folder or Hub id of one of Diffusers' autoencoders of images (docs/autoencoders.md lists them)."
    )
    batch_size: int = option(16, "Images encoded at once by a process, mirror images aside.")
    shard_size: int = option(1024, "Images a file.")
    dtype: str = option("float32", "Type on disk: float32, or float16 for half the space.")
    statistics: bool = option(
        False,
        "Measure mean and deviation a channel of all latents, for autoencoders without their own; training normalises "
        "by them. On a finished folder nothing is encoded anew.",
    )
    align: str | None = option(
        None,
        "Keep this vision model's features of every image, too, for the trainer's --align: a folder or Hub id of "
        "transformers, a packaged model, or timm:NAME. On a finished folder only these are added.",
    )
    dry_run: bool = option(False, "Print what would be encoded, its size and memory, and stop.")

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("--output-dir is missing; name the folder of latents to write.")
        positive(self, "batch_size", "shard_size", "resolution")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"use one of {', '.join(DTYPES)}")


@dataclass(frozen=True, kw_only=True)
class EncodeConfig(OptionTable):
    """The command's options."""

    data: DataOptions = field(default_factory=DataOptions)
    encoding: EncodeOptions = field(default_factory=EncodeOptions)


def parse_encode_config(arguments: list[str], about: str = "Encode a data set with a VAE.") -> EncodeConfig:
    """Read the command line and, under it, the YAML file that --config names; see `parse_options`."""
    return parse_options(arguments, EncodeConfig, "encode_latents", about)
