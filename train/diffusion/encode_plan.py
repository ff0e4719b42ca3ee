"""What encoding a data set takes, said before it begins: disk, memory, time."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from d_emo.common.messages import readable_size
from d_emo.images.autoencoders import LatentSpace
from d_emo.images.latent_manifest import CacheManifest, latent_bytes, shard_folder
from d_emo.models.flops import macs_of
from d_emo.train.diffusion.teacher import Teacher
from d_emo.train.engine.fit import time_on_cpu
from d_emo.train.engine.memory import told
from d_emo.train.engine.rehearsal import held_at_most, shapes_only, size_of


def describe_encoding(
    manifest: CacheManifest, folder: Path, vae: Any, batch: tuple[int, int], accelerator: Accelerator
) -> str:
    """What would be written, for people.

    Args:
        manifest: of the latents.
        folder: that they are written into.
        vae: the autoencoder.
        batch: images that a process encodes at once, and their channels.
        accelerator: of the processes.
    """
    space, side = manifest.latent_space, manifest.resolution
    (views, there), (_, free) = _still_to_do(manifest, folder), room(manifest, folder)
    lines = {
        "data": f"{manifest.source}: {manifest.count:,} images, {len(manifest.id2label) or 'no'} classes, {side} x "
        f"{side}{' in grey' * (space.image_channels == 1)}, "
        f"{'and their mirror images' if manifest.flips == 2 else 'not mirrored'}",
        "latents": f"of {manifest.vae}, {' x '.join(map(str, manifest.shape))}, {space.describe()}",
        "disk": f"{describe_cache(space, manifest.count, manifest.flips, manifest.shape, manifest.dtype)}{there}; "
        f"{readable_size(free)} free",
        "work": told(lambda: describe_work(vae, (*batch, side, side), views, accelerator)),
        "output": str(folder),
    }
    return "\n".join(f"  {name:<10} {value}" for name, value in lines.items())


def describe_cache(space: LatentSpace, count: int, flips: int, shape: tuple[int, ...], dtype: str) -> str:
    """The size of a folder of latents, for people."""
    size = readable_size(count * latent_bytes(space, shape, flips, dtype))
    half = " (half with --dtype float16)" if dtype == "float32" else ""
    return f"{count:,} images x {flips} view{'s' * (flips > 1)} = {size} in {dtype}{half}"


def describe_work(vae: Any, images: tuple[int, ...], views: int, accelerator: Accelerator) -> str:
    """Multiply-adds, time and memory of encoding, for people.

    Args:
        vae: the autoencoder.
        images: shape of what it encodes at once, (B, channels, H, W).
        views: images to encode, mirror images too.
        accelerator: of the processes.

    Raises:
        RuntimeError: see `macs_of_encoding`.
    """
    device = accelerator.device
    macs, held = macs_of_encoding(vae, images[1:], device), held_by_encoding(vae, images, device)
    work = _work(macs, views, "to encode", accelerator)
    return f"{work}; about {readable_size(size_of(vae.state_dict()) + held)} of tensors a process"


def _still_to_do(manifest: CacheManifest, folder: Path) -> tuple[int, str]:
    """Views that are not in a folder yet, and how much is, for people."""
    needed, whole = room(manifest, folder)[0], manifest.count * manifest.image_bytes
    there = f"; {readable_size(whole - needed)} of it there already" if needed < whole else ""
    return needed // manifest.image_bytes * manifest.flips, there


def _work(macs: int, views: int, what: str, accelerator: Accelerator) -> str:
    """Multiply-adds of a view, how many there are, and on a CPU the time of all, for people."""
    time = time_on_cpu(macs * views / accelerator.num_processes, accelerator.device) if views else ""
    return f"{macs / 1e9:.3f} GMACs a view, {views:,} {what}{f', {time}' if time else ''}"


def macs_of_encoding(vae: Any, image: tuple[int, ...], device: torch.device) -> int:
    """Multiply-adds of encoding an image (channels, H, W).

    Raises:
        RuntimeError: what the encoder computes depends on values.
    """
    with shapes_only(device, vae):
        return macs_of(lambda: vae.encode(torch.empty((1, *image), dtype=vae.dtype)))


def held_by_encoding(vae: Any, images: tuple[int, ...], device: torch.device) -> int:
    """The most bytes that encoding images (B, channels, H, W) at once holds, beside the autoencoder's weights.

    Raises:
        RuntimeError: see `macs_of_encoding`.
    """
    with shapes_only(device, vae), torch.no_grad():
        return held_at_most(lambda: vae.encode(torch.empty(images, dtype=vae.dtype)))


def describe_features(manifest: CacheManifest, folder: Path, teacher: Teacher, accelerator: Accelerator) -> str:
    """What a vision model's features take, for people.

    Args:
        manifest: of the features.
        folder: that they are written into.
        teacher: the model.
        accelerator: of the processes.
    """
    views, there = _still_to_do(manifest, folder)
    channels, rows, columns = manifest.shape
    size = f"{readable_size(manifest.count * manifest.image_bytes)} in {manifest.dtype}{there}"
    work = told(lambda: _work(teacher.macs(accelerator.device), views, "to look at", accelerator))
    return f"of {teacher.name}, {channels:,} of {rows} x {columns} places, {size}; {work}"


def check_room(manifests: Mapping[Path, CacheManifest], folder: Path) -> None:
    """Refuse to begin what the disk of `folder` does not take.

    Args:
        manifests: by folders, all of them in `folder`.
        folder: --output-dir.

    Raises:
        ValueError: it has too little room for what is not there yet.
    """
    needed = sum(room(manifest, place)[0] for place, manifest in manifests.items())
    own, free = room(manifests[folder], folder)
    if needed > free:
        parts = f" (features {readable_size(needed - own)} of it)" if needed > own else ""
        what = "latents" if parts else "it"
        half = f", or halve {what} with --dtype float16" if manifests[folder].dtype == "float32" and own else ""
        raise ValueError(
            f"--output-dir {folder}: the latents that are not there yet take {readable_size(needed)}"
            f"{parts}, {readable_size(free)} are free; make room, or choose another disk{half}."
        )


def room(manifest: CacheManifest, folder: Path) -> tuple[int, int]:
    """Bytes of the latents that are not in the folder yet, and bytes that its disk has free."""
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    missing = sum(map(len, shard_folder(folder, manifest).missing()))
    return missing * manifest.image_bytes, shutil.disk_usage(place).free
