"""Encoding a data set with a VAE: what `train/encode_latents.py` does after it has read its options."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from d_emo.common.digests import weights_digest
from d_emo.common.files import remove_partial
from d_emo.common.processes import keep_freed_memory, start_processes
from d_emo.images import latent_cache
from d_emo.images.decode import UnreadableImageError
from d_emo.images.latents import encode_moments, vae_scale_factor
from d_emo.train.data.batches import Pixels, TrainingImages
from d_emo.train.data.options import DataOptions
from d_emo.train.data.sources import load_source
from d_emo.train.diffusion.encode_config import EncodeConfig, EncodeOptions
from d_emo.train.diffusion.plan import load_vae


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
    source = load_source(data)
    if source.stream is not None:
        raise ValueError("--streaming: encoding takes images by index; fetch the files and name them without it.")
    vae = load_vae(options.vae)
    if vae is None:
        raise ValueError("--vae none: latents are what a VAE makes; train on pixels without this step.")
    resolution, factor = options.resolution or source.resolution, vae_scale_factor(vae)
    if resolution % factor:
        raise ValueError(f"--resolution {resolution} is not a multiple of the VAE's factor {factor}.")
    if vae.config.in_channels != source.channels:
        raise ValueError(f"--vae {options.vae} takes {vae.config.in_channels} channels, images have {source.channels}.")
    flips = 2 if (source.flip if data.random_flip is None else data.random_flip) else 1
    manifest = latent_cache.CacheManifest(
        source=source.name,
        fingerprint=source.fingerprint,
        count=source.size,
        id2label={str(key): name for key, name in source.id2label.items()},
        resolution=resolution,
        shape=(vae.config.latent_channels, resolution // factor, resolution // factor),
        flips=flips,
        dtype=options.dtype,
        vae=options.vae,
        vae_digest=str(weights_digest(vae)),
        scaling_factor=vae.config.scaling_factor,
        shift_factor=getattr(vae.config, "shift_factor", None) or 0.0,
        shard_size=options.shard_size,
    )
    folder = Path(str(options.output_dir))
    if accelerator.is_main_process:
        latent_cache.claim_latents(folder, manifest, source.labels)
        remove_partial(folder)
    accelerator.wait_for_everyone()
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    images = _Images(TrainingImages(source, Pixels(source.channels, resolution, flip=False, seed=0)), data.on_bad_image)
    workers = source.num_workers if data.num_workers is None else data.num_workers
    write_missing(manifest, folder, images, vae.to(accelerator.device), accelerator, options.batch_size, workers)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        latent_cache.LatentCache(folder)  # complete, and every file of its size
        print(f"{manifest.count:,} images in {folder}; train with --latents {folder}")


def write_missing(
    manifest: latent_cache.CacheManifest,
    folder: Path,
    images: _Images,
    vae: Any,
    accelerator: Accelerator,
    batch_size: int,
    num_workers: int,
) -> None:
    """Encode the files that are not there."""
    files = latent_cache.shard_folder(folder, manifest)
    missing = files.missing()
    accelerator.wait_for_everyone()  # everyone has seen what is missing before anyone adds to it
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    indices = [index for shard in mine for index in shard]
    loader = DataLoader(images, batch_size=batch_size, sampler=indices, num_workers=num_workers, collate_fn=list)
    rows = _encoded_rows(loader, vae, manifest, accelerator.device)
    started, done = time.perf_counter(), manifest.count - sum(map(len, missing))
    with tqdm(total=manifest.count, initial=done, unit="image", disable=not accelerator.is_main_process) as bar:
        for shard in mine:
            moments, replaced = np.empty(manifest.file_shape(shard), dtype=manifest.dtype), {}
            for row, index in enumerate(shard):
                moments[row], used = next(rows)
                if used != index:
                    replaced[index] = used
                bar.update(min(accelerator.num_processes, manifest.count - bar.n))  # the others are about as far
            latent_cache.write_latents(files.path(shard), moments, replaced)
    if missing and accelerator.is_main_process:
        count = sum(map(len, missing))
        tqdm.write(f"encoded {count:,} images, about {count / (time.perf_counter() - started):.1f} images/s")


def _encoded_rows(
    loader: DataLoader, vae: Any, manifest: latent_cache.CacheManifest, device: torch.device
) -> Iterator[tuple[np.ndarray, int]]:
    """(flips, 2, C, h, w) of each image in turn, and the index of the image that it is of."""
    for samples in loader:
        for _, _, messages in samples:
            for message in messages:
                tqdm.write(f"skipped: {message}")
        pixels = torch.stack([sample[0] for sample in samples]).to(device)  # (B, channels, side, side)
        views = [pixels, pixels.flip(-1)][: manifest.flips]
        moments = torch.stack([torch.stack(encode_moments(vae, view), dim=1) for view in views], dim=1)
        limit = float(np.finfo(manifest.dtype).max)
        rows = moments.clamp(-limit, limit).cpu().numpy().astype(manifest.dtype)
        yield from zip(rows, (sample[1] for sample in samples), strict=True)
