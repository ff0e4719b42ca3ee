"""What `sample` does after it has read its options: check them all, draw in batches, write a picture or a folder."""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import PIL.Image
import torch

from d_emo.common.digests import weights_digest
from d_emo.common.figures import beside_grid, beside_grid_size, save_image
from d_emo.common.files import check_writable, holds_something, read_json, remove, write_json
from d_emo.common.locks import output_folder
from d_emo.common.messages import first_line, nearest
from d_emo.common.output import Progress, say
from d_emo.common.processes import device_named
from d_emo.common.shards import differences
from d_emo.common.versions import own_version
from d_emo.images.autoencoders import open_vae
from d_emo.schedulers import FlowMatchODESolverScheduler

from .checks import MAX_IMAGES, default_steps, takes_guidance
from .guidance import make_guidance
from .loading import open_pipeline, open_weaker
from .pipeline_demo import DEMOPipeline
from .samplers import image_generator, make_scheduler, own_shift

# What a folder of this command's holds besides the images: how they were made, and which is which.
RECORD = "samples.json"
# Keyword of the settings in a PNG.
KEYWORD = "d_emo"
# Images in a row of a picture, where there are as many of a class.
COLUMNS = 16
# Of a picture: Pillow warns of larger ones when it opens them.
MAX_PIXELS = 89_478_485
KINDS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
ANOTHER = "name another, or pass --overwrite"


class Plan(NamedTuple):
    """All images, in the order of their indices.

    Attributes:
        labels: a class id each; None for a model without classes.
        names: their classes' names, or ids as text; empty for a model without classes.
        settings: everything that moves them, ready for JSON.
    """

    labels: list[int | None]
    names: list[str]
    settings: dict[str, Any]


