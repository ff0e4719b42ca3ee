"""Which latents a run is trained on, and which mean and deviation normalise them.

In this order: what --latent-statistics names, what the weights of --init-from were trained with, what was measured on
the folder of --latents, what the pipeline carries that --vae names, the autoencoder's own.
"""

from pathlib import Path
from typing import Any

from d_emo.common.digests import weights_digest
from d_emo.common.files import content_digest
from d_emo.common.saved_folders import read_object
from d_emo.images.autoencoders import LatentSpace, latent_space, space_of
from d_emo.images.latent_manifest import CacheManifest
from d_emo.images.latent_statistics import describe_scale, same_scale, statistics_at
from d_emo.images.source import ImageSource
from d_emo.train.diffusion.config import TrainConfig
from d_emo.train.diffusion.init_from import InitialWeights

# In place of a folder of statistics: the autoencoder's own.
OWN = "none"


# A space with its mean and deviation, and where these come from, for people; that is empty for an autoencoder's own.
ChosenSpace = tuple[LatentSpace, str]


def choose_space(
    config: TrainConfig, source: ImageSource, vae: Any, initial: InitialWeights | None
) -> ChosenSpace | tuple[None, str]:
    """The latents of `vae`, normalised as the options, the weights to start from and the data ask for.

    Returns:
        The space, None for pixels, and where its mean and deviation come from.

    Raises:
        ValueError: these contradict each other; the message names what differs.
    """
    named = config.model.latent_statistics
    if vae is None:
        if named not in (None, OWN):
            raise ValueError(f"--latent-statistics {named}: this run is on pixels; leave it out, or name a --vae.")
        return None, ""
    own = latent_space(vae)
    asked = _named(named, own, vae) if named is not None else None
    if initial is not None and initial.space is not None:
        return _as_trained(initial, initial.space, own, asked, config)
    if asked is not None:
        return _measured(asked, own, f"--latent-statistics {named}")
    if source.latents is not None and source.latents.statistics is not None:
        return _measured(source.latents.statistics.latent_space, own, f"--latents {config.data.latents}")
    carried = _carried(config.model.vae)
    return (own, "") if carried is None else _measured(carried, own, f"the pipeline --vae {config.model.vae}")


def _named(named: str, own: LatentSpace, vae: Any) -> LatentSpace:
    """What --latent-statistics names."""
    if named == OWN:
        return own
    try:
        found = statistics_at(named)
    except ValueError as error:
        raise ValueError(f"--latent-statistics {named}: {error}") from error
    if other := own.differences(found.latent_space):
        raise ValueError(
            f"--latent-statistics {named}: measured on other latents than --vae makes: {'; '.join(other)}."
        )
    if found.vae_digest != weights_digest(vae):
        raise ValueError(
            f"--latent-statistics {named}: measured with another {own.autoencoder} than --vae (weights "
            f"{found.vae_digest[:12]}); measure with this one."
        )
    return found.latent_space


def _as_trained(
    initial: InitialWeights, trained: LatentSpace, own: LatentSpace, asked: LatentSpace | None, config: TrainConfig
) -> ChosenSpace:
    """The latents that given weights were trained on."""
    if other := trained.differences(own):
        raise ValueError(
            f"--vae {config.model.vae}: --init-from {initial.name} was trained on other latents: {'; '.join(other)}; "
            "use its own: --vae auto."
        )
    measured = trained.measured_on or (asked is not None and asked.measured_on)
    if asked is not None and measured and not same_scale(asked, trained):
        raise ValueError(
            f"--latent-statistics {config.model.latent_statistics} ({describe_scale(asked)}): --init-from "
            f"{initial.name} was trained with {describe_scale(trained)}; leave it out."
        )
    return _measured(trained, own, f"--init-from {initial.name}")


def _measured(space: LatentSpace, own: LatentSpace, origin: str) -> ChosenSpace:
    if not space.measured_on:
        return space, ""
    return space, (
        f"{describe_scale(space)}, measured on {space.measured_on} ({origin}); the autoencoder's own: "
        f"{describe_scale(own)}"
    )


def _carried(vae: str) -> LatentSpace | None:
    """Measured statistics of the pipeline whose folder --vae names; None where it names none, or carries none."""
    index = Path(vae) / "model_index.json"
    stored = read_object(index).get("latent_space") if index.is_file() else None
    if stored is None:
        return None
    try:
        space = space_of(stored)
    except ValueError as error:
        raise ValueError(f"--vae {vae}: {index.name} is damaged ({error}).") from error
    return space if space.measured_on else None


def identity_of(space: LatentSpace) -> str:
    """A space in a line that another one does not have, beside the hash of the autoencoder's weights."""
    measured = f"statistics measured on {space.measured_on}, " if space.measured_on else ""
    return f"{space.autoencoder}, {measured}{content_digest({'mean': space.mean, 'std': space.std})[:12]}"


def resolution_of(asked: int | None, default: int, space: LatentSpace | None) -> int:
    """Side of images in pixels: as asked, else the only one that the autoencoder makes, else the data's default."""
    return asked or (space.output_size if space is not None else None) or default


def side_of(space: LatentSpace, resolution: int) -> int:
    """Side of the latents of images of a resolution.

    Raises:
        ValueError: the autoencoder makes no such images.
    """
    try:
        return space.side(resolution)
    except ValueError as error:
        raise ValueError(f"--resolution {resolution}: {error}") from error


def check_latents(config: TrainConfig, manifest: CacheManifest, vae: Any) -> None:
    """Refuse latents that do not fit the options.

    Raises:
        ValueError: another resolution, autoencoder, or no mirror images; the message gives the remedy.
    """
    if vae is not None and (other := manifest.other_latents(latent_space(vae))):
        raise ValueError(
            f"--vae {config.model.vae}: the latents were made by {manifest.vae}: {'; '.join(other)}; pass that one."
        )
    if config.model.resolution not in (None, manifest.resolution):
        raise ValueError(
            f"--resolution {config.model.resolution}: the latents are of {manifest.resolution} x {manifest.resolution} "
            "images; leave it out, or encode again."
        )
    if weights_digest(vae) != manifest.vae_digest:
        raise ValueError(
            f"--vae {config.model.vae}: the latents were made by another VAE ({manifest.vae}, weights "
            f"{manifest.vae_digest[:12]}); pass that one."
        )
    if config.data.random_flip and manifest.flips < 2:
        raise ValueError("--random-flip true: the latents hold no mirror images; encode again with --random-flip true.")
