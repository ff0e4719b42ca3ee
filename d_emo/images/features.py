"""What a vision model says of every image of a folder of latents, kept in the folder `features` in it.

That folder is one of latents itself: files, checks and reading are theirs (`latent_cache`). Shapes: T channels, h x w
places of an image; a file has (n, flips, 1, T, h, w) in float16.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from d_emo.common.ranges import Table
from d_emo.images.autoencoders import RANGES, LatentSpace
from d_emo.images.latent_cache import LatentCache
from d_emo.images.latent_manifest import (
    FEATURES,
    CacheManifest,
    LatentCacheError,
    read_cache_manifest,
    shard_folder,
)

DTYPE = "float16"


@dataclass(frozen=True, kw_only=True)
class FeatureSpace(LatentSpace):
    """Features as a space of latents, which nothing decodes. Whose they are, the manifest's digest says."""

    ranges: ClassVar[Table] = {name: rule for name, rule in RANGES.items() if name != "autoencoder"}


def features_manifest(latents: CacheManifest, name: str, digest: str, shape: tuple[int, int, int]) -> CacheManifest:
    """The manifest of the features that belong to latents, in files of about the size of theirs.

    Args:
        latents: those of the same images.
        name: of the vision model.
        digest: of its weights.
        shape: (h, w, T) of its features.

    Raises:
        ValueError: h and w differ.
    """
    rows, columns, channels = shape
    if rows != columns:
        raise ValueError(f"its features lie in {rows} x {columns} places; latents can have square ones beside them")
    space = FeatureSpace(autoencoder=FEATURES, channels=channels, factor=1, deterministic=True)
    found = replace(
        latents,
        resolution=rows,
        shape=(channels, rows, columns),
        dtype=DTYPE,
        vae=name,
        vae_digest=digest,
        latent_space=space,
    )
    return replace(found, shard_size=max(1, latents.shard_size * latents.image_bytes // found.image_bytes))


def are_unfinished(latents: Path) -> bool:
    """Whether a folder of latents has features that were begun and are not all there."""
    folder = latents / FEATURES
    if not folder.exists():
        return False
    try:
        return bool(shard_folder(folder, read_cache_manifest(folder, FeatureSpace)).missing())
    except LatentCacheError:
        return True


class StoredTeacher:
    """A vision model whose features of all images lie beside their latents, as `encode_latents --align` put them there.

    Args:
        name: of the model, or the folder that it is in.
        latents: of the same images.

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
        with self._remedy():
            self._cache = LatentCache(self.folder, FeatureSpace)
        found, own = self._cache.manifest, latents.manifest
        if not _same_model(found.vae, name):
            raise ValueError(f"--align {name}: {self.folder} holds features of {found.vae}; name that.")
        same = (found.fingerprint, found.count, found.flips) == (own.fingerprint, own.count, own.flips)
        if not same or self._cache.replaced != latents.replaced:
            raise ValueError(f"--align {name}: {self.folder} holds features of other images; remove it, then {add}.")
        channels, rows, columns = found.shape
        self.shape, self.digest = (rows, columns, channels), found.vae_digest

    @property
    def manifest(self) -> CacheManifest:
        """Of the features."""
        return self._cache.manifest

    def read(self, index: int, flipped: bool) -> torch.Tensor:
        """The features (T, h, w) of an image or its mirror image, float16.

        Raises:
            LatentCacheError: see `LatentCache.read`.
        """
        with self._remedy():
            return self._cache.stored(index, flipped)[0]

    def describe(self) -> str:
        """For people."""
        rows, columns, channels = self.shape
        return f"{self.name}, {channels:,} features of {rows} x {columns} places, from {self.folder}"

    @contextlib.contextmanager
    def _remedy(self) -> Iterator[None]:
        try:
            yield
        except LatentCacheError as error:
            raise LatentCacheError(f"{error} These are features: add --align {self.name} to its options.") from error


def _same_model(stored: str, named: str) -> bool:
    """Whether two names are of one model: the same words, or the same folder."""
    places = [Path(name) for name in (stored, named)]
    return stored == named or (all(place.is_dir() for place in places) and places[0].samefile(places[1]))