def run(options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Draw and write; `arguments` are the command line, which what is written repeats."""
    kind = picture_kind(options.output)
    check_output(options, kind)
    device = device_named(options.device)
    pipeline = open_model(options)
    guide = open_guide(pipeline, options)
    plan = make_plan(pipeline, options, guide)
    plan.settings["command"] = shlex.join(["d-emo", "sample", *arguments])
    pipeline.to(device)
    drawer = Drawer(pipeline, guide and guide.to(device), plan, options.batch_size)
    if kind is None:
        write_folder(drawer, options)
    else:
        write_picture(drawer, options, kind)


def picture_kind(output: str) -> str | None:
    """Pillow's name of the format of a picture; None where a folder is meant.

    Raises:
        ValueError: Pillow writes no such format.
    """
    suffix = Path(output).suffix.lower()
    if not suffix or output.endswith(("/", os.sep)) or Path(output).is_dir():
        return None
    PIL.Image.init()
    written = {end: kind for end, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.SAVE}
    if suffix not in written:
        near = nearest(suffix, written, "use .png.")
        raise ValueError(f"--output {output}: Pillow writes no {suffix}; {near} A folder is named with / at its end.")
    return written[suffix]


def check_output(options: argparse.Namespace, kind: str | None) -> None:
    """Refuse, before the model is opened, output that cannot be written or would take the place of something.

    Raises:
        ValueError: see above; the message says what to do.
    """
    output = Path(options.output)
    check_writable(output, "--output", folder=kind is None)
    if kind is None:
        stored_record(output)
        return
    if options.format:
        raise ValueError(f"--format {options.format} is for files in a folder; {output} says itself what it is.")
    if os.path.lexists(output) and not options.overwrite:
        raise ValueError(f"--output {output} is there already; {ANOTHER}.")
    _try_format(output, kind, (1, 1))


def _try_format(output: Path, kind: str, size: tuple[int, int]) -> None:
    """Refuse a picture that its format cannot hold."""
    try:
        PIL.Image.new("RGB", size, "white").save(io.BytesIO(), format=kind)
    except (KeyError, OSError, SystemError, ValueError) as error:
        raise ValueError(
            f"--output {output}: Pillow writes no {kind} of {size[0]} x {size[1]} colour pixels ({first_line(error)}); "
            "use .png, fewer images, or a folder."
        ) from error


def open_model(options: argparse.Namespace) -> DEMOPipeline:
    """The pipeline with the sampler and the decoder of the options, on the CPU.

    Raises:
        ValueError: one of them does not load, or they do not fit each other.
    """
    dtype = _dtype(options)
    try:
        pipeline = open_pipeline(options.model, dtype)
    except ValueError as error:
        raise ValueError(f"--model {error}") from error
    if options.vae is not None:
        if pipeline.latent_space is None:
            raise ValueError(f"--vae {options.vae}: {options.model} draws pixels and has no decoder; leave --vae out.")
        try:
            pipeline.vae = open_vae(options.vae, dtype)
        except ValueError as error:
            raise ValueError(f"--vae {error}") from error
    if options.sampler != "own":
        shift = own_shift(pipeline.scheduler)
        try:
            pipeline.scheduler = make_scheduler(options.sampler, pipeline.transformer.config, shift)
        except ValueError as error:
            raise ValueError(f"--{error}") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _dtype(options: argparse.Namespace) -> torch.dtype | None:
    """Of weights; None for float32, which is what they are stored in."""
    return None if options.dtype == "float32" else getattr(torch, options.dtype)


def open_guide(pipeline: DEMOPipeline, options: argparse.Namespace) -> DEMOPipeline | None:
    """The weaker pipeline of the options, on the CPU; None where there is none.

    Raises:
        ValueError: it does not load, or the guidance of the options does not fit the model.
    """
    guide = open_weaker(options.guide, _dtype(options))
    make_guidance(
        pipeline, options.guidance_scale, guider=options.guider, guide=guide,
        internal_guidance=options.internal_guidance,
    )  # fmt: skip
    return guide


def make_plan(pipeline: DEMOPipeline, options: argparse.Namespace, guide: DEMOPipeline | None = None) -> Plan:
    """Which images are drawn, and how.

    Raises:
        ValueError: the model has no such class or size, or there are too many images.
    """
    classes = chosen_classes(pipeline, options)
    total = max(1, len(classes)) * options.num_images
    if total > MAX_IMAGES:
        raise ValueError(
            f"--num-images {options.num_images} asks for {total:,} images, more than {MAX_IMAGES:,}; draw fewer, then "
            "others with another --seed into another folder."
        )
    each: Sequence[int | None] = classes or [None]
    labels = [label for label in each for _ in range(options.num_images)]
    height, width = _size(pipeline, options.size)
    names = {label: pipeline.id2label.get(label, str(label)).split(",")[0] for label in classes}
    steps = options.steps or pipeline.config.default_num_inference_steps or default_steps(pipeline.scheduler)
    config = pipeline.scheduler.config
    settings = {
        "d_emo": own_version(),
        "model": options.model,
        "weights": weights_digest(pipeline.transformer),
        "decoder": weights_digest(pipeline.vae),
        "latent_space": None if pipeline.latent_space is None else asdict(pipeline.latent_space),
        "dtype": options.dtype,
        "classes": {str(label): names[label] for label in classes},
        "num_images": options.num_images,
        "height": height,
        "width": width,
        "sampler": type(pipeline.scheduler).__name__,
        "sampler_config": {name: value for name, value in sorted(config.items()) if name[0] != "_"},
        "steps": steps,
        "guidance_scale": options.guidance_scale if takes_guidance(pipeline.transformer.config) or guide else 1.0,
        "guidance_channels": options.guidance_channels,
        "guidance_interval": list(options.guidance_interval or (0.0, 1.0)),
        **_other_guidance(options, guide),
        "seed": options.seed,
    }
    return Plan(labels, [names.get(label, "") if label is not None else "" for label in labels], settings)


def _other_guidance(options: argparse.Namespace, guide: DEMOPipeline | None) -> dict[str, Any]:
    """The settings of guidance that is asked for, beside its scale; those that are not are left out."""
    asked: dict[str, Any] = {}
    if options.guider is not None:
        asked["guider"] = options.guider
    if guide is not None:
        asked |= {"guide": options.guide, "guide_weights": weights_digest(guide.transformer)}
    if options.internal_guidance > 1:
        asked["internal_guidance"] = options.internal_guidance
    return asked


def chosen_classes(pipeline: DEMOPipeline, options: argparse.Namespace) -> list[int]:
    """Ids of the classes that are drawn, each once a naming; none for a model without classes.

    Raises:
        ValueError: a class is unknown, a name is several classes', or none is named.
    """
    count, names = pipeline.transformer.config.num_classes, list(pipeline.id2label.values())
    if not count:
        if options.labels or options.every_class:
            named = "--every-class" if options.every_class else "--labels"
            raise ValueError(f"{named}: {options.model} is unconditional, it knows no classes; leave it out.")
        return []
    if options.every_class:
        return list(range(count))
    if not options.labels:
        such_as = f", such as {'; '.join(names[:3])}" if names else ""
        raise ValueError(f"--labels is missing: the model has {count:,} classes{such_as}; name some, or --every-class.")
    return [label for text in options.labels for label in _class(pipeline, text)]


def _class(pipeline: DEMOPipeline, text: str) -> list[int]:
    """The id of a class by its name, or by the id itself where none has that name."""
    try:
        return pipeline.get_label_ids(text)
    except ValueError as error:
        try:
            # Of few digits: Python reads no more than some thousands.
            return pipeline.get_label_ids(int(text) if re.fullmatch(r"\d{1,9}", text, re.ASCII) else text)
        except ValueError as other:
            raise ValueError(f"--labels: {other if text.isdecimal() else error}") from error


def _size(pipeline: DEMOPipeline, size: list[int] | None) -> tuple[int, int]:
    """Height and width in pixels of what is drawn."""
    height, width = (size[0], size[-1]) if size else (None, None)
    try:
        rows, columns = pipeline._latent_size(height, width)
    except ValueError as error:
        raise ValueError(f"--size: {error}") from error
    return rows * pipeline.vae_scale_factor, columns * pipeline.vae_scale_factor


class Drawer(NamedTuple):
    """What draws.

    Attributes:
        pipeline: on its device.
        guide: the weaker one, if there is one, there, too.
        plan: all images.
        batch_size: images at once.
    """

    pipeline: DEMOPipeline
    guide: DEMOPipeline | None
    plan: Plan
    batch_size: int


def drawn(drawer: Drawer, indices: Sequence[int]) -> Iterator[tuple[int, PIL.Image.Image]]:
    """Images of some indices, each with its index."""
    pipeline, guide, plan, size = drawer
    settings, steps = plan.settings, plan.settings["steps"]
    batches = [indices[start : start + size] for start in range(0, len(indices), size)]
    with Progress(len(batches) * steps, "step", f"drawing {len(indices):,} images") as progress:

        def after_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            reach(number + (step + 1) / pipeline.num_timesteps)
            return tensors

        def reach(done: float) -> None:
            progress.update(max(0, round(done * steps) - progress.done))

        steps_seen = not isinstance(pipeline.scheduler, FlowMatchODESolverScheduler)
        for number, batch in enumerate(batches):
            labels = [label for index in batch if (label := plan.labels[index]) is not None]
            images = pipeline(
                labels or None,
                num_images_per_label=1 if labels else len(batch),
                num_inference_steps=steps,
                guidance_scale=settings["guidance_scale"],
                guidance_channels=settings["guidance_channels"],
                guidance_interval=tuple(settings["guidance_interval"]),
                guider=settings.get("guider"),
                guide=guide,
                internal_guidance=settings.get("internal_guidance", 1.0),
                height=settings["height"],
                width=settings["width"],
                generator=[image_generator(settings["seed"], index) for index in batch],
                callback_on_step_end=after_step if steps_seen else None,
            ).images
            reach(number + 1)
            yield from zip(batch, images, strict=True)


def write_picture(drawer: Drawer, options: argparse.Namespace, kind: str) -> None:
    """All images in one, a class or a part of it in each row.

    Raises:
        ValueError: the picture would be too large; nothing was drawn.
    """
    plan, output, columns = drawer.plan, Path(options.output), min(COLUMNS, options.num_images)
    starts = [
        first + column
        for first in range(0, len(plan.labels), options.num_images)
        for column in range(0, options.num_images, columns)
    ]
    captions = [plan.names[start] if start % options.num_images == 0 else "" for start in starts]
    size = beside_grid_size(len(starts), columns, (plan.settings["width"], plan.settings["height"]), captions)
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(
            f"--output {output}: {len(plan.labels):,} images are a picture of {size[0]:,} x {size[1]:,} pixels, which "
            f"few programs open; draw into a folder: --output {output.with_suffix('')}/"
        )
    _try_format(output, kind, size)
    images = [image for _, image in drawn(drawer, range(len(plan.labels)))]
    ends = [min(start + columns, start - start % options.num_images + options.num_images) for start in starts]
    grid = beside_grid([images[start:end] for start, end in zip(starts, ends, strict=True)], captions)
    save_image(grid, output, kind, {KEYWORD: json.dumps(plan.settings)})
    say(f"{len(images):,} image{'s' * (len(images) > 1)} in {output}")


def write_folder(drawer: Drawer, options: argparse.Namespace) -> None:
    """A file an image, under names that sort; those that the same command left are kept.

    Raises:
        ValueError: the folder holds other images; nothing was drawn.
    """
    plan, folder, suffix = drawer.plan, Path(options.output), options.format or "png"
    digits = len(str(len(plan.labels) - 1))
    files = [f"{index:0{digits}d}{_in_a_name(name)}.{suffix}" for index, name in enumerate(plan.names)]
    with output_folder(folder, "--output"):
        stored = stored_record(folder)
        if stored is not None and (changed := differences(stored, {**plan.settings, "files": files}, ("command",))):
            if not options.overwrite:
                raise ValueError(f"--output {folder} holds others ({'; '.join(changed)[:200]}); {ANOTHER}.")
            for name in stored["files"]:
                remove(folder / name)
            remove(folder / RECORD)
            stored = None
        missing = [index for index, name in enumerate(files) if not (folder / name).is_file()]
        for index, image in drawn(drawer, missing):
            if stored is None:  # what the pipeline refuses leaves nothing
                stored = {**plan.settings, "files": files}
                write_json(folder / RECORD, stored)
            about = {**plan.settings, "index": index, "class": plan.names[index]}
            save_image(image, folder / files[index], KINDS[suffix], {KEYWORD: json.dumps(about)})
    there = f"; {len(files) - len(missing):,} were there" if len(missing) < len(files) else ""
    say(f"{len(missing):,} images drawn into {folder}{there}")


def stored_record(folder: Path) -> dict[str, Any] | None:
    """What a folder of this command's says that it holds; None for one that is new or empty.

    Raises:
        ValueError: something else is in it.
    """
    if not holds_something(folder):
        return None
    with contextlib.suppress(OSError, ValueError):
        stored = read_json(folder / RECORD, "")
        # What is deleted by these names lies in the folder itself.
        if all(isinstance(name, str) and Path(name).name == name for name in stored["files"]):
            return stored
    raise ValueError(f"--output {folder} holds something else than images of this command; name another folder.")


def _in_a_name(text: str) -> str:
    """A class's name as the end of a file's: letters, digits and hyphens."""
    plain = re.sub(r"[\W_]+", "-", text).strip("-")[:60]
    return f"-{plain}" if plain else ""
