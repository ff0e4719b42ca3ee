"""How fast training data can be read: latents encoded beforehand, against encoding on the fly and raw files.

    python eval/benchmarks/loader_speed.py --images imagenet-one-per-class-256.parquet --resolution 256

Reads a shuffled epoch in one process, images and mirror images at random, in rounds in which the ways take turns;
medians of images/s and the ratio to the first row. `latent cache` is what --latents reads. `raw files` reads the same
bytes from the same files, without a cache's book-keeping. `one file an image` is a .npy file for each. `encode on the
fly` decodes the picture, crops it and runs the VAE (by default a random one of SD's size; nothing is fetched).

A second table compares how pictures are stored, for training in pixels or encoding: the same JPEG files in class
folders, a parquet file, and WebDataset shards read by index and as a stream; each is read and decoded, in one process.
"""

import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from d_emo.common.command_line import CommandParser
from d_emo.common.commands import command
from d_emo.common.digests import weights_digest
from d_emo.common.numbers import whole_from
from d_emo.images.autoencoders import latent_space, open_vae
from d_emo.images.decode import center_crop, decode, to_tensor
from d_emo.images.digits import digits_source
from d_emo.images.folders import folder_source
from d_emo.images.latent_cache import LatentCache, write_latents
from d_emo.images.latent_manifest import CacheManifest, claim_latents, shard_folder
from d_emo.images.latents import encode_images
from d_emo.images.shards import tar_source
from d_emo.images.source import ImageSource
from d_emo.images.streams import streamed_source
from d_emo.images.tables import datasets_source

# Pictures are slow to decode; so many tell enough.
MAX_PICTURES = 1000
# The layout of SD's VAE.
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}


def random_latents(folder: Path, count: int, resolution: int, vae: Any) -> CacheManifest:
    """A folder of random posteriors of the right size: how fast they are read does not depend on what they are."""
    space = latent_space(vae)
    try:
        side = space.side(resolution)
    except ValueError as error:
        raise ValueError(f"--resolution {resolution}: {error}") from error
    manifest = CacheManifest(
        source="random", fingerprint="random", count=count, id2label={}, resolution=resolution, flips=2,
        shape=(space.channels, side, side), dtype="float32", vae="random", vae_digest=str(weights_digest(vae)),
        latent_space=space, shard_size=1024,
    )  # fmt: skip
    claim_latents(folder, manifest, np.zeros(count, dtype=np.int64))
    random = np.random.default_rng(0)
    files = shard_folder(folder, manifest)
    for shard in files.ranges:
        write_latents(files.path(shard), random.standard_normal(manifest.file_shape(shard), dtype=np.float32), {})
    return manifest


def ways(folder: Path, manifest: CacheManifest, source: ImageSource, vae: Any) -> dict[str, Callable]:
    """Each way as a function of (image, mirrored), which answers what training would get."""
    cache = LatentCache(folder)
    raw = [cache.files.path(shard).open("rb") for shard in cache.files.ranges]
    bytes_each = manifest.image_bytes // manifest.flips
    header = cache.files.path(range(0)).stat().st_size - manifest.flips * bytes_each * len(cache.files.ranges[0])
    single = folder / "single"
    single.mkdir()
    for index in range(manifest.count):
        np.save(single / f"{index}.npy", np.stack([cache.read(index, flipped).numpy() for flipped in (False, True)]))

    def raw_file(index: int, flipped: bool) -> np.ndarray:
        shard, row = divmod(index, manifest.shard_size)
        raw[shard].seek(header + (row * manifest.flips + flipped) * bytes_each)
        return np.frombuffer(raw[shard].read(bytes_each), dtype=np.float32)

    def on_the_fly(index: int, flipped: bool) -> torch.Tensor:
        pixels = to_tensor(source.read(index % source.size), 3, manifest.resolution)[None]
        noise = torch.randn(1, *manifest.shape)
        return encode_images(vae, manifest.latent_space, pixels.flip(-1) if flipped else pixels, noise)

    return {
        "latent cache": cache.read,
        "raw files": raw_file,
        "one file an image": lambda index, flipped: np.load(single / f"{index}.npy")[int(flipped)],
        "encode on the fly": on_the_fly,
    }


