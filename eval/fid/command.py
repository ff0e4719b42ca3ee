"""What `evaluate_fid` does after it has read its options: score images or models, print, write the report."""

import argparse
import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from d_emo.common.files import check_apart, check_writable, read_json
from d_emo.common.locks import output_folder
from d_emo.common.packaged import is_packaged
from d_emo.common.processes import keep_freed_memory, loader_processes, start_processes
from d_emo.eval.fid import archives
from d_emo.eval.fid.averages import apply_average
from d_emo.eval.fid.by_class import check_classes
from d_emo.eval.fid.evaluation import Evaluator
from d_emo.eval.fid.extractors import FeatureExtractor, make_extractor
from d_emo.eval.fid.image_sets import ImageSet, open_set, with_classes
from d_emo.eval.fid.protocol import (
    PUBLISHED_400K,
    SD_LATENTS,
    SamplingSettings,
    describe_settings,
    with_settings,
)
from d_emo.eval.fid.references import check_reference, default_cache, load_reference
from d_emo.eval.fid.report import Entry, plot_curve, write_report
from d_emo.eval.fid.sampling import apply_settings, image_shape, load_pipeline, open_guide
from d_emo.eval.fid.scoring import all_features, format_scores, show
from d_emo.eval.fid.sweep import (
    SWEEP_PLOT,
    best_point,
    check_points,
    make_points,
    parse_sweep,
    run_sweep,
    sweep_table,
)
from d_emo.pipelines import DEMOPipeline
from d_emo.schedulers.flow_paths import path_of

# Settings that the command line may change in a preset: all of them.
SETTINGS = tuple(field.name for field in fields(SamplingSettings))
# What SiT's published scores were trained with; other flows have none.
SIT_PUBLISHED = {"flow_path": "linear", "prediction": "velocity", "time_shift": 1.0}
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# A process may wait that long for the others; the default of some backends is minutes.
PATIENCE = timedelta(days=7)


