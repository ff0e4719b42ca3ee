"""A data set's latents on disk: the VAE's mean and standard deviation of every image and its mirror image.

A folder holds `manifest.json` (what was encoded, with which VAE), `labels.npy`, and `latents-FIRST.npy` files of
`shard_size` images each: (n, flips, 2, C, h, w), mean and standard deviation, as the VAE gives them, neither scaled
nor shifted. Files appear whole or not at all and are mapped into memory, so that reading an image costs its bytes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d_emo.common.files import write_json, written_whole

MANIFEST, LABELS, REPLACED_PATTERN = "manifest.json", "labels.npy", "replaced-*.json"
DTYPES = ("float32", "float16")


class LatentCacheError(ValueError):
    """A folder of latents that is incomplete, damaged, or of other data; the message says which."""


@dataclass(frozen=True, kw_only=True)
class CacheManifest:
    """What a folder of latents holds.

    Attributes:
        source: name of the data set.
        fingerprint: of its number, labels and class names.
        count: images.
        id2label: class names by id, as JSON keeps them.
        resolution: side of the images in pixels.
        shape: (C, h, w) of a latent.
        flips: 2 with mirror images, else 1.
        dtype: float32 or float16.
        vae: what the user named; vae_digest: hash of its weights.
        scaling_factor, shift_factor: of the VAE's configuration.
        shard_size: images a file.
    """

    source: str
    fingerprint: str
    count: int
    id2label: dict[str, str]
    resolution: int
    shape: tuple[int, int, int]
    flips: int
    dtype: str
    vae: str
    vae_digest: str
    scaling_factor: float
    shift_factor: float
    shard_size: int

    def shards(self) -> list[range]:
        """Images of each file."""
        return [
            range(start, min(start + self.shard_size, self.count)) for start in range(0, self.count, self.shard_size)
        ]

    def file_shape(self, shard: range) -> tuple[int, ...]:
        """Shape of a file's array."""
        return (len(shard), self.flips, 2, *self.shape)


def shard_path(folder: Path, shard: range) -> Path:
    """File of a shard, named by its first image."""
    return folder / f"latents-{shard.start:09d}.npy"


def write_shard(folder: Path, shard: range, moments: np.ndarray, replaced: dict[int, int]) -> None:
    """Write (n, flips, 2, C, h, w), whole; `replaced` has the unreadable images and those that stand for them."""
    if replaced:
        write_json(folder / f"replaced-{shard.start:09d}.json", {str(index): used for index, used in replaced.items()})
    with written_whole(shard_path(folder, shard)) as partial, partial.open("wb") as file:
        np.save(file, moments)


def claim_folder(folder: Path, manifest: CacheManifest, labels: np.ndarray) -> None:
    """Start a folder of latents, or check that one that was begun holds the same.

    Raises:
        LatentCacheError: it holds something else; the message says what differs.
    """
    path = folder / MANIFEST
    if path.is_file():
        stored, wanted = read_manifest(folder), manifest
        changed = [
            f"{name} {getattr(stored, name)!r} -> {value!r}"
            for name, value in asdict(wanted).items()
            if getattr(stored, name) != value and name not in ("vae", "source")
        ]
        if changed:
            raise LatentCacheError(f"{folder} holds other latents: {'; '.join(changed)}. Choose another folder.")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise LatentCacheError(f"{folder} is not empty and holds no latents; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / LABELS) as partial, partial.open("wb") as file:
        np.save(file, labels)
    write_json(path, asdict(manifest))


def read_manifest(folder: Path) -> CacheManifest:
    """What a folder holds.

    Raises:
        LatentCacheError: there is no manifest, or it is damaged.
    """
    try:
        content: Mapping[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return CacheManifest(**{**content, "shape": tuple(content["shape"])})
    except FileNotFoundError:
        raise LatentCacheError(
            f"{folder}: there are no latents (no {MANIFEST}); write some with train/encode_latents.py."
        ) from None
    except (ValueError, TypeError, KeyError) as error:
        raise LatentCacheError(
            f"{folder / MANIFEST} is damaged ({error}); encode again into another folder."
        ) from error


class LatentCache:
    """Reads a complete folder of latents by index.

    Attributes:
        manifest: what it holds.
        labels: (count,) class ids.

    Raises:
        LatentCacheError: a file is missing or cut short; the message counts and names.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.labels = np.load(folder / LABELS, allow_pickle=False)
        if len(self.labels) != self.manifest.count:
            raise LatentCacheError(f"{folder / LABELS} holds {len(self.labels)} labels of {self.manifest.count}.")
        shards = self.manifest.shards()
        missing = [shard for shard in shards if not shard_path(folder, shard).is_file()]
        if missing:
            raise LatentCacheError(
                f"{folder}: {sum(map(len, missing)):,} of {self.manifest.count:,} images are not encoded yet "
                f"(first missing file {shard_path(folder, missing[0]).name}); run train/encode_latents.py again."
            )
        self._maps = [self._open(shard) for shard in shards]
        for path in sorted(folder.glob(REPLACED_PATTERN)):
            for index, used in json.loads(path.read_text(encoding="utf-8")).items():
                self.labels[int(index)] = self.labels[used]

    def _open(self, shard: range) -> np.ndarray:
        path = shard_path(self.folder, shard)
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise LatentCacheError(f"{path} is damaged ({error}); delete it and encode again.") from error
        expected = self.manifest.file_shape(shard)
        if mapped.shape != expected or mapped.dtype != np.dtype(self.manifest.dtype):
            raise LatentCacheError(
                f"{path} holds {mapped.dtype} {mapped.shape}, not {self.manifest.dtype} {expected}; delete it and "
                "encode again."
            )
        return mapped

    def read(self, index: int, flipped: bool) -> torch.Tensor:
        """Mean and standard deviation of an image or its mirror image, (2, C, h, w) float32."""
        shard, row = divmod(index, self.manifest.shard_size)
        return torch.from_numpy(np.array(self._maps[shard][row, int(flipped)], dtype=np.float32))