def store_pictures(folder: Path, source: ImageSource, count: int, resolution: int) -> dict[str, ImageSource]:
    """The same JPEG files in every kind of storage, opened; shards hold 100 of them."""
    import datasets

    names = ("even", "odd")
    for name in names:
        (folder / "folders" / name).mkdir(parents=True)
    encoded = []
    for index in range(count):
        content = io.BytesIO()
        picture = center_crop(source.read(index % source.size).convert("RGB"), resolution)
        picture.save(content, "JPEG", quality=95)
        encoded.append(content.getvalue())
        (folder / "folders" / names[index % 2] / f"{index:06d}.jpg").write_bytes(encoded[-1])
    for first in range(0, count, 100):
        with tarfile.open(folder / f"shard-{first // 100:04d}.tar", "w") as archive:
            for index in range(first, min(first + 100, count)):
                for suffix, content_of in (("jpg", encoded[index]), ("cls", str(index % 2).encode())):
                    member = tarfile.TarInfo(f"{index:06d}.{suffix}")
                    member.size = len(content_of)
                    archive.addfile(member, io.BytesIO(content_of))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))})
    rows = {"image": [{"bytes": item, "path": None} for item in encoded], "label": [i % 2 for i in range(count)]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "pictures.parquet")
    shards = f"{folder}/shard-*.tar"
    return {
        "class folders": folder_source(folder / "folders", False),
        "parquet": datasets_source(str(folder / "pictures.parquet")),
        "WebDataset by index": tar_source(shards),
        "WebDataset stream": streamed_source(shards, class_names=names, buffer_size=200),
    }


def picture_speeds(sources: dict[str, ImageSource], rounds: int) -> dict[str, float]:
    """Images/s of each storage, medians of rounds in which they take turns; a round is a shuffled epoch."""
    speeds: dict[str, list[float]] = {name: [] for name in sources}
    for turn in range(rounds):
        for name, source in sources.items():
            start, read = time.perf_counter(), 0
            if source.stream is not None:
                for image in source.stream.epoch(0, turn, 0, 1):
                    decode(image.file, image.name)
                    read += 1
            else:
                for index in np.random.default_rng(turn).permutation(source.size).tolist():
                    source.read(index)
                    read += 1
            speeds[name].append(read / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


def print_table(medians: dict[str, float]) -> None:
    """A row a way, with its ratio to the first."""
    first = next(iter(medians.values()))
    print("| way | images/s | ratio |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:,.1f} | {median / first:.4f} |")


@command("loader_speed")
def main(arguments: list[str]) -> None:
    """Print a row a way."""
    parser = CommandParser("loader_speed", __doc__)
    parser.add_argument("--images", help=".parquet file of images. Default: scikit-learn's digits, enlarged.")
    parser.add_argument("--resolution", type=whole_from(1), default=256)
    parser.add_argument("--count", type=whole_from(1), default=2000, help="Images in the cache.")
    parser.add_argument("--rounds", type=whole_from(1), default=5)
    parser.add_argument("--encoded", type=whole_from(1), default=4, help="Images a round that are encoded on the fly.")
    parser.add_argument("--vae", help="Folder of a VAE. Default: random weights in the layout of SD's.")
    options = parser.parse_args(arguments)
    try:
        source = datasets_source(options.images, label_column=None) if options.images else digits_source()
    except ValueError as error:
        raise ValueError(f"--images {options.images} {error}") from error
    try:
        vae = open_vae(options.vae) if options.vae else AutoencoderKL(**SD_VAE)
    except ValueError as error:
        raise ValueError(f"--vae {error}") from error
    vae.eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "latents"
        manifest = random_latents(folder, options.count, options.resolution, vae)
        readers = ways(folder, manifest, source, vae)
        speeds: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(options.rounds):
            random = np.random.default_rng(turn)
            order, mirrored = random.permutation(options.count), random.random(options.count) < 0.5
            for name, read in readers.items():
                count = options.encoded if name == "encode on the fly" else options.count
                start = time.perf_counter()
                for index, flipped in zip(order[:count].tolist(), mirrored[:count].tolist(), strict=True):
                    read(index, flipped)
                speeds[name].append(count / (time.perf_counter() - start))
        stored = store_pictures(Path(place), source, min(options.count, MAX_PICTURES), options.resolution)
        pictures = picture_speeds(stored, options.rounds)
    print(f"{options.count} images of {options.resolution} x {options.resolution}, latents {manifest.shape}, float32")
    print_table({name: statistics.median(values) for name, values in speeds.items()})
    print(f"\n{stored['parquet'].size} pictures of {options.resolution} x {options.resolution}, JPEG")
    print_table(pictures)


if __name__ == "__main__":
    main(sys.argv[1:])
