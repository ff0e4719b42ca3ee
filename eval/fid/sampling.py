"""Sampling at scale: image i of a seed is the same on any number of processes, at any batch size, after any kill.

A folder of samples holds `manifest.json` (what was drawn, with everything that moves it) and `samples/`, files of
`SHARD_SIZE` images each, which appear whole or not at all. A second run of the same command draws what is missing, and
what is not as it was written.
"""

import contextlib
import functools
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file

from d_emo.common import checks
from d_emo.common.digests import weights_digest
from d_emo.common.files import make_folder, remove_partial
from d_emo.common.messages import first_line
from d_emo.common.output import Progress, say
from d_emo.common.ranges import Maybe, Whole
from d_emo.common.shards import MANIFEST, ShardFolder, differences, read_manifest, write_manifest
from d_emo.common.versions import installed_versions, own_version
from d_emo.eval.fid import archives
from d_emo.eval.fid.image_sets import ImageSet, from_shards
from d_emo.eval.fid.protocol import SamplingSettings, make_sampler
from d_emo.images.autoencoders import latent_space, open_vae
from d_emo.pipelines import DEMOPipeline, open_pipeline
from d_emo.pipelines.guidance import make_guidance
from d_emo.pipelines.loading import open_weaker
from d_emo.pipelines.samplers import image_generator

SHARD_SIZE = 128
SHARD_NAME = "samples-{:08d}.npz"
SAMPLES_FOLDER = "samples"
# Key of the class labels' stream, so that it shares nothing with other uses of a seed.
LABEL_STREAM = 0xD_E30
LIBRARIES = ("torch", "diffusers", "accelerate", "transformers", "numpy")


class ManifestError(ValueError):
    """A folder that holds other samples than those asked for."""


def load_pipeline(model: str, dtype: str = "float32") -> DEMOPipeline:
    """The pipeline of a folder or Hub id, in a type; what must stay float32 (BatchNorm, positions) does.

    Raises:
        ValueError: it does not load; the message gives the remedy.
    """
    try:
        return open_pipeline(model, _type(dtype))
    except ValueError as error:
        raise ValueError(f"--model {error}") from error


def _type(dtype: str) -> torch.dtype | None:
    """None for float32, which is what weights are stored in."""
    return None if dtype == "float32" else getattr(torch, dtype)


def apply_settings(pipeline: DEMOPipeline, model: str, settings: SamplingSettings) -> None:
    """Give the pipeline of `model` the decoder and weights that the settings name; its type is as it was loaded.

    Raises:
        ValueError: decoder or raw weights are missing, or sampler or decoder and model do not fit; the message gives
            the remedy.
    """
    make_sampler(settings, pipeline)
    channels = pipeline.transformer.config.in_channels
    Maybe(Whole(1, channels, "the model's")).check(settings.guidance_channels, "--guidance-channels")
    if settings.weights == "raw":
        state = Path(model) / "training_state" / "model.safetensors"
        if not state.is_file():
            raise ValueError(
                f"--weights raw: {state} does not exist; raw weights are in a run's checkpoint-STEP folders."
            )
        try:
            weights = load_file(state)
            if any(".lora_A." in name for name in weights):
                raise ValueError(
                    f"--weights raw: {model} trains adapters beside frozen weights; use --weights averaged."
                )
            pipeline.transformer.load_state_dict(weights, strict=True)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"--weights raw: {state} is damaged or of another model ({first_line(error)}); name another checkpoint."
            ) from error
    if settings.vae is not None and pipeline.latent_space is not None:
        try:
            vae = open_vae(settings.vae, _type(settings.dtype))
        except ValueError as error:
            raise ValueError(f"--vae {error} A folder of that name counts as it.") from error
        if changed := pipeline.latent_space.differences(latent_space(vae)):
            raise ValueError(
                f"--vae {settings.vae} is another autoencoder than the model was trained with: {'; '.join(changed)}; "
                "leave --vae out."
            )
        pipeline.register_modules(vae=vae)


def open_guide(pipeline: DEMOPipeline, settings: SamplingSettings) -> DEMOPipeline | None:
    """The weaker pipeline that the settings name, if they do; both are on the CPU.

    Raises:
        ValueError: it does not load, or the guidance of the settings does not fit the pipeline.
    """
    guide = open_weaker(settings.guide, _type(settings.dtype))
    with sampled_by(pipeline, settings):
        make_guidance(pipeline, **guidance_of(settings), guide=guide)
    return guide


