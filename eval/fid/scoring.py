"""From features to scores with their conditions: what was computed, what was left out, what it compares with."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from d_emo.common import checks
from d_emo.common.files import read_json
from d_emo.common.versions import installed_versions
from d_emo.eval.fid import metrics
from d_emo.eval.fid.by_class import table_lines
from d_emo.eval.fid.confidence import LEAST_SAMPLES, frechet_interval
from d_emo.eval.fid.extractors import FD_DINOV2, INCEPTION, FeatureExtractor
from d_emo.eval.fid.features import FeatureStore
from d_emo.eval.fid.protocol import (
    ADM_STATISTICS,
    PUBLICATIONS,
    PUBLISHED_COUNT,
    SamplingSettings,
    describe_settings,
    preset_changes,
)
from d_emo.eval.fid.references import OF_THE_FILE, Reference

# Names as people know them. With other features than Inception's the distance is not called FID.
TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "is": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
}
IMAGENET_CLASSES = 1000
# Sizes with published scores, for images of which no more is known.
IMAGENET_SIDES = (256, 512)
# The layers that Frechet distances are of.
FRECHET_LAYERS = {"fid": "pool", "sfid": "spatial"}


@dataclass
class Scores:
    """Scores of one set of samples.

    Attributes:
        values: by metric; `is_std` and `kid_std` are spreads over chunks and subsets.
        left_out: metric -> why it was not computed.
        not_comparable: why the scores do not compare with published ones; empty if they do.
        notes: what else a reader should know.
        conditions: everything that moves the scores, ready for JSON.
        intervals: of distances, their 95% intervals, where they were asked for.
        by_class: what `by_class.as_table` keeps, where it was asked for.
        others: scores of the same samples by other features.
    """

    values: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    not_comparable: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    conditions: dict[str, Any] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    by_class: dict[str, Any] = field(default_factory=dict)
    others: list["Scores"] = field(default_factory=list)

    @property
    def features(self) -> str:
        """Name of the features."""
        return self.conditions["features"]["name"]

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.conditions["samples"]["shape"][0]


def show(metric: str, value: float) -> str:
    """A score for people: KID, which is small, with six decimals."""
    return f"{value:.6f}" if metric == "kid" else f"{value:.4f}"


def title(metric: str, extractor: str, count: int) -> str:
    """What to call a metric: "FID-5K" for 5,000 images, "Frechet distance (pixels)" for other features."""
    if extractor == FD_DINOV2 and metric == "fid":
        return "FD-DINOv2"
    if extractor != INCEPTION:
        other = {"fid": "Frechet distance", "kid": "kernel distance"}
        return f"{other.get(metric, TITLES[metric])} ({extractor})"
    if metric in ("fid", "sfid"):
        short = f"{count // 1000}K" if count % 1000 == 0 else f"{count:,}"
        return f"{TITLES[metric]}-{short}"
    return TITLES[metric]


def compute_scores(
    samples: FeatureStore,
    reference: Reference,
    extractor: FeatureExtractor,
    wanted: tuple[str, ...],
    accelerator: Accelerator,
    confidence: bool = False,
) -> Scores:
    """Compute the metrics wanted; every process calls this, the main one's answer is complete.

    `confidence` also gives the distances' 95% intervals, which take twenty times as long as the distances.

    Raises:
        ValueError: features do not fit each other, hold NaN, or are too few.
    """
    scores = Scores(notes=[f"samples: {note}" for note in samples.images.notes])
    scores.notes += [f"reference: {note}" for note in reference.notes]
    for metric, layer in FRECHET_LAYERS.items():
        if metric not in wanted:
            continue
        if layer not in extractor.layers or layer not in reference.moments:
            scores.left_out[metric] = (
                f"{extractor.name} features have no spatial layer"
                if layer not in extractor.layers
                else "the reference holds no statistics of the spatial layer (mu_s, sigma_s)"
            )
            continue
        moments = samples.moments(layer, accelerator)
        scores.notes += _rank_notes(metric, moments, reference.moments[layer])
        if accelerator.is_main_process:
            scores.values[metric] = metrics.frechet_distance(reference.moments[layer], moments)
            if confidence:
                _add_interval(scores, metric, samples, reference)
    if accelerator.is_main_process:
        _score_features(scores, samples, reference, extractor, wanted, accelerator)
    accelerator.wait_for_everyone()
    return scores


def _add_interval(scores: Scores, metric: str, samples: FeatureStore, reference: Reference) -> None:
    """The interval of a distance, or why there is none."""
    layer, count = FRECHET_LAYERS[metric], len(samples.images)
    if count < LEAST_SAMPLES:
        scores.notes.append(f"{metric}: {count} samples are too few for an interval; {LEAST_SAMPLES} are the least")
        return
    scores.intervals[metric] = frechet_interval(
        lambda indices: samples.load(layer, indices), count, reference.moments[layer], f"interval of {metric}"
    )


def _rank_notes(metric: str, samples: metrics.Moments, reference: metrics.Moments) -> list[str]:
    dimension = len(samples.mean)
    return [
        f"{metric}: {moments.count:,} {side} images span at most {moments.count - 1:,} of {dimension:,} dimensions; "
        "the covariance lacks full rank and the distance is biased upwards"
        for side, moments in (("sample", samples), ("reference", reference))
        if 0 < moments.count <= dimension
    ]


def _score_features(
    scores: Scores,
    samples: FeatureStore,
    reference: Reference,
    extractor: FeatureExtractor,
    wanted: tuple[str, ...],
    accelerator: Accelerator,
) -> None:
    """The metrics that need the features themselves."""
    if "is" in wanted:
        if "logits" in extractor.layers:
            scores.values["is"], scores.values["is_std"] = metrics.inception_score(samples.load("logits"))
        else:
            scores.left_out["is"] = f"{extractor.name} features have no class probabilities"
    pairs = [name for name in ("precision-recall", "kid") if name in wanted]
    if not pairs:
        return
    if reference.store is None:
        scores.left_out.update(dict.fromkeys(pairs, "the reference holds statistics but no images"))
        return
    real = reference.store.load("pool", reference.manifold_indices())
    drawn = samples.load("pool")
    if len(real) < len(reference.store.images):
        scores.notes.append(
            f"precision, recall and KID: {len(real):,} of {len(reference.store.images):,} reference images, a fixed "
            "choice"
        )
    if "precision-recall" in pairs:
        precision, recall = metrics.precision_recall(real, drawn, accelerator.device)
        scores.values.update(precision=precision, recall=recall)
    if "kid" in pairs:
        mean, std, size = metrics.kernel_distance(real, drawn)
        scores.values.update(kid=mean, kid_std=std)
        if size < metrics.KID_SUBSET_SIZE:
            scores.notes.append(f"KID over subsets of {size} images, the smaller set's size")


def describe_conditions(
    samples: FeatureStore,
    reference: Reference,
    extractor: FeatureExtractor,
    drawn: dict[str, Any] | None,
    settings: SamplingSettings | None,
    preset: str | None,
) -> dict[str, Any]:
    """Everything that moves the scores, ready for JSON; `drawn` is the samples' manifest, if this package drew them."""
    return {
        "samples": {
            "name": samples.images.name,
            "shape": list(samples.images.shape),
            "hash": samples.images.fingerprint,
        },
        "protocol": f"preset {preset}: {describe_settings(settings)}" if settings else "drawn by others",
        "preset": preset,
        "drawn": drawn,
        "reference": reference.as_json(),
        "features": {"name": extractor.name, "identity": extractor.identity},
        "definitions": {
            "inception_score_chunk": metrics.IS_CHUNK,
            "precision_recall_neighbours": metrics.NEIGHBOURS,
            "kid_subsets": metrics.KID_SUBSETS,
        },
        "versions": installed_versions("torch", "torch-fidelity", "numpy"),
    }


