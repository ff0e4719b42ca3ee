"""What a folder of latents says that it holds: its manifest, written first and compared before anything is added.

Folders of before there were descriptions of latents (`LatentSpace`) give scaling and shift factor of an AutoencoderKL.
"""

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from d_emo.common.files import content_digest, file_digest, holds_something, read_json, written_whole
from d_emo.common.messages import describe_os_error, first_line, shown
from d_emo.common.ranges import Each, OneOf, Real, Table, Whole, take
from d_emo.common.shards import MANIFEST, ShardFolder, differences, read_manifest, write_manifest
from d_emo.images.autoencoders import LatentSpace, space_of
from d_emo.images.decode import DECODE_VERSION

LABELS = "labels.npy"
# A folder in one of latents, and the name of what it holds in the place of an autoencoder's.
FEATURES = "features"
DTYPES = ("float32", "float16")
# What a manifest's numbers may be.
NUMBERS: Table = {
    **dict.fromkeys(("count", "resolution", "shard_size", "decode_version"), Whole(1)),
    "shape": Each(Whole(1), 3, 3),
    "flips": OneOf((1, 2)),
    "dtype": OneOf(DTYPES),
}
# What folders said of their autoencoder, which was an AutoencoderKL, before there were descriptions.
FACTORS: Table = {"scaling_factor": Real(0, positive=True), "shift_factor": Real()}
MANIFEST_DIGEST = "sha256"
AGAIN = "run train/encode_latents.py again, which makes damaged files anew"
ELSEWHERE = "encode again into another folder"


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
        latent_space: what that VAE makes of images.
        shard_size: images a file.
        decode_version: of the rule by which the pictures were read, `d_emo.images.decode.DECODE_VERSION`.
        labels_digest: SHA-256 of `labels.npy`; empty in folders of before there were checksums.

    Raises:
        ValueError: a value that no folder has.
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
    latent_space: LatentSpace
    shard_size: int
    decode_version: int = DECODE_VERSION
    labels_digest: str = ""

    def __post_init__(self):
        for name, rule in NUMBERS.items():
            rule.check(getattr(self, name), name)
        side = self.resolution / self.latent_space.factor
        if tuple(self.shape) != (self.latent_space.channels, side, side):
            raise ValueError(f"shape={shown(self.shape)} is not that of latents of {self.latent_space.describe()}.")
        if not isinstance(self.id2label, dict) or list(self.id2label) != [str(i) for i in range(len(self.id2label))]:
            raise ValueError(f"id2label={shown(self.id2label)} is not a table of names by class id.")

    def file_shape(self, shard: range) -> tuple[int, ...]:
        """Shape of a file's array."""
        return (len(shard), self.flips, self.latent_space.parts, *self.shape)

    @property
    def image_bytes(self) -> int:
        """What an image's latents take on the disk, of both views."""
        return latent_bytes(self.latent_space, self.shape, self.flips, self.dtype)

    def other_latents(self, space: LatentSpace) -> list[str]:
        """How an autoencoder's latents differ from these, as "NAME these -> those".

        Channels of its images are left out: folders of before do not say them, and the hash of the weights tells them.
        """
        return replace(self.latent_space, image_channels=space.image_channels).differences(space)


def latent_bytes(space: LatentSpace, shape: tuple[int, ...], flips: int, dtype: str) -> int:
    """What the latents (C, h, w) of an image take on the disk, of so many views."""
    return flips * space.parts * math.prod(shape) * np.dtype(dtype).itemsize


def shard_folder(folder: Path, manifest: CacheManifest) -> ShardFolder:
    """The files of a folder of latents."""
    return ShardFolder(folder, "latents-{:09d}.npy", manifest.count, manifest.shard_size)


def claim_latents(folder: Path, manifest: CacheManifest, labels: np.ndarray) -> None:
    """Start a folder of latents, or check that one that was begun holds the same; its labels are mended.

    Raises:
        LatentCacheError: it holds something else; the message says what differs.
    """
    stored = io.BytesIO()
    np.save(stored, labels)
    digest = hashlib.sha256(stored.getbuffer()).hexdigest()
    begun = begun_manifest(folder, manifest)
    if begun is not None:
        digest = begun.labels_digest or digest
    else:
        folder.mkdir(parents=True, exist_ok=True)
        content = asdict(replace(manifest, labels_digest=digest))
        write_manifest(folder, {**content, MANIFEST_DIGEST: content_digest(content)})
    path = folder / LABELS
    if not path.is_file() or file_digest(path) != digest:
        with written_whole(path) as partial:
            partial.write_bytes(stored.getbuffer())


