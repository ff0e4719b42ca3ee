"""Encoding a data set with an autoencoder: what `train/encode_latents.py` does after it has read its options."""

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from d_emo.common.digests import weights_digest
from d_emo.common.files import check_writable
from d_emo.common.locks import output_folder
from d_emo.common.output import Progress, say
from d_emo.common.processes import agreed, keep_freed_memory, leave_interrupts, loader_processes, start_processes
from d_emo.images import latent_cache, latent_manifest
from d_emo.images.autoencoders import doubtful_scale, latent_space
from d_emo.images.decode import UnreadableImageError
from d_emo.images.latents import encode_posterior
from d_emo.train.data.batches import Pixels, TrainingImages
from d_emo.train.data.options import DataOptions
from d_emo.train.data.sources import check_output, load_source
from d_emo.train.diffusion.config import AUTO_VAE
from d_emo.train.diffusion.encode_config import EncodeConfig, EncodeOptions
from d_emo.train.diffusion.encode_plan import check_room, describe_encoding
from d_emo.train.diffusion.latent_spaces import resolution_of, side_of
from d_emo.train.diffusion.measuring import discard_statistics, measure
from d_emo.train.diffusion.plan import COLORS, load_vae


class _Images(Dataset):
    """Images by index, for loader processes; the messages of those that had to be replaced."""

    def __init__(self, images: TrainingImages, on_bad_image: str):
        self.images = images
        self.on_bad_image = on_bad_image

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, list[str]]:
        image, used, bad_images = self.images.read(index)
        if bad_images and self.on_bad_image == "stop":
            raise UnreadableImageError(f"{bad_images[0]}. Repair or remove it, or go on: --on-bad-image skip.")
        return self.images.prepare(image, index), used, bad_images


def run(config: EncodeConfig) -> None:
    """Encode what is missing; an interruption keeps what is done."""
    encode(config.data, config.encoding, start_processes())


def encode(data: DataOptions, options: EncodeOptions, accelerator: Accelerator) -> None:
    """Write the folder of latents, each process its share of the files."""
    folder = Path(str(options.output_dir))
    check_writable(folder, "--output-dir", folder=True)
    check_output(data, folder)
    latent_manifest.refuse_other_content(folder)
    source = load_source(data)
    if source.stream is not None:
        raise ValueError("--streaming: encoding takes images by index; fetch the files and name them without it.")
    named = AUTO_VAE if options.vae == "auto" else options.vae
    vae = load_vae(named)
    if vae is None:
        raise ValueError("--vae none: latents are what a VAE makes; train on pixels without this step.")
    space = latent_space(vae)
    resolution = resolution_of(options.resolution, source.resolution, space)
    side = side_of(space, resolution)
    if space.image_channels not in COLORS:
        raise ValueError(f"--vae {named} takes {space.image_channels} channels; pictures have 1 (grey) or 3 (colour).")
    source = replace(source, channels=space.image_channels)
    flips = 2 if (source.flip if data.random_flip is None else data.random_flip) else 1
    manifest = latent_manifest.CacheManifest(
        source=source.name,
        fingerprint=source.fingerprint,
        count=source.size,
        id2label={str(key): name for key, name in source.id2label.items()},
        resolution=resolution,
        shape=(space.channels, side, side),
        flips=flips,
        dtype=options.dtype,
        vae=named,
        vae_digest=str(weights_digest(vae)),
        latent_space=space,
        shard_size=options.shard_size,
    )
    agreed(accelerator, lambda: latent_manifest.begun_manifest(folder, manifest))
    if accelerator.is_main_process:
        say(describe_encoding(manifest, folder, vae, (options.batch_size, source.channels), accelerator))
        if not options.statistics and (doubt := doubtful_scale(vae)):
            say(f"  note       {doubt}.")
    agreed(accelerator, lambda: check_room(manifest, folder))
    images = _Images(TrainingImages(source, Pixels(source.channels, resolution, flip=False, seed=0)), data.on_bad_image)
    workers = loader_processes(data.num_workers, source.num_workers)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(output_folder(folder))
        if options.dry_run:
            return
        if accelerator.is_main_process:
            latent_manifest.claim_latents(folder, manifest, source.labels)
        accelerator.wait_for_everyone()
        discard_damaged(folder, accelerator)
        discarded = discard_statistics(folder, manifest, accelerator)
        accelerator.wait_for_everyone()
        write_missing(manifest, folder, images, vae.to(accelerator.device), accelerator, options.batch_size, workers)
        accelerator.wait_for_everyone()
        if options.statistics or discarded:
            measure(folder, manifest, accelerator)
        if accelerator.is_main_process:
            latent_cache.LatentCache(folder)  # complete, and every file as it was written
            say(f"{manifest.count:,} images in {folder}; train with --latents {folder}")