def run(options: argparse.Namespace) -> None:
    """Evaluate and print."""
    accelerator = start_processes(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
    evaluate(options, accelerator)
    accelerator.end_training()


def evaluate(options: argparse.Namespace, accelerator: Accelerator) -> None:
    """Score what the options name, print the scores, write the report."""
    on_cpu = accelerator.device.type == "cpu"
    if on_cpu:
        keep_freed_memory()
    options.num_workers = loader_processes(options.num_workers, 0 if on_cpu else 4)
    check_options(options)
    with accelerator.local_main_process_first():  # one download
        extractors = [
            make_extractor(name, options.inception_weights, not options.unverified_inception)
            for name in options.features
        ]
    for extractor in extractors:
        extractor.to(accelerator.device)
    score = score_images if options.samples else score_swept if options.sweep else score_models
    with contextlib.ExitStack() as locks:
        outcome = score(options, accelerator, extractors, locks)
        if accelerator.is_main_process:
            finish(options, outcome)


def check_options(options: argparse.Namespace) -> None:
    """Find out before hours of work what would end them.

    Raises:
        ValueError: there is no such reference, features are named twice, a sweep cannot be read, or what is made could
            not be written.
    """
    check_reference(options.reference)
    if len(set(options.features)) < len(options.features):
        raise ValueError(f"--features {' '.join(options.features)}: one is named twice; name each once.")
    if options.sweep:
        parse_sweep(options.sweep)
        if "fid" not in options.metrics:
            raise ValueError(f"--metrics {' '.join(options.metrics)}: --sweep compares points by fid; add it.")
    if options.inception_weights and not Path(options.inception_weights).is_file():
        raise ValueError(f"--inception-weights {options.inception_weights}: there is no such file.")
    check_writable(cache_dir(options), "--cache-dir", folder=True)
    if options.output_dir:
        check_writable(Path(options.output_dir), "--output-dir", folder=True)
        check_apart(Path(options.output_dir), "--output-dir", {"--reference": options.reference})
    if options.export_npz:
        target = Path(options.export_npz)
        check_writable(target, "--export-npz")
        for name in ("samples", "reference"):
            source = Path(getattr(options, name) or "")
            if target.exists() and source.exists() and target.samefile(source):
                raise ValueError(f"--export-npz {target} is --{name}, which it would overwrite; name another file.")


def cache_dir(options: argparse.Namespace) -> Path:
    """Where features of references are kept."""
    return Path(options.cache_dir) if options.cache_dir else default_cache()


def lock_folder(folder: Path, accelerator: Accelerator, locks: contextlib.ExitStack) -> None:
    """Make the folder of the report and keep other evaluations out of it.

    Raises:
        LockedError: one is in it.
        ValueError: a file lies there, or nothing may be written there.
    """
    if accelerator.is_main_process:
        locks.enter_context(output_folder(folder))
    accelerator.wait_for_everyone()


@dataclass(frozen=True)
class Outcome:
    """What was scored.

    Attributes:
        entries: in the order of the report.
        folder: of the report.
        sweep: what was swept before, as a table.
    """

    entries: list[Entry]
    folder: Path
    sweep: str | None = None


def score_images(
    options: argparse.Namespace,
    accelerator: Accelerator,
    extractors: Sequence[FeatureExtractor],
    locks: contextlib.ExitStack,
) -> Outcome:
    """Score images that exist."""
    try:
        images = open_set(options.samples, image_column=options.image_column)
        if options.by_class:
            images = with_classes(images, options.samples, options.label_column)
        images = images.first(options.num_images)
        if options.by_class and images.labels is None:
            raise ValueError(f"{options.samples}: the classes are not known, which --by-class needs; leave it out.")
    except ValueError as error:
        raise ValueError(f"--samples {error}") from error
    folder = Path(options.output_dir or f"evaluation/{images.name}")
    lock_folder(folder, accelerator, locks)
    evaluator = make_evaluator(options, accelerator, extractors, images.shape[1:3], images.shape[3])
    entries = [Entry(images.name, None, evaluator.score_images(images, folder), folder)]
    if options.export_npz:
        export(options, accelerator, images)
    return Outcome(entries, folder)


def make_evaluator(
    options: argparse.Namespace,
    accelerator: Accelerator,
    extractors: Sequence[FeatureExtractor],
    size: tuple[int, int],
    channels: int,
    num_classes: int | None = None,
) -> Evaluator:
    """Load the references first, in case one fails."""
    references = [
        load_reference(
            options.reference,
            extractor,
            cache_dir(options),
            accelerator,
            size=size,
            channels=channels,
            count=options.reference_images,
            image_column=options.image_column,
            label_column=options.label_column if options.by_class else None,
            batch_size=options.feature_batch_size,
            num_workers=options.num_workers,
        )
        for extractor in extractors
    ]
    if options.by_class:
        check_classes(references[0], num_classes)
    return Evaluator(
        reference=references[0],
        extractor=extractors[0],
        accelerator=accelerator,
        metrics=options.metrics,
        batch_size=options.batch_size,
        feature_batch_size=options.feature_batch_size,
        num_workers=options.num_workers,
        others=list(zip(references[1:], extractors[1:], strict=True)),
        confidence=options.confidence,
        by_class=options.by_class,
    )


def score_models(
    options: argparse.Namespace,
    accelerator: Accelerator,
    extractors: Sequence[FeatureExtractor],
    locks: contextlib.ExitStack,
) -> Outcome:
    """Draw from each model and score it."""
    models = find_models(options.model, options.checkpoints)
    evaluator: Evaluator | None = None
    entries: list[Entry] = []
    folder, guide = Path(), None
    for model, step in models:
        preset, settings, pipeline = prepare(model, options)
        if evaluator is None:
            guide = open_guide(pipeline, settings)
            folder = output_dir(options, preset)
            lock_folder(folder, accelerator, locks)
        target = folder if step is None else folder / f"step-{step:07d}"
        evaluator = evaluator or evaluator_of(options, accelerator, extractors, pipeline, guide)
        entries.append(score_one(options, evaluator, pipeline, settings, preset, str(model), step, target))
    return Outcome(entries, folder)


def evaluator_of(
    options: argparse.Namespace,
    accelerator: Accelerator,
    extractors: Sequence[FeatureExtractor],
    pipeline: DEMOPipeline,
    guide: DEMOPipeline | None,
) -> Evaluator:
    """The evaluator of what a pipeline draws, steered away from a weaker one where there is one."""
    height, width, channels = image_shape(pipeline)
    num_classes = pipeline.transformer.config.num_classes
    evaluator = make_evaluator(options, accelerator, extractors, (height, width), channels, num_classes)
    return replace(evaluator, guide=guide and guide.to(accelerator.device))


def score_one(
    options: argparse.Namespace,
    evaluator: Evaluator,
    pipeline: DEMOPipeline,
    settings: SamplingSettings,
    preset: str,
    name: str,
    step: int | None,
    target: Path,
) -> Entry:
    """Draw what settings say into a folder, score it, print the scores."""
    main = evaluator.accelerator.is_main_process
    if main:
        print(f"{name}, preset {preset}: {describe_settings(settings)}; to {target}", flush=True)
    pipeline.to(evaluator.accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    scores = evaluator.score_pipeline(pipeline, settings, preset, target)
    if main:
        print(f"{name}\n{format_scores(scores)}", flush=True)
    if options.export_npz:
        export(options, evaluator.accelerator, open_set(str(target)))
    return Entry(name, step, scores, target)


def score_swept(
    options: argparse.Namespace,
    accelerator: Accelerator,
    extractors: Sequence[FeatureExtractor],
    locks: contextlib.ExitStack,
) -> Outcome:
    """Score every point of a sweep on a small set, and the best one on the full set."""
    preset, settings, pipeline = prepare(options.model, options)
    points = make_points(parse_sweep(options.sweep), settings, options.sweep_images)
    folder = output_dir(options, preset)
    guide = open_guide(pipeline, settings)
    check_points(points, settings.num_images, pipeline, options.model, folder, guide)
    lock_folder(folder, accelerator, locks)
    evaluator = evaluator_of(options, accelerator, extractors, pipeline, guide)
    if accelerator.is_main_process:
        print(f"{options.model}, preset {preset}: {describe_settings(settings)}; {len(points)} points", flush=True)
    pipeline.to(accelerator.device)
    pipeline.set_progress_bar_config(disable=True)
    results = run_sweep(points, evaluator, pipeline, options.model, preset, folder)
    best, table = best_point(results).point, sweep_table(results, extractors[0].name)
    if accelerator.is_main_process:
        print(f"{table}\nbest: {best.label}; the full set follows", flush=True)
    full = replace(best.settings, num_images=settings.num_images)
    apply_average(pipeline, options.model, full)
    name = f"{options.model}, {best.label}"
    entry = score_one(options, evaluator, pipeline, full, preset, name, None, folder / best.label)
    return Outcome([entry], folder, table)


def find_models(model: str, checkpoints: str | None) -> list[tuple[str, int | None]]:
    """The pipelines to score with their steps: one, or the checkpoints of a run.

    Raises:
        ValueError: the run has no such checkpoints.
    """
    if checkpoints is None:
        return [(model, None)]
    steps = {}
    for path in sorted(Path(model).glob("checkpoint-*")):
        match = CHECKPOINT.fullmatch(path.name)
        if match and (path / "model_index.json").is_file():
            steps[int(match.group(1))] = str(path)
    if checkpoints == "all":
        wanted = sorted(steps)
    else:
        try:
            wanted = [int(step) for step in checkpoints.split(",")]
        except ValueError:
            raise ValueError(f'--checkpoints {checkpoints}: "all", or steps such as 100000,200000.') from None
    missing = [step for step in wanted if step not in steps]
    if missing or not wanted:
        held = ", ".join(map(str, sorted(steps))) or "none"
        raise ValueError(f"--checkpoints {checkpoints}: {model} has checkpoints of steps {held}.")
    return [(steps[step], step) for step in wanted]


def prepare(model: str, options: argparse.Namespace) -> tuple[str, SamplingSettings, DEMOPipeline]:
    """Preset, settings and pipeline of a model; mistakes are found before anything is computed."""
    pipeline = load_pipeline(model, options.dtype or SamplingSettings.dtype)
    preset = options.preset or ("dit-400k" if path_of(pipeline.transformer.config) is None else "sit-sde")
    settings = with_settings(preset, {name: getattr(options, name) for name in SETTINGS})
    space = pipeline.latent_space
    if space is None:
        if options.vae:
            raise ValueError(f"--vae {options.vae}: {model} draws pixels and has no decoder; leave --vae out.")
        settings = replace(settings, vae=None)
    elif options.vae is None and space.differences(SD_LATENTS):
        settings = replace(settings, vae=None)  # the preset's decoder is of other latents; the scores say what changed
    apply_settings(pipeline, model, settings)
    apply_average(pipeline, model, settings)
    return preset, settings, pipeline


def output_dir(options: argparse.Namespace, preset: str) -> Path:
    """--output-dir, or evaluation/PRESET in the model's own folder, or under the working folder for other models."""
    if options.output_dir:
        return Path(options.output_dir)
    model = Path(options.model)
    own = model.is_dir() and not is_packaged(options.model)
    return model / "evaluation" / preset if own else Path("evaluation") / f"{model.name}-{preset}"


def export(options: argparse.Namespace, accelerator: Accelerator, images: ImageSet) -> None:
    """Write the samples as ADM's evaluator reads them."""
    if not accelerator.is_main_process:
        return
    count, height, width, _ = images.shape
    blocks = (images.read(start, min(start + 256, count)) for start in range(0, count, 256))
    archives.write_images(Path(options.export_npz), blocks, (count, height, width, 3))
    print(f"samples for ADM's evaluator in {options.export_npz}")


def finish(options: argparse.Namespace, outcome: Outcome) -> None:
    """Print the last scores or the table over training, write curve and report."""
    entries, folder = outcome.entries, outcome.folder
    curve = sweep = None
    if entries[-1].step is not None:
        curve = folder / "fid.png"
        name, published = published_figure(options.model, entries[-1])
        plot_curve(curve, entries, published, name)
        print(curve_table(entries, name, published))
    elif options.samples:
        print(f"{entries[-1].name}\n{format_scores(entries[-1].scores)}")
    if outcome.sweep is not None:
        sweep = folder / SWEEP_PLOT, outcome.sweep
    write_report(folder / "report.html", f"{options.model or options.samples}", entries, curve, sweep)
    print(f"scores, pictures and report.html in {folder}")


def published_figure(run: str, entry: Entry) -> tuple[str, float | None]:
    """The run's model name, and the FID published for it at 400K steps where the reference is ADM's ImageNet."""
    path = Path(run) / "run.json"
    settings: dict[str, Any] = read_json(path, "it is the run's; restore it") if path.is_file() else {}
    if settings.get("init_from") or any(settings.get(key, value) != value for key, value in SIT_PUBLISHED.items()):
        return Path(run).name, None
    name = settings.get("model", Path(run).name)
    objective = {"dit": "epsilon", "sit": "flow_prediction"}.get(settings.get("objective", ""), "")
    imagenet = entry.scores.conditions["reference"]["statistics"] == "of the file"
    return name, PUBLISHED_400K.get((name, objective)) if imagenet else None


def curve_table(entries: list[Entry], name: str, published: float | None) -> str:
    """Scores by step, as a table; those of more features than one under the features' names."""
    parts = all_features(entries[-1].scores)
    columns = [
        (place, metric) for place, part in enumerate(parts) for metric in part.values if not metric.endswith("_std")
    ]
    heads = [f"{metric} ({parts[place].features})" if len(parts) > 1 else metric for place, metric in columns]
    lines = [f"| step | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for entry in entries:
        scores = all_features(entry.scores)
        cells = " | ".join(show(metric, scores[place].values[metric]) for place, metric in columns)
        lines.append(f"| {entry.step:,} | {cells} |")
    if published is not None:
        lines.append(f"published for {name} at 400K steps: FID-50K {published}")
    return "\n".join(lines)
