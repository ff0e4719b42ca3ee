"""Mean and deviation a channel of a data set's latents, measured, for autoencoders that have none that fit.

A model is trained on z = (latent - mean) / std. A latent is drawn from its image's posterior, whose mean is m and whose
deviation is s; so over all images, mirror images and pixels of a channel, exactly,

    E[latent] = E[m],    Var[latent] = Var[m] + E[s^2],

where s = 0 for deterministic autoencoders (law of total variance). Sums are float64, a block at a time, centred, and
merged as in Chan, Golub and LeVeque, "Updating formulae" (1979); in the order of the files, so that the same files give
the same bits on any number of processes.
"""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import reduce
from pathlib import Path

import numpy as np

from d_emo.common.files import content_digest, write_json
from d_emo.common.messages import first_line, shown
from d_emo.common.ranges import OneOf, Table, Whole
from d_emo.images.autoencoders import LatentSpace, space_of
from d_emo.images.latent_manifest import AGAIN, CacheManifest, LatentCacheError, read_table

STATISTICS = "statistics.json"
DIGEST = "sha256"
NUMBERS: Table = {"images": Whole(1), "views": OneOf((1, 2))}
# A deviation of less than this share of the mean is the rounding of a constant.
CONSTANT = 1e-6


@dataclass(frozen=True)
class Moments:
    """Of values of each channel.

    Attributes:
        count: of them.
        mean: (C,) float64.
        squares: (C,) float64, sum of their squared distances from the mean.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray

    def merged(self, other: "Moments") -> "Moments":
        """Of the values of both."""
        count, apart = self.count + other.count, other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + apart * (other.count / count),
            squares=self.squares + other.squares + apart**2 * (self.count * other.count / count),
        )


def moments_of(blocks: Iterable[np.ndarray]) -> Moments:
    """Moments of latents that are drawn from posteriors, blocks (n, flips, M, C, h, w)."""
    return merged(map(_moments, blocks))


def merged(parts: Iterable[Moments]) -> Moments:
    """Of the values of all, in this order."""
    return reduce(Moments.merged, parts)


def _moments(block: np.ndarray) -> Moments:
    middle = block[:, :, 0].astype(np.float64)  # (n, flips, C, h, w)
    count, others = middle.size // middle.shape[2], (0, 1, 3, 4)
    mean = middle.mean(axis=others)
    squares = np.square(middle - mean[:, None, None]).sum(axis=others)
    if block.shape[2] == 2:
        squares += np.square(block[:, :, 1], dtype=np.float64).sum(axis=others)
    return Moments(count, mean, squares)


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """What was measured, and on what.

    Attributes:
        latent_space: the autoencoder's, with the mean and deviation that were measured.
        vae_digest: hash of its weights.
        fingerprint: of the data set.
        images: of it.
        views: 2 with mirror images, else 1.

    Raises:
        ValueError: a value that no data set has.
    """

    latent_space: LatentSpace
    vae_digest: str
    fingerprint: str
    images: int
    views: int

    def __post_init__(self):
        for name, rule in NUMBERS.items():
            rule.check(getattr(self, name), name)
        for name in ("vae_digest", "fingerprint"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}={shown(getattr(self, name))} is no text.")
        if not self.latent_space.measured_on:
            raise ValueError("measured_on='' names no data set.")


def statistics_from(moments: Moments, manifest: CacheManifest) -> LatentStatistics:
    """What a folder's latents, all of them, amount to.

    Raises:
        ValueError: a channel is constant, or not finite, so that nothing normalises it.
    """
    deviation = np.sqrt(moments.squares / moments.count)
    usable = np.isfinite(deviation) & (deviation > CONSTANT * np.abs(moments.mean))
    if not usable.all():
        channel = int(np.flatnonzero(~usable)[0])
        raise ValueError(
            f"--statistics: channel {channel} of the latents of {manifest.source} by {manifest.vae} has mean "
            f"{moments.mean[channel]:g} and deviation {deviation[channel]:g}, and cannot be normalised; use another "
            "--vae, or leave --statistics out."
        )
    space = replace(
        manifest.latent_space,
        mean=tuple(moments.mean.tolist()),
        std=tuple(deviation.tolist()),
        measured_on=manifest.source,
    )
    return LatentStatistics(
        latent_space=space,
        vae_digest=manifest.vae_digest,
        fingerprint=manifest.fingerprint,
        images=manifest.count,
        views=manifest.flips,
    )


def describe_scale(space: LatentSpace) -> str:
    """Mean and deviation of latents, for people; of several channels their ranges."""
    ranges = []
    for values in (space.mean, space.std):
        ends = dict.fromkeys(f"{value:.4g}" for value in (min(values), max(values)))
        ranges.append(" to ".join(ends))
    return f"mean {ranges[0]}, deviation {ranges[1]}"


def write_statistics(folder: Path, statistics: LatentStatistics) -> None:
    """Put them into a folder, whole, with their SHA-256."""
    content = asdict(statistics)
    write_json(folder / STATISTICS, {**content, DIGEST: content_digest(content)})


def read_statistics(path: Path) -> LatentStatistics:
    """What a file of statistics says.

    Raises:
        LatentCacheError: it is damaged, or cannot be read.
    """
    content = read_table(path)
    digest = content.pop(DIGEST, None)
    try:
        found = LatentStatistics(**{**content, "latent_space": space_of(content.get("latent_space") or {})})
    except (ValueError, TypeError) as error:
        raise LatentCacheError(f"{path} is damaged ({first_line(error)}); {AGAIN}.") from error
    if digest != content_digest(content):
        raise LatentCacheError(f"{path} is damaged (it is not as it was written, by its SHA-256); {AGAIN}.")
    return found


def statistics_of(folder: Path, manifest: CacheManifest) -> LatentStatistics | None:
    """Those of a folder of latents; None where nothing was measured.

    Raises:
        LatentCacheError: they are damaged, or of other latents.
    """
    path = folder / STATISTICS
    if not os.path.lexists(path):
        return None
    found = read_statistics(path)
    same = (found.vae_digest, found.fingerprint, found.images, found.views) == (
        manifest.vae_digest, manifest.fingerprint, manifest.count, manifest.flips
    )  # fmt: skip
    if not same or manifest.other_latents(found.latent_space):
        raise LatentCacheError(f"{path} was measured on other latents than those beside it; {AGAIN}.")
    return found


def statistics_at(place: str) -> LatentStatistics:
    """Those that a user names.

    Args:
        place: a folder of latents, or the file.

    Raises:
        ValueError: there are none, or they are damaged.
    """
    path = Path(place) / STATISTICS if Path(place).is_dir() else Path(place)
    if not os.path.lexists(path):
        raise ValueError(
            f"{path}: there are no statistics; measure some: the command that made the latents, with --statistics true."
        )
    return read_statistics(path)


def same_scale(one: LatentSpace, other: LatentSpace) -> bool:
    """Whether two spaces are normalised alike, up to rounding."""
    return all(
        len(ours) == len(theirs) and np.allclose(ours, theirs, rtol=1e-6, atol=0)
        for ours, theirs in ((one.mean, other.mean), (one.std, other.std))
    )
