"""What a vision model says of every image of a folder of latents, kept in the folder `features` in it.

That folder is one of latents itself: files, checks and reading are theirs (`latent_cache`). Shapes: T channels, h x w
places of an image; a file has (n, flips, 1, T, h, w) in float16.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from d_emo.common.ranges import Table
from d_emo.images.autoencoders import RANGES, LatentSpace
from d_emo.images.latent_cache import LatentCache
from d_emo.images.latent_manifest import CacheManifest

FEATURES, DTYPE = "features", "float16"


@dataclass(frozen=True, kw_only=True)
class FeatureSpace(LatentSpace):
    """A vision model's features as a space of latents, which nothing decodes; `autoencoder` is the model's name."""

    ranges: ClassVar[Table] = {name: rule for name, rule in RANGES.items() if name != "autoencoder"}


def features_manifest(
    latents: CacheManifest, name: str, digest: str, side: int, shape: tuple[int, int, int]
) -> CacheManifest:
    """The manifest of the features that belong to latents.

    Args:
        latents: those of the same images.
        name, digest: of the vision model, and of its weights.
        side: of the images that it sees, in pixels.
        shape: (h, w, T) of its features.

    Raises:
        ValueError: they are no square grid of patches.
    """
    rows, columns, channels = shape
    if rows != columns or side % rows:
        raise ValueError(f"its features of {rows} x {columns} places are no grid of patches of {side} pixels")
    space = FeatureSpace(autoencoder=name, channels=channels, factor=side // rows, deterministic=True)
    return replace(
        latents,
        resolution=side,
        shape=(channels, rows, columns),
        dtype=DTYPE,
        vae=name,
        vae_digest=digest,
        latent_space=space,
    )


class StoredTeacher:
    """A vision model whose features of all images lie beside their latents, as `encode_latents --align` put them there.

    Args:
        name: as it was named there.
        latents: the folder.

    Attributes:
        shape: (h, w, T) of its features.
        digest: of its weights.

    Raises:
        ValueError: there are no features, or another model's, or of other images.
        LatentCacheError: they are incomplete or damaged.
    """

    def __init__(self, name: str, latents: LatentCache):
        self.name, self.folder = name, latents.folder / FEATURES
        add = f"train/encode_latents.py with the options of {latents.folder} and --align {name} adds them"
        if not self.folder.is_dir():
            raise ValueError(f"--align {name}: there are no features in {latents.folder}; {add}.")
        self._cache = LatentCache(self.folder, FeatureSpace)
        found, own = self._cache.manifest, latents.manifest
        if found.vae != name:
            raise ValueError(f"--align {name}: {self.folder} holds features of {found.vae}; name that.")
        if (found.fingerprint, found.count, found.flips) != (own.fingerprint, own.count, own.flips):
            raise ValueError(f"--align {name}: {self.folder} holds features of other images; remove it, then {add}.")
        channels, rows, columns = found.shape
        self.shape, self.digest = (rows, columns, channels), found.vae_digest

    def read(self, index: int, flipped: bool) -> torch.Tensor:
        """The features (h, w, T) of an image or its mirror image, float32.

        Raises:
            LatentCacheError: see `LatentCache.read`.
        """
        return self._cache.read(index, flipped)[0].permute(1, 2, 0)

    def describe(self) -> str:
        """For people."""
        rows, columns, channels = self.shape
        return f"{self.name}, {channels:,} features of {rows} x {columns} places, from {self.folder}"