def guidance_of(settings: SamplingSettings) -> dict[str, Any]:
    """The arguments of a call that say how it is guided, by which pipeline aside."""
    names = ("guidance_scale", "guidance_interval", "guidance_channels", "guider", "internal_guidance")
    return {name: getattr(settings, name) for name in names}


@contextlib.contextmanager
def sampled_by(pipeline: DEMOPipeline, settings: SamplingSettings) -> Iterator[None]:
    """Within it, the pipeline has the scheduler that the settings name.

    Raises:
        ValueError: it does not fit the model.
    """
    former, pipeline.scheduler = pipeline.scheduler, make_sampler(settings, pipeline)
    try:
        yield
    finally:
        pipeline.scheduler = former


def make_manifest(
    pipeline: DEMOPipeline, settings: SamplingSettings, guide: DEMOPipeline | None = None
) -> dict[str, Any]:
    """Everything that moves the samples, ready for JSON."""
    scheduler = make_sampler(settings, pipeline)
    return {
        "sampling": asdict(settings),
        "transformer": weights_digest(pipeline.transformer),
        "transformer_config": _plain(pipeline.transformer.config),
        "guide": guide
        and {
            "transformer": weights_digest(guide.transformer),
            "transformer_config": _plain(guide.transformer.config),
        },
        "decoder": weights_digest(pipeline.vae),
        "latent_space": None if pipeline.latent_space is None else asdict(pipeline.latent_space),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": _plain(scheduler.config),
        "num_classes": pipeline.transformer.config.num_classes,
        "shard_size": SHARD_SIZE,
        "versions": {"python": platform.python_version(), "d-emo": own_version(), **installed_versions(*LIBRARIES)},
    }


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without Diffusers' notes."""
    return {name: value for name, value in sorted(config.items()) if name[0] != "_"}


