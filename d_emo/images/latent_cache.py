"""A data set's latents on disk: the VAE's mean and standard deviation of every image and its mirror image.

A folder holds `manifest.json` (what was encoded, with which VAE), `labels.npy`, and `latents-FIRST.npy` files of
`shard_size` images each: (n, flips, 2, C, h, w), mean and standard deviation, as the VAE gives them, neither scaled
nor shifted. Files appear whole or not at all and are mapped into memory, so that reading an image costs its bytes.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from d_emo.common.files import write_json, written_whole
from d_emo.common.messages import first_line
from d_emo.common.shards import MANIFEST, ShardFolder, differences, read_manifest, write_manifest
from d_emo.images.decode import DECODE_VERSION
from d_emo.images.source import ImageSource, no_image

LABELS, REPLACED_PATTERN = "labels.npy", "replaced-*.json"
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
        decode_version: of the rule by which the pictures were read, `d_emo.images.decode.DECODE_VERSION`.
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
    decode_version: int = DECODE_VERSION

    def file_shape(self, shard: range) -> tuple[int, ...]:
        """Shape of a file's array."""
        return (len(shard), self.flips, 2, *self.shape)


def shard_folder(folder: Path, manifest: CacheManifest) -> ShardFolder:
    """The files of a folder of latents."""
    return ShardFolder(folder, "latents-{:09d}.npy", manifest.count, manifest.shard_size)


def write_latents(path: Path, moments: np.ndarray, replaced: dict[int, int]) -> None:
    """Write a file of (n, flips, 2, C, h, w), whole; `replaced` has unreadable images and those that stand for them."""
    if replaced:
        beside = path.with_name(path.name.replace("latents-", "replaced-")).with_suffix(".json")
        write_json(beside, {str(index): used for index, used in replaced.items()})
    with written_whole(path) as partial, partial.open("wb") as file:
        np.save(file, moments)


def claim_latents(folder: Path, manifest: CacheManifest, labels: np.ndarray) -> None:
    """Start a folder of latents, or check that one that was begun holds the same.

    Raises:
        LatentCacheError: it holds something else; the message says what differs.
    """
    if (folder / MANIFEST).is_file():
        changed = differences(asdict(read_cache_manifest(folder)), asdict(manifest), free=("vae", "source"))
        if changed:
            raise LatentCacheError(f"{folder} holds other latents: {'; '.join(changed)}. Choose another folder.")
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise LatentCacheError(f"{folder} is not empty and holds no latents; choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / LABELS) as partial, partial.open("wb") as file:
        np.save(file, labels)
    write_manifest(folder, asdict(manifest))


def read_cache_manifest(folder: Path) -> CacheManifest:
    """What a folder holds.

    Raises:
        LatentCacheError: there is no manifest, or it is damaged.
    """
    remedy = "encode again into another folder"
    try:
        content = read_manifest(folder, remedy)
    except ValueError as error:
        raise LatentCacheError(str(error)) from error
    if content is None:
        raise LatentCacheError(
            f"{folder}: there are no latents (no {MANIFEST}); write some with train/encode_latents.py."
        )
    try:
        content = {"decode_version": 1, **content}  # older folders do not say it
        manifest = CacheManifest(**{**content, "shape": tuple(content["shape"])})
    except (ValueError, TypeError, KeyError) as error:
        raise LatentCacheError(f"{folder / MANIFEST} is damaged ({error}); {remedy}.") from error
    if manifest.decode_version != DECODE_VERSION:
        raise LatentCacheError(
            f"{folder}: its pictures were read by rule {manifest.decode_version}, now there is rule {DECODE_VERSION} "
            f"(orientation, 16 bits, transparency). Encode {manifest.source} again: python train/encode_latents.py "
            f"--vae {manifest.vae} --resolution {manifest.resolution} --output-dir {folder}-{DECODE_VERSION}, and the "
            "options that name it."
        )
    return manifest


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
        self.manifest = read_cache_manifest(folder)
        try:
            self.labels = np.load(folder / LABELS, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise LatentCacheError(
                f"{folder / LABELS} is damaged ({first_line(error)}); encode again into another folder."
            ) from error
        if len(self.labels) != self.manifest.count:
            raise LatentCacheError(f"{folder / LABELS} holds {len(self.labels)} labels of {self.manifest.count}.")
        self.files = shard_folder(folder, self.manifest)
        missing = self.files.missing()
        if missing:
            raise LatentCacheError(
                f"{folder}: {sum(map(len, missing)):,} of {self.manifest.count:,} images are not encoded yet "
                f"(first missing file {self.files.path(missing[0]).name}); run train/encode_latents.py again."
            )
        self._maps = [self._open(shard) for shard in self.files.ranges]
        for path in sorted(folder.glob(REPLACED_PATTERN)):
            try:
                for index, used in json.loads(path.read_text(encoding="utf-8")).items():
                    self.labels[int(index)] = self.labels[used]
            except (ValueError, AttributeError, IndexError, TypeError) as error:
                raise LatentCacheError(
                    f"{path} is damaged ({first_line(error)}); delete the file of latents beside it and encode again."
                ) from error

    def _open(self, shard: range) -> np.ndarray:
        path = self.files.path(shard)
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


def latents_source(folder: Path) -> ImageSource:
    """A data set that `train/encode_latents.py` encoded.

    Raises:
        LatentCacheError: the folder is incomplete, damaged or something else.
    """
    cache = LatentCache(folder)
    manifest = cache.manifest
    return ImageSource(
        name=manifest.source,
        size=manifest.count,
        read=no_image(f"{folder} holds latents"),
        labels=cache.labels,
        id2label={int(key): name for key, name in manifest.id2label.items()},
        flip=manifest.flips == 2,
        resolution=manifest.resolution,
        num_workers=0,
        latents=cache,
    )
