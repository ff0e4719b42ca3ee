"""Features of a set of images: computed once by all processes, kept on the disk, read again in seconds.

A store is a folder named by a hash of images and extractor, with files of `SHARD_SIZE` images' features that appear
whole or not at all; a killed run goes on where it stopped. Files have checksums (a zip archive's CRC-32), and damaged
ones are made again. One run at a time works on a store; another one waits, and finds it made.
"""

import contextlib
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from d_emo.common import checks
from d_emo.common.files import make_folder, remove, remove_partial
from d_emo.common.locks import FolderLock
from d_emo.common.output import Progress, say
from d_emo.common.processes import leave_interrupts
from d_emo.common.shards import ShardFolder
from d_emo.eval.fid import archives
from d_emo.eval.fid.extractors import FeatureExtractor
from d_emo.eval.fid.image_sets import ImageSet
from d_emo.eval.fid.metrics import Moments, MomentSums

SHARD_SIZE = 500


class FeatureStore:
    """Features of all images of a set, on the disk.

    Args:
        folder: holds the shards.
        images: their set.
        layers: what is stored of each image.
    """

    def __init__(self, folder: Path, images: ImageSet, layers: tuple[str, ...]):
        self.folder = folder
        self.images = images
        self.layers = layers
        self.files = ShardFolder(folder, "features-{:08d}.npz", len(images), SHARD_SIZE)
        self.shards = self.files.ranges

    def read(self, shard: range, layer: str) -> np.ndarray:
        """Features of one shard, (n, D) float32.

        Raises:
            ValueError: the file is damaged, or holds NaN.
        """
        path = self.files.path(shard)
        features = archives.read_array(path, layer)
        if features.ndim != 2 or len(features) != len(shard) or features.dtype != np.float32:
            raise ValueError(
                f"{path} holds {features.dtype} {features.shape} as {layer!r}, not {len(shard)} rows of float32; "
                "run again, which makes it anew."
            )
        bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
        if len(bad):
            raise ValueError(
                f"{self.images.name}: features of image {shard.start + bad[0]} ({layer}) are NaN or infinite, and of "
                f"{len(bad) - 1} more of its {len(shard)} neighbours; check the image, or the extractor's weights."
            )
        return features

    def check(self, shard: range) -> None:
        """Read a shard whole.

        Raises:
            ValueError: its file is not as it was written, or holds NaN.
        """
        for layer in self.layers:
            self.read(shard, layer)

    def load(self, layer: str, indices: np.ndarray | None = None) -> np.ndarray:
        """Features (N, D) float32 of all images, or of some in the order given."""
        if indices is None:
            return np.concatenate([self.read(shard, layer) for shard in self.shards])
        rows: list[np.ndarray] = []
        places: list[np.ndarray] = []
        for shard in self.shards:
            inside = np.flatnonzero((indices >= shard.start) & (indices < shard.stop))
            if len(inside):
                rows.append(self.read(shard, layer)[indices[inside] - shard.start])
                places.append(inside)
        return np.concatenate(rows)[np.argsort(np.concatenate(places))]

    def moments(self, layer: str, accelerator: Accelerator) -> Moments:
        """Mean and covariance of a layer: each process sums its share in float64, the sums are added once."""
        path = self.folder / f"moments-{layer}.npz"
        with contextlib.suppress(ValueError):  # not there, or damaged
            return _read_moments(path, len(self.images))
        accelerator.wait_for_everyone()
        sums: MomentSums | None = None
        for shard in self.shards[accelerator.process_index :: accelerator.num_processes]:
            features = self.read(shard, layer)
            sums = sums or MomentSums(features.shape[1])
            sums.add(features)
        moments = _all_sums(sums, self, layer, accelerator).moments()
        if accelerator.is_main_process:
            remove(path)
            archives.write_arrays(path, count=moments.count, mean=moments.mean, covariance=moments.covariance)
        accelerator.wait_for_everyone()
        return moments


def _read_moments(path: Path, images: int) -> Moments:
    count, mean, covariance = (archives.read_array(path, name) for name in ("count", "mean", "covariance"))
    if count != images or mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(f"{path} holds no moments of {images:,} images.")
    return Moments(int(count), mean, covariance)