def begun_manifest(folder: Path, manifest: CacheManifest) -> CacheManifest | None:
    """The manifest of a folder of latents that was begun; None where there is nothing yet.

    Raises:
        LatentCacheError: it holds something else than `manifest` says; the message says what differs.
    """
    refuse_other_content(folder)
    if not (folder / MANIFEST).is_file():
        return None
    begun = read_cache_manifest(folder, type(manifest.latent_space))
    free = ("vae", "source", "labels_digest", "latent_space")
    changed = differences(asdict(begun), asdict(manifest), free) + begun.other_latents(manifest.latent_space)
    if changed:
        raise LatentCacheError(
            f"{folder} holds other latents: {'; '.join(changed)}. Give the options that it was begun with, or choose "
            "another folder."
        )
    return begun


def refuse_other_content(folder: Path) -> None:
    """Refuse a folder that is neither empty nor one of latents.

    Raises:
        LatentCacheError: it is one.
    """
    if holds_something(folder) and not (folder / MANIFEST).is_file():
        raise LatentCacheError(f"{folder} is not empty and holds no latents; choose another folder.")


def read_cache_manifest(folder: Path, kind: type[LatentSpace] = LatentSpace) -> CacheManifest:
    """What a folder of a kind of latents holds.

    Raises:
        LatentCacheError: there is no manifest, or it is damaged.
    """
    try:
        content = read_manifest(folder, ELSEWHERE)
    except ValueError as error:
        raise LatentCacheError(str(error)) from error
    except OSError as error:
        raise LatentCacheError(f"{describe_os_error(error)}; {ELSEWHERE}.") from error
    if content is None:
        raise LatentCacheError(
            f"{folder}: there are no latents (no {MANIFEST}); write some with train/encode_latents.py."
        )
    space = content.get("latent_space")
    if kind is LatentSpace and isinstance(space, dict) and space.get("autoencoder") == FEATURES:
        raise LatentCacheError(f"{folder} holds a vision model's features, no latents; name {folder.parent}.")
    digest = content.pop(MANIFEST_DIGEST, None)
    written = {"decode_version": 1, **content}  # older folders do not say it
    try:
        shape = tuple(written["shape"])
        manifest = CacheManifest(**{**_with_space(written, kind), "shape": shape})
    except (ValueError, TypeError, KeyError) as error:
        raise LatentCacheError(f"{folder / MANIFEST} is damaged ({first_line(error)}); {ELSEWHERE}.") from error
    if manifest.decode_version != DECODE_VERSION:
        raise LatentCacheError(
            f"{folder}: its pictures were read by rule {manifest.decode_version}, now there is rule {DECODE_VERSION} "
            f"(orientation, 16 bits, transparency). Encode {manifest.source} again: python train/encode_latents.py "
            f"--vae {manifest.vae} --resolution {manifest.resolution} --output-dir {folder}-{DECODE_VERSION}, and the "
            "options that name it."
        )
    if (digest or manifest.labels_digest) and digest != content_digest(content):
        raise LatentCacheError(
            f"{folder / MANIFEST} is damaged (it is not as it was written, by its SHA-256); {ELSEWHERE}."
        )
    return manifest


def read_table(path: Path) -> dict[str, Any]:
    """A small file that lies beside latents and can be made anew.

    Raises:
        LatentCacheError: it is damaged, or cannot be read.
    """
    try:
        return read_json(path, AGAIN)
    except OSError as error:
        raise LatentCacheError(f"{describe_os_error(error)}; {AGAIN}.") from error
    except ValueError as error:
        raise LatentCacheError(str(error)) from error


def reason_of(message: str) -> str:
    """Why a file is of no use, for who makes it anew right away: a message without its remedy."""
    return message.removesuffix(f"{AGAIN}.").rstrip("; ")


def _with_space(written: Mapping[str, Any], kind: type[LatentSpace]) -> dict[str, Any]:
    """A manifest's fields with the description of its latents, also where it has the factors of before instead."""
    fields = {name: value for name, value in written.items() if name not in FACTORS}
    if "latent_space" in fields:
        return {**fields, "latent_space": space_of(fields["latent_space"], kind)}
    checked = take("", written, {**FACTORS, "shape": NUMBERS["shape"], "resolution": NUMBERS["resolution"]})
    channels, height, _ = checked["shape"]
    space = LatentSpace(
        autoencoder="AutoencoderKL",
        channels=channels,
        factor=max(1, checked["resolution"] // height),
        mean=(float(checked["shift_factor"]),),
        std=(1.0 / checked["scaling_factor"],),
    )
    return {**fields, "latent_space": space}