def check_samples(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether a folder says already that it holds such samples.

    Raises:
        ManifestError: it holds others; the message says what differs.
    """
    try:
        stored = read_manifest(folder, "delete the folder and sample again")
    except ValueError as error:
        raise ManifestError(str(error)) from error
    if stored is None:
        if (folder / SAMPLES_FOLDER).exists():
            raise ManifestError(f"{folder} holds samples without a {MANIFEST}; use another --output-dir.")
        return False
    if isinstance(stored.get("sampling"), dict):  # what settings there were not yet was as it is by default
        stored["sampling"] = {**asdict(SamplingSettings()), **stored["sampling"]}
    if isinstance(stored.get("scheduler_config"), dict) and "shift" in manifest["scheduler_config"]:
        stored["scheduler_config"].setdefault("shift", 1.0)  # of before all samplers of flows had one
    # Folders of before these moved anything do not say them.
    free = tuple(name for name in ("latent_space", "transformer_config") if name not in stored)
    if changed := differences(stored, manifest, free):
        raise ManifestError(
            f"{folder} holds other samples: {'; '.join(changed)}. Use another --output-dir, or delete the folder."
        )
    return True


def claim_samples(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, or check that the one that is there says the same.

    Raises:
        ManifestError: the folder holds other samples; the message says what differs.
    """
    if not check_samples(folder, manifest):
        folder.mkdir(parents=True, exist_ok=True)
        write_manifest(folder, manifest)


def image_shape(pipeline: DEMOPipeline) -> tuple[int, int, int]:
    """(H, W, channels) of what a pipeline draws."""
    height, width = (side * pipeline.vae_scale_factor for side in pipeline.transformer.sample_shape)
    space = pipeline.latent_space
    return height, width, pipeline.transformer.config.in_channels if space is None else space.image_channels


def sample_labels(settings: SamplingSettings, num_classes: int) -> np.ndarray:
    """Class ids of all images, (num_images,); image i's does not depend on how many there are."""
    checks.whole(num_classes, "num_classes", least=0)
    if not num_classes:
        return np.zeros(settings.num_images, dtype=np.int64)
    if settings.labels == "balanced":
        return np.arange(settings.num_images) % num_classes
    stream = np.random.Generator(np.random.Philox(key=[settings.seed, LABEL_STREAM]))
    return np.array([int(stream.random() * num_classes) for _ in range(settings.num_images)])


@torch.no_grad()
def draw_images(
    pipeline: DEMOPipeline,
    settings: SamplingSettings,
    indices: range,
    labels: np.ndarray,
    guide: DEMOPipeline | None = None,
) -> np.ndarray:
    """Images of some indices, uint8 (n, H, W, channels), rounded in float32."""
    conditional = bool(pipeline.transformer.config.num_classes)
    images = pipeline(
        [int(labels[index]) for index in indices] if conditional else None,
        num_images_per_label=1 if conditional else len(indices),
        num_inference_steps=settings.steps,
        **guidance_of(settings),
        guide=guide,
        generator=[image_generator(settings.seed, index) for index in indices],
        output_type="pt",
    ).images
    return (images.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def sample_images(
    pipeline: DEMOPipeline,
    settings: SamplingSettings,
    folder: Path,
    accelerator: Accelerator,
    batch_size: int,
    guide: DEMOPipeline | None = None,
) -> ImageSet:
    """Draw what `folder` lacks of the samples, on all processes, and open them.

    Args:
        pipeline: on the accelerator's device, with the settings' decoder, weights and type.
        settings: what to draw.
        folder: gets `manifest.json` and `samples/`.
        accelerator: the processes.
        batch_size: images drawn at once by a process; it does not change them, arithmetic noise aside.
        guide: the weaker pipeline that the settings name, on the same device.

    Raises:
        ManifestError: the folder holds other samples.
        ValueError: sampler and model do not fit.
    """
    checks.whole(batch_size, "batch_size")
    manifest = make_manifest(pipeline, settings, guide)
    if accelerator.is_main_process:
        claim_samples(folder, manifest)
        make_folder(folder / SAMPLES_FOLDER)
        remove_partial(folder / SAMPLES_FOLDER)
    accelerator.wait_for_everyone()
    with sampled_by(pipeline, settings):
        _draw_missing(pipeline, settings, folder / SAMPLES_FOLDER, accelerator, batch_size, guide)
    accelerator.wait_for_everyone()
    return from_shards(folder / SAMPLES_FOLDER)


def check_shard(files: ShardFolder, labels: np.ndarray, shape: tuple[int, int, int], shard: range) -> None:
    """Read a file of samples whole.

    Args:
        files: its folder.
        labels: class ids of all images.
        shape: (H, W, channels) of an image.
        shard: the file's images.

    Raises:
        ValueError: it is not as it was written, or holds other images.
    """
    path = files.path(shard)
    images, stored = (archives.read_array(path, name) for name in (archives.IMAGES_KEY, "labels"))
    if images.shape != (len(shard), *shape) or images.dtype != np.uint8:
        raise ValueError(f"{path} holds {images.dtype} {images.shape}, not uint8 {(len(shard), *shape)}")
    if not np.array_equal(stored, labels[shard.start : shard.stop]):
        raise ValueError(f"{path} holds images of other classes")


def _draw_missing(
    pipeline: DEMOPipeline,
    settings: SamplingSettings,
    folder: Path,
    accelerator: Accelerator,
    batch_size: int,
    guide: DEMOPipeline | None,
) -> None:
    labels = sample_labels(settings, pipeline.transformer.config.num_classes)
    files = ShardFolder(folder, SHARD_NAME, len(labels), SHARD_SIZE)
    check = functools.partial(check_shard, files, labels, image_shape(pipeline))
    for reason in files.discard_damaged(check, accelerator.process_index, accelerator.num_processes):
        say(f"drawn again: {reason}")
    accelerator.wait_for_everyone()
    missing = files.missing()
    done = len(labels) - sum(map(len, missing))
    # Everyone has seen what is missing before anyone adds to it.
    accelerator.wait_for_everyone()
    started = time.perf_counter()
    with Progress(len(labels), "image", "sampling", done=done, shown=accelerator.is_main_process) as progress:
        for turn, shard in enumerate(missing):
            if turn % accelerator.num_processes != accelerator.process_index:
                continue
            blocks = []
            for start in range(shard.start, shard.stop, batch_size):
                indices = range(start, min(start + batch_size, shard.stop))
                blocks.append(draw_images(pipeline, settings, indices, labels, guide))
                # The other processes are about as far.
                progress.update(len(indices) * accelerator.num_processes)
            arrays = {archives.IMAGES_KEY: np.concatenate(blocks), "labels": labels[shard.start : shard.stop]}
            archives.write_arrays(files.path(shard), **arrays)
    if missing and accelerator.is_main_process:
        speed = sum(map(len, missing)) / (time.perf_counter() - started)
        say(f"drew {sum(map(len, missing)):,} images, about {speed:.1f} images/s; {done:,} were there")