def discard_damaged(folder: Path, accelerator: Accelerator) -> None:
    """Delete files that are not as they were written, each process its share, so that they are encoded again."""
    manifest = latent_manifest.read_cache_manifest(folder)
    check = functools.partial(latent_cache.check_latents, folder, manifest)
    files = latent_manifest.shard_folder(folder, manifest)
    for reason in files.discard_damaged(check, accelerator.process_index, accelerator.num_processes):
        say(f"encoded again: {latent_manifest.reason_of(reason)}")


def write_missing(
    manifest: latent_manifest.CacheManifest,
    folder: Path,
    images: _Images,
    vae: Any,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
) -> None:
    """Encode the files that are not there.

    Raises:
        ValueError: the VAE makes NaN or infinite latents of an image.
    """
    files = latent_manifest.shard_folder(folder, manifest)
    missing = files.missing()
    accelerator.wait_for_everyone()  # everyone has seen what is missing before anyone adds to it
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    indices = [index for shard in mine for index in shard]
    loader = DataLoader(
        images,
        batch_size=batch_size,
        sampler=indices,
        num_workers=num_workers,
        collate_fn=list,
        worker_init_fn=leave_interrupts,
    )
    rows = _encoded_rows(loader, vae, manifest, accelerator.device)
    started, done = time.perf_counter(), manifest.count - sum(map(len, missing))
    with Progress(manifest.count, "image", "encoding", done=done, shown=accelerator.is_main_process) as progress:
        for shard in mine:
            posteriors, replaced = np.empty(manifest.file_shape(shard), dtype=manifest.dtype), {}
            for row, index in enumerate(shard):
                posteriors[row], used = next(rows)
                if not np.isfinite(posteriors[row]).all():
                    raise ValueError(
                        f"--vae {manifest.vae}: its latents of image {used} are NaN or infinite; use a VAE whose "
                        "weights are whole and whose range suffices."
                    )
                if used != index:
                    replaced[index] = used
                progress.update(accelerator.num_processes)  # the others are about as far
            latent_cache.write_latents(files.path(shard), posteriors, replaced)
    if missing and accelerator.is_main_process:
        count = sum(map(len, missing))
        say(f"encoded {count:,} images, about {count / (time.perf_counter() - started):.1f} images/s")


def _encoded_rows(
    loader: DataLoader, vae: Any, manifest: latent_manifest.CacheManifest, device: torch.device
) -> Iterator[tuple[np.ndarray, int]]:
    """(flips, M, C, h, w) of each image in turn, and the index of the image that it is of."""
    for samples in loader:
        for _, _, messages in samples:
            for message in messages:
                say(f"skipped: {message}")
        pixels = torch.stack([sample[0] for sample in samples]).to(device)  # (B, channels, side, side)
        views = [pixels, pixels.flip(-1)][: manifest.flips]
        posteriors = torch.stack([encode_posterior(vae, view) for view in views], dim=1)
        limit = float(np.finfo(manifest.dtype).max)
        rows = posteriors.clamp(-limit, limit).cpu().numpy().astype(manifest.dtype)
        yield from zip(rows, (sample[1] for sample in samples), strict=True)