def why_not_comparable(
    samples: FeatureStore,
    reference: Reference,
    extractor: FeatureExtractor,
    settings: SamplingSettings | None,
    preset: str | None,
    num_classes: int | None,
) -> list[str]:
    """Every reason why the scores are no numbers to put beside published ones for ImageNet."""
    reasons = []
    count, height, width, _ = samples.images.shape
    if count != PUBLISHED_COUNT:
        reasons.append(f"{count:,} images, not {PUBLISHED_COUNT:,}")
    if preset == "quick":
        reasons.append("the quick preset is for curves within a run")
    if settings is not None and preset is not None:
        reasons += [f"preset {preset} was changed ({change})" for change in preset_changes(settings, preset)]
    if settings is not None and num_classes != IMAGENET_CLASSES:
        reasons.append(f"the model has {num_classes} classes, ImageNet {IMAGENET_CLASSES:,}")
    sides = PUBLICATIONS[preset].sides if preset is not None else ()
    if (height, width) not in [(side, side) for side in sides or IMAGENET_SIDES]:
        published = " or ".join(f"{side} x {side}" for side in sides or IMAGENET_SIDES)
        reasons.append(f"images are {width} x {height}, not {published}")
    if not extractor.published:
        reasons.append(f"features are {extractor.name}, not the published Inception weights")
    side = height if height in sides else (sides or IMAGENET_SIDES)[0]
    wanted = PUBLICATIONS[preset].reference(side) if preset is not None else ADM_STATISTICS
    if wanted != ADM_STATISTICS:
        if reference.statistics != OF_THE_FILE or Path(reference.name).name != wanted:
            reasons.append(f"the reference is not {wanted}, which the scores of preset {preset} are against")
    elif not reference.adm_statistics:
        reasons.append("the reference is not ADM's file of statistics")
    return reasons


