"""What samples are compared with: statistics of the literature, or images, whose features are computed and cached."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from d_emo.common.files import cache_folder, file_digest
from d_emo.eval.fid import archives
from d_emo.eval.fid.extractors import INCEPTION, FeatureExtractor
from d_emo.eval.fid.features import FeatureStore, compute_features
from d_emo.eval.fid.image_sets import ImageSet, check_name, open_set, with_classes
from d_emo.eval.fid.metrics import Moments

# ADM's reference images for precision and recall.
MANIFOLD_IMAGES = 10_000
MOMENT_LAYERS = ("pool", "spatial")
INCEPTION_FEATURES = 2048
OF_THE_FILE = "of the file"


@dataclass(frozen=True)
class Reference:
    """One side of a comparison.

    Attributes:
        name: where it comes from.
        moments: by layer; `spatial` for Inception only.
        images: the images whose features `store` holds; None where a file has statistics alone.
        store: features of the images.
        fingerprint: hash of the file's or the images' content.
        statistics: "of the file" or "computed from its images".
        adm_statistics: whether the moments are those of an ADM reference file.
        notes: what a reader of the scores should know.
    """

    name: str
    moments: dict[str, Moments]
    images: ImageSet | None
    store: FeatureStore | None
    fingerprint: str
    statistics: str
    adm_statistics: bool
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What it is, ready for JSON."""
        return {
            "name": self.name,
            "hash": self.fingerprint,
            "images": list(self.images.shape) if self.images else None,
            "statistics": self.statistics,
        }

    def manifold_indices(self) -> np.ndarray:
        """The images that precision, recall and KID use: all, or a fixed random choice of 10,000."""
        assert self.images is not None
        count = len(self.images)
        order = np.random.RandomState(0).permutation(count)[:MANIFOLD_IMAGES]
        return np.arange(count) if count <= MANIFOLD_IMAGES else np.sort(order)


def check_reference(source: str, option: str = "--reference") -> None:
    """Find out at once whether there is a reference at all.

    Args:
        source: its name.
        option: how the user named it.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        check_name(source)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from error


def default_cache() -> Path:
    """Where features of references are kept."""
    return cache_folder() / "features"


def load_reference(
    source: str | ImageSet,
    extractor: FeatureExtractor,
    cache: Path,
    accelerator: Accelerator,
    *,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    count: int | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    batch_size: int = 50,
    num_workers: int = 0,
) -> Reference:
    """Open a reference, computing features where there are none yet.

    Args:
        source: an .npz file of ADM (statistics, images or both) or pytorch-fid (statistics), anything that
            `open_set` opens, or a set that is open.
        extractor: of the samples' features.
        cache: folder of features.
        accelerator: the processes.
        size: (height, width) to crop and resize the images to, as ADM prepares ImageNet.
        channels: of the samples; a grey reference becomes a colour one beside colour samples, and the other way round.
        count: take so many of its images; statistics of a file stay what they are.
        image_column: column of a parquet file.
        label_column: its column of classes; given where the classes are wanted, of folders too.
        batch_size, num_workers: of the features' computation.

    Raises:
        ValueError: it holds nothing that fits the extractor; the message gives the keys or files wanted.
    """
    statistics: dict[str, Moments] = {}
    notes: list[str] = []
    images: ImageSet | None
    if not isinstance(source, ImageSet):
        check_reference(source)
    if isinstance(source, ImageSet):
        images, fingerprint = source, source.fingerprint
    elif source.endswith(".npz"):
        path = Path(source)
        fingerprint = file_digest(path)
        keys = archives.archive_keys(path)
        statistics = _file_statistics(path, keys, extractor, notes)
        images = open_set(source) if archives.IMAGES_KEY in keys else None
        if images is None and not statistics:
            wanted = (
                "mu and sigma, or arr_0" if extractor.name == INCEPTION else f"arr_0 (for {extractor.name} features)"
            )
            raise ValueError(
                f"--reference {source}: it holds {', '.join(sorted(keys)) or 'nothing'}; wanted: {wanted}."
            )
    else:
        images = open_set(source, size, image_column)
        if label_column is not None:
            images = with_classes(images, source, label_column)
        fingerprint = images.fingerprint
    store = None
    if images is not None:
        images = images.first(count).with_channels(channels)
        notes += images.notes
        store = compute_features(images, extractor, cache, accelerator, batch_size, num_workers)
    moments = dict(statistics)
    if not statistics and store is not None:
        moments = {name: store.moments(name, accelerator) for name in MOMENT_LAYERS if name in extractor.layers}
    name = source.name if isinstance(source, ImageSet) else source
    origin = OF_THE_FILE if statistics else "computed from its images"
    return Reference(name, moments, images, store, fingerprint, origin, "spatial" in statistics, tuple(notes))


def _file_statistics(path: Path, keys: set[str], extractor: FeatureExtractor, notes: list[str]) -> dict[str, Moments]:
    """The moments that a file carries; they are Inception's."""
    if not {*archives.STATISTICS_KEYS} <= keys:
        return {}
    if extractor.name != INCEPTION:
        notes.append(f"the statistics in {path.name} are Inception's and were left aside for {extractor.name} features")
        return {}
    found = {"pool": _moments(path, archives.STATISTICS_KEYS)}
    if {*archives.SPATIAL_STATISTICS_KEYS} <= keys:
        found["spatial"] = _moments(path, archives.SPATIAL_STATISTICS_KEYS)
    else:
        notes.append(
            f"{path.name} has no mu_s, sigma_s: statistics as torch-fidelity writes them, which JiT's files are, or as "
            "pytorch-fid does, whose resizing differs from ADM's (features 2% off): FID against those compares with "
            "pytorch-fid's numbers only roughly"
        )
    return found


def _moments(path: Path, keys: tuple[str, str]) -> Moments:
    stored = [archives.read_array(path, key) for key in keys]
    if not all(np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all() for array in stored):
        raise ValueError(f"{path}: {keys[0]} and {keys[1]} are no finite floating-point numbers; fetch it again.")
    mean, covariance = (array.astype(np.float64) for array in stored)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"{path}: {keys[0]} of shape {mean.shape} and {keys[1]} of shape {covariance.shape} are no mean and "
            "covariance."
        )
    if keys == archives.STATISTICS_KEYS and len(mean) != INCEPTION_FEATURES:
        raise ValueError(
            f"{path}: its statistics are of {len(mean)} features, Inception's pooled layer has {INCEPTION_FEATURES}."
        )
    return Moments(0, mean, covariance)
