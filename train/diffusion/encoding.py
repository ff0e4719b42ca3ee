"""Encoding a data set with an autoencoder: what `train/encode_latents.py` does after it has read its options."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from d_emo.common.digests import weights_digest
from d_emo.common.files import check_writable
from d_emo.common.locks import output_folder
from d_emo.common.output import Progress, say
from d_emo.common.processes import (
    agreed,
    keep_freed_memory,
    leave_interrupts,
    loader_processes,
    start_processes,
    use_tf32,
)
from d_emo.images import latent_cache, latent_manifest
from d_emo.images.autoencoders import doubtful_scale, latent_space
from d_emo.images.decode import UnreadableImageError
from d_emo.images.features import are_unfinished, features_manifest
from d_emo.images.latents import encode_posterior
from d_emo.train.data.batches import Pixels, TrainingImages
from d_emo.train.data.options import DataOptions
from d_emo.train.data.sources import check_output, load_source
from d_emo.train.diffusion.config import AUTO_VAE
from d_emo.train.diffusion.encode_config import EncodeConfig, EncodeOptions
from d_emo.train.diffusion.encode_plan import check_room, describe_encoding, describe_features
from d_emo.train.diffusion.latent_spaces import resolution_of, side_of
from d_emo.train.diffusion.measuring import discard_statistics, measure
from d_emo.train.diffusion.resolving import COLORS, load_vae
from d_emo.train.diffusion.teacher import Teacher


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
    latents = Output(folder, manifest, lambda view: encode_posterior(vae, view), f"--vae {named}: its latents")
    teacher = None if options.align is None else open_teacher(options.align, manifest).to(accelerator.device)
    features = None if teacher is None else features_output(teacher, manifest, folder)
    outputs = [latents] if features is None else [latents, features]
    for output in outputs:
        agreed(accelerator, functools.partial(begun, output))
    if accelerator.is_main_process:
        say(describe_encoding(manifest, folder, vae, (options.batch_size, source.channels), accelerator))
        if teacher is not None and features is not None:
            say(f"  {'features':<10} {describe_features(features.manifest, features.folder, teacher, accelerator)}")
        elif are_unfinished(folder):
            say(f"  note       {folder / latent_manifest.FEATURES} is not complete; --align goes on with it.")
        if not options.statistics and (doubt := doubtful_scale(vae)):
            say(f"  note       {doubt}.")
    agreed(accelerator, lambda: check_room({output.folder: output.manifest for output in outputs}, folder))
    images = _Images(TrainingImages(source, Pixels(source.channels, resolution, flip=False, seed=0)), data.on_bad_image)
    workers = loader_processes(data.num_workers, source.num_workers)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    use_tf32(accelerator)
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            stack.enter_context(output_folder(folder))
        if options.dry_run:
            return
        vae.to(accelerator.device)
        for output in outputs:
            if accelerator.is_main_process:
                latent_manifest.claim_latents(output.folder, output.manifest, source.labels)
            accelerator.wait_for_everyone()
            discard_damaged(output, accelerator)
            discarded = output is latents and discard_statistics(folder, manifest, accelerator)
            accelerator.wait_for_everyone()
            write_missing(output, images, accelerator, options.batch_size, workers)
            accelerator.wait_for_everyone()
            if output is latents and (options.statistics or discarded):
                measure(folder, manifest, accelerator)
        if accelerator.is_main_process:
            for output in outputs:  # complete, and every file as it was written
                latent_cache.LatentCache(output.folder, type(output.manifest.latent_space))
            align = "" if options.align is None else f" --align {options.align}"
            say(f"{manifest.count:,} images in {folder}; train with --latents {folder}{align}")


@dataclass(frozen=True)
class Output:
    """Something that is made of every image and kept.

    Attributes:
        folder: that it is written into.
        manifest: of that folder.
        encode: images (B, channels, side, side) in [-1, 1] -> (B, M, C, h, w).
        name: what it is and of which option, for messages.
        encoded: what was done with images, for people.
    """

    folder: Path
    manifest: latent_manifest.CacheManifest
    encode: Callable[[torch.Tensor], torch.Tensor]
    name: str
    encoded: str = "encoded"


def features_output(teacher: Teacher, latents: latent_manifest.CacheManifest, folder: Path) -> Output:
    """What a vision model says of the images of latents.

    Args:
        teacher: the model, where it is computed.
        latents: of the same images.
        folder: theirs.

    Raises:
        ValueError: its features are no square grid.
    """
    try:
        manifest = features_manifest(latents, teacher.name, teacher.digest, teacher.shape)
    except ValueError as error:
        raise ValueError(f"--align {teacher.name}: {error}.") from error

    def look(images: torch.Tensor) -> torch.Tensor:
        return teacher.features(images).permute(0, 3, 1, 2)[:, None]

    return Output(
        folder / latent_manifest.FEATURES, manifest, look, f"--align {teacher.name}: its features", "looked at"
    )


def open_teacher(name: str, latents: latent_manifest.CacheManifest) -> Teacher:
    """A vision model. Of a network in stages the stage is taken that suits tokens of 2 x 2 latent pixels.

    Raises:
        ValueError: it does not load.
    """
    side = max(1, latents.shape[-1] // 2)
    return Teacher(name, (side, side))


def begun(output: Output) -> None:
    """Check what is in an output's folder already.

    Raises:
        LatentCacheError: something else.
    """
    try:
        latent_manifest.begun_manifest(output.folder, output.manifest)
    except latent_manifest.LatentCacheError as error:
        if output.folder.name != latent_manifest.FEATURES:
            raise
        raise latent_manifest.LatentCacheError(f"{error} Or remove {output.folder}: features are made anew.") from error


def discard_damaged(output: Output, accelerator: Accelerator) -> None:
    """Delete files that are not as they were written, each process its share, so that they are made again."""
    folder = output.folder
    manifest = latent_manifest.read_cache_manifest(folder, type(output.manifest.latent_space))
    check = functools.partial(latent_cache.check_latents, folder, manifest)
    files = latent_manifest.shard_folder(folder, manifest)
    for reason in files.discard_damaged(check, accelerator.process_index, accelerator.num_processes):
        say(f"encoded again: {latent_manifest.reason_of(reason)}")


def write_missing(output: Output, images: _Images, accelerator: Accelerator, batch_size: int, num_workers: int) -> None:
    """Make the files that are not there.

    Raises:
        ValueError: what is made of an image is NaN or infinite.
    """
    manifest = output.manifest
    files = latent_manifest.shard_folder(output.folder, manifest)
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
    rows = _encoded_rows(loader, output, accelerator.device)
    started, done = time.perf_counter(), manifest.count - sum(map(len, missing))
    with Progress(manifest.count, "image", "encoding", done=done, shown=accelerator.is_main_process) as progress:
        for shard in mine:
            posteriors, replaced = np.empty(manifest.file_shape(shard), dtype=manifest.dtype), {}
            for row, index in enumerate(shard):
                posteriors[row], used = next(rows)
                if not np.isfinite(posteriors[row]).all():
                    raise ValueError(
                        f"{output.name} of image {used} are NaN or infinite; use a model whose weights are whole and "
                        "whose range suffices."
                    )
                if used != index:
                    replaced[index] = used
                progress.update(accelerator.num_processes)  # the others are about as far
            latent_cache.write_latents(files.path(shard), posteriors, replaced)
    if missing and accelerator.is_main_process:
        count = sum(map(len, missing))
        say(f"{output.encoded} {count:,} images, about {count / (time.perf_counter() - started):.1f} images/s")


def _encoded_rows(loader: DataLoader, output: Output, device: torch.device) -> Iterator[tuple[np.ndarray, int]]:
    """(flips, M, C, h, w) of each image in turn, and the index of the image that it is of."""
    for samples in loader:
        for _, _, messages in samples:
            for message in messages:
                say(f"skipped: {message}")
        pixels = torch.stack([sample[0] for sample in samples]).to(device)  # (B, channels, side, side)
        views = [pixels, pixels.flip(-1)][: output.manifest.flips]
        posteriors = torch.stack([output.encode(view) for view in views], dim=1)
        limit = float(np.finfo(output.manifest.dtype).max)
        rows = posteriors.clamp(-limit, limit).cpu().numpy().astype(output.manifest.dtype)
        yield from zip(rows, (sample[1] for sample in samples), strict=True)