def format_scores(scores: Scores) -> str:
    """The lines that a person reads: each score, by class where that was asked for, then its conditions."""
    lines = [line for part in all_features(scores) for line in _score_lines(part)]
    lines += [f"  {name:<28} left out: {why}" for name, why in scores.left_out.items()]
    for part in all_features(scores):
        if part.by_class:
            lines.append(f"  {title('fid', part.features, part.count)} by class")
            lines += [f"    {line}" for line in table_lines(part.by_class)]
    if scores.not_comparable:
        lines.append(f"  not comparable with published figures: {'; '.join(scores.not_comparable)}")
    else:
        lines.append("  conditions as published; compatible with ADM's evaluator by construction")
    return "\n".join(lines + [f"  note: {note}" for note in all_notes(scores)])


def _score_lines(scores: Scores) -> list[str]:
    return [
        f"  {title(name, scores.features, scores.count):<28} {show_score(scores, name)}"
        for name in TITLES
        if name in scores.values
    ]


def show_score(scores: Scores, name: str) -> str:
    """A score with its spread or its interval, where it has one."""
    text = show(name, scores.values[name])
    if (spread := scores.values.get(f"{name}_std")) is not None:
        text += f" +- {show(name, spread)}"
    if name in scores.intervals:
        low, high = scores.intervals[name]
        text += f" (95%: {show(name, low)} to {show(name, high)})"
    return text


def all_features(scores: Scores) -> list[Scores]:
    """The scores by the first features, which decide, then those by others."""
    return [scores, *scores.others]


def all_notes(scores: Scores) -> list[str]:
    """What a reader should know, each note once, those of other features with their name."""
    more = [f"{other.features}: {note}" for other in scores.others for note in other.notes if note not in scores.notes]
    return scores.notes + more


def summary(scores: Scores) -> str:
    """All scores in one line, spreads aside."""
    return ", ".join(
        f"{title(name, part.features, part.count)} {show(name, value)}"
        for part in all_features(scores)
        for name, value in part.values.items()
        if not name.endswith("_std")
    )


def load_scores(path: Path) -> Scores:
    """Scores as `as_json` wrote them; files of versions that had fewer fields, too.

    Raises:
        ValueError: the file is damaged.
    """
    remedy = "delete it and score again"
    return _from_json(read_json(checks.path_named(path, "path"), remedy), f"{path} is damaged", remedy)


def _from_json(stored: dict[str, Any], wrong: str, remedy: str) -> Scores:
    kinds = {"scores": dict, "left_out": dict, "not_comparable_because": list, "notes": list, "conditions": dict}
    later: dict[str, type] = {"intervals": dict, "by_class": dict, "others": list}
    stored = {**{name: kind() for name, kind in later.items()}, **stored}
    for name, kind in {**kinds, **later}.items():
        if not isinstance(stored.get(name), kind):
            raise ValueError(f"{wrong} (there is no {name!r}); {remedy}.")
    for name, ends in stored["intervals"].items():
        if not isinstance(ends, list) or len(ends) != 2 or not all(isinstance(end, int | float) for end in ends):
            raise ValueError(f"{wrong} (the interval of {name!r} is no two numbers); {remedy}.")
    if not all(isinstance(other, dict) for other in stored["others"]):
        raise ValueError(f"{wrong} ('others' holds no scores); {remedy}.")
    values, left_out, reasons, notes, conditions = (stored[name] for name in kinds)
    intervals = {name: (low, high) for name, (low, high) in stored["intervals"].items()}
    others = [_from_json(other, wrong, remedy) for other in stored["others"]]
    return Scores(values, left_out, reasons, notes, conditions, intervals, stored["by_class"], others)


def as_json(scores: Scores) -> dict[str, Any]:
    """Scores with their conditions, ready for JSON."""
    return {
        "scores": {name: float(np.float64(value)) for name, value in scores.values.items()},
        "left_out": scores.left_out,
        "comparable_with_published": not scores.not_comparable,
        "not_comparable_because": scores.not_comparable,
        "notes": scores.notes,
        "conditions": scores.conditions,
        "intervals": {name: list(ends) for name, ends in scores.intervals.items()},
        "by_class": scores.by_class,
        "others": [as_json(other) for other in scores.others],
    }
