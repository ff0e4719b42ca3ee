"""One evaluation from end to end: draw, compute features, score, report. The command and the trainer both run this."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator

from d_emo.common.figures import caption_grid, save_image
from d_emo.common.files import make_folder, write_json
from d_emo.common.shards import read_manifest
from d_emo.eval.fid.by_class import as_table, class_distances
from d_emo.eval.fid.extractors import FeatureExtractor
from d_emo.eval.fid.features import FeatureStore, compute_features
from d_emo.eval.fid.image_sets import ImageSet
from d_emo.eval.fid.names import METRICS
from d_emo.eval.fid.protocol import SamplingSettings
from d_emo.eval.fid.references import Reference
from d_emo.eval.fid.sampling import sample_images
from d_emo.eval.fid.scoring import Scores, as_json, compute_scores, describe_conditions, why_not_comparable
from d_emo.pipelines import DEMOPipeline

SCORES_FILE, GRID_FILE, NEIGHBOURS_FILE = "scores.json", "samples.png", "neighbours.png"
FEATURES_FOLDER = "features"
GRID_CLASSES, GRID_COLUMNS, NEIGHBOUR_COLUMNS = 10, 8, 10
# Larger pictures are shown smaller, so that a report stays a few megabytes.
MAX_SHOWN_SIDE = 128
# Layers besides the pooled one that metrics are of.
LAYERS = {"sfid": "spatial", "is": "logits"}


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """What stays the same from one evaluation to the next.

    Attributes:
        reference: what samples are compared with.
        extractor: of the features, on the accelerator's device.
        accelerator: the processes.
        metrics: names from `METRICS`.
        batch_size: images drawn at once by a process.
        feature_batch_size, num_workers: of the features' computation.
        others: more references, each with the features that it was computed with; scored beside the first.
        confidence: whether to give distances their 95% intervals.
        by_class: whether to give the distance of each class, too.
        guide: the weaker pipeline that settings name, if they do.
    """

    reference: Reference
    extractor: FeatureExtractor
    accelerator: Accelerator
    metrics: Sequence[str] = METRICS
    batch_size: int = 32
    feature_batch_size: int = 50
    num_workers: int = 0
    others: Sequence[tuple[Reference, FeatureExtractor]] = ()
    confidence: bool = False
    by_class: bool = False
    guide: DEMOPipeline | None = None

    def score_pipeline(
        self, pipeline: DEMOPipeline, settings: SamplingSettings, preset: str | None, folder: Path
    ) -> Scores:
        """Draw samples into `folder` and score them; every process calls this.

        Raises:
            ManifestError: the folder holds other samples.
            ValueError: what `sample_images` and `compute_scores` raise.
        """
        images = sample_images(pipeline, settings, folder, self.accelerator, self.batch_size, self.guide)
        return self.score_images(images, folder, pipeline=pipeline, settings=settings, preset=preset)

    def score_images(
        self,
        images: ImageSet,
        folder: Path,
        *,
        pipeline: DEMOPipeline | None = None,
        settings: SamplingSettings | None = None,
        preset: str | None = None,
    ) -> Scores:
        """Score images, and write scores, a grid and nearest neighbours into `folder`; every process calls this.

        Args:
            images: the samples.
            folder: gets `features/`, `scores.json`, `samples.png` and `neighbours.png`.
            pipeline, settings, preset: how they were drawn, where that is known.
        """
        if self.accelerator.is_main_process:
            make_folder(folder / FEATURES_FOLDER)
        stores, parts = [], []
        for reference, extractor in ((self.reference, self.extractor), *self.others):
            store, scores = self._score_by(reference, extractor, images, folder, pipeline)
            num_classes = pipeline.transformer.config.num_classes if pipeline else None
            drawn = read_manifest(folder, "sample again") if settings else None
            scores.conditions = describe_conditions(store, reference, extractor, drawn, settings, preset)
            scores.not_comparable = why_not_comparable(store, reference, extractor, settings, preset, num_classes)
            if settings is None:
                scores.notes.append("how the samples were drawn is not known here")
            stores.append(store)
            parts.append(scores)
        first, first.others = parts[0], parts[1:]
        if self.accelerator.is_main_process:
            names = pipeline.id2label if pipeline else {}
            save_image(sample_grid(images, names), folder / GRID_FILE)
            neighbours = neighbour_grid(stores[0], self.reference)
            if neighbours is not None:
                save_image(neighbours, folder / NEIGHBOURS_FILE)
            write_json(folder / SCORES_FILE, as_json(first))
        self.accelerator.wait_for_everyone()
        return first

    def _score_by(
        self,
        reference: Reference,
        extractor: FeatureExtractor,
        images: ImageSet,
        folder: Path,
        pipeline: DEMOPipeline | None,
    ) -> tuple[FeatureStore, Scores]:
        """The features of the samples by one extractor, and what they score."""
        root = folder / FEATURES_FOLDER
        store = compute_features(images, extractor, root, self.accelerator, self.feature_batch_size, self.num_workers)
        # Beside the first features, what others have no layer for is not worth a line.
        lacking = {metric for metric, layer in LAYERS.items() if layer not in extractor.layers}
        wanted = tuple(m for m in self.metrics if extractor is self.extractor or m not in lacking)
        scores = compute_scores(store, reference, extractor, wanted, self.accelerator, self.confidence)
        if self.by_class and self.accelerator.is_main_process:
            found = class_distances(store, reference, pipeline.id2label if pipeline else {})
            scores.by_class = as_table(found, len(reference.moments["pool"].mean))
        return store, scores


def sample_grid(images: ImageSet, names: dict[int, str]) -> PIL.Image.Image:
    """Rows of samples, one class a row where classes are known; at most ten rows of eight."""
    labels = np.zeros(len(images), dtype=np.int64) if images.labels is None else images.labels
    present = np.unique(labels)
    if len(present) == 1:
        # No classes: the first images, in rows.
        chosen = np.arange(min(len(images), GRID_CLASSES * GRID_COLUMNS))
        groups = np.array_split(chosen, max(1, -(-len(chosen) // GRID_COLUMNS)))
        captions = ["samples"] + [""] * (len(groups) - 1)
    else:
        shown = present[np.unique(np.linspace(0, len(present) - 1, GRID_CLASSES).astype(int))]
        groups = [np.flatnonzero(labels == label)[:GRID_COLUMNS] for label in shown]
        captions = [names.get(int(label), f"class {label}") for label in shown]
    return caption_grid([[_picture(images, index) for index in group] for group in groups], captions)


def neighbour_grid(samples: FeatureStore, reference: Reference) -> PIL.Image.Image | None:
    """Two rows: the first samples, and below each the reference image whose features are nearest to its own."""
    if reference.store is None or reference.images is None:
        return None
    indices = reference.manifold_indices()
    shown = np.arange(min(NEIGHBOUR_COLUMNS, len(samples.images)))
    drawn = torch.from_numpy(samples.load("pool", shown)).double()
    real = torch.from_numpy(reference.store.load("pool", indices)).double()
    nearest = indices[torch.cdist(drawn, real).argmin(dim=1).numpy()]
    rows = [[_picture(samples.images, i) for i in shown], [_picture(reference.images, i) for i in nearest]]
    side = rows[0][0].size
    rows[1] = [picture.resize(side) for picture in rows[1]]
    return caption_grid(rows, ["samples", "nearest images of the reference"])


def _picture(images: ImageSet, index: Any) -> PIL.Image.Image:
    pixels = images.read(int(index), int(index) + 1)[0]
    picture = PIL.Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.thumbnail((MAX_SHOWN_SIDE, MAX_SHOWN_SIDE))
    return picture