def _all_sums(sums: MomentSums | None, store: FeatureStore, layer: str, accelerator: Accelerator) -> MomentSums:
    """The sums over all processes."""
    if sums is None:  # more processes than shards
        sums = MomentSums(store.read(store.shards[0], layer).shape[1])
    if accelerator.num_processes == 1:
        return sums
    flat = np.concatenate([[sums.count], sums.total, sums.products.ravel()])
    summed = accelerator.reduce(torch.from_numpy(flat).to(accelerator.device), reduction="sum").cpu().numpy()
    dimension = len(sums.total)
    sums.count, sums.total = float(summed[0]), summed[1 : 1 + dimension]
    sums.products = summed[1 + dimension :].reshape(dimension, dimension)
    return sums


class _Batches(Dataset):
    """Batches of images by their place, for loader processes."""

    def __init__(self, images: ImageSet, batches: list[range]):
        self.images = images
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> torch.Tensor:
        batch = self.batches[index]
        return torch.from_numpy(self.images.read(batch.start, batch.stop)).permute(0, 3, 1, 2)


def compute_features(
    images: ImageSet,
    extractor: FeatureExtractor,
    root: Path,
    accelerator: Accelerator,
    batch_size: int = 50,
    num_workers: int = 0,
) -> FeatureStore:
    """Compute what is missing of a set's features, on all processes.

    Args:
        images: the set.
        extractor: on the accelerator's device.
        root: folder of stores; this one's name in it is a hash of images and extractor.
        accelerator: the processes; they share `root`.
        batch_size: images at once; it does not change the features, arithmetic noise aside.
        num_workers: loader processes.
    """
    checks.whole(batch_size, "batch_size")
    checks.whole(num_workers, "num_workers", least=0)
    key = hashlib.sha256(f"{images.fingerprint} {extractor.identity}".encode()).hexdigest()[:24]
    store = FeatureStore(root / key, images, extractor.layers)
    with contextlib.ExitStack() as stack:
        if accelerator.is_main_process:
            root.mkdir(parents=True, exist_ok=True)
            if not store.folder.is_dir() or store.folder.is_symlink():
                remove(store.folder)
            make_folder(store.folder)
            stack.enter_context(FolderLock(store.folder, wait=True))
            remove_partial(store.folder)
        accelerator.wait_for_everyone()
        for reason in store.files.discard_damaged(store.check, accelerator.process_index, accelerator.num_processes):
            say(f"computed again: {reason}")
        accelerator.wait_for_everyone()
        _compute_missing(store, extractor, accelerator, batch_size, num_workers)
        accelerator.wait_for_everyone()
    return store


def _compute_missing(
    store: FeatureStore, extractor: FeatureExtractor, accelerator: Accelerator, batch_size: int, num_workers: int
) -> None:
    images, missing = store.images, store.files.missing()
    accelerator.wait_for_everyone()  # everyone has seen what is missing before anyone adds to it
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    started = time.perf_counter()
    done = len(images) - sum(map(len, missing))
    description = f"{extractor.name} features of {images.name}"
    shown = bool(missing) and accelerator.is_main_process
    with Progress(len(images), "image", description, done=done, shown=shown) as progress:
        batches = _feature_batches(images, extractor, mine, batch_size, num_workers)
        for shard in mine:
            parts: list[dict[str, torch.Tensor]] = []
            while sum(len(part["pool"]) for part in parts) < len(shard):
                parts.append(next(batches))
                # The other processes are about as far.
                progress.update(len(parts[-1]["pool"]) * accelerator.num_processes)
            arrays = {layer: torch.cat([part[layer] for part in parts]).numpy() for layer in extractor.layers}
            archives.write_arrays(store.files.path(shard), **arrays)
    if missing and accelerator.is_main_process:
        count = sum(map(len, missing))
        say(f"{description}: {count:,} images, about {count / (time.perf_counter() - started):.1f} images/s")


def _feature_batches(
    images: ImageSet, extractor: FeatureExtractor, shards: list[range], batch_size: int, num_workers: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Features by layer of batches that lie within the shards, in their order."""
    batches = [
        range(start, min(start + batch_size, shard.stop))
        for shard in shards
        for start in range(shard.start, shard.stop, batch_size)
    ]
    for batch in DataLoader(
        _Batches(images, batches), batch_size=None, num_workers=num_workers, worker_init_fn=leave_interrupts
    ):
        yield extractor(batch)
