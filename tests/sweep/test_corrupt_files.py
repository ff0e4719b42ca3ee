"""Every kind of file that the package reads, damaged in every way: one line that names it, or it is made again.

A damage that a format cannot show, such as another grey value in a picture, may pass. Files of checkpoints have
checksums, so that there nothing passes.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.file_damage import RUINED, damages
from helpers.masks import write_panoptic
from helpers.public_calls import NoAnswer, patience

from d_emo.common.commands import explanation


class Reader(NamedTuple):
    """A kind of file.

    Attributes:
        make: writes one into a folder, with what belongs to it; the file that is damaged.
        read: reads it as the package does, given the folder.
        unseen: ruins that nobody can see, with the reason.
        thorough: whether reading is quick enough for every damage in the fast tests.
    """

    make: Callable[[Path, dict[str, Path]], Path]
    read: Callable[[Path], Any]
    unseen: tuple[str, ...] = ()
    thorough: bool = True


def copy(name: str, file: str = "") -> Callable[[Path, dict[str, Path]], Path]:
    """A copy of something in `made`, of which one file is damaged."""

    def make(folder: Path, made: dict[str, Path]) -> Path:
        if made[name].is_dir():
            shutil.copytree(made[name], folder / name)
        else:
            shutil.copy(made[name], folder / name)
        return folder / name / file if file else folder / name

    return make


def text(name: str, content: str) -> Callable[[Path, dict[str, Path]], Path]:
    def make(folder: Path, made: dict[str, Path]) -> Path:
        (folder / name).write_text(content)
        return folder / name

    return make


def open_pipeline(folder: Path) -> None:
    from d_emo.pipelines import open_pipeline

    open_pipeline(str(folder / "pipeline"))


def open_transformer(folder: Path) -> None:
    from d_emo import DEMOTransformer2DModel

    DEMOTransformer2DModel.from_pretrained(folder / "pipeline" / "transformer")


def open_vae(folder: Path) -> None:
    from d_emo.images.autoencoders import open_vae

    open_vae(str(folder / "vae"))


def open_classifier(folder: Path) -> None:
    from d_emo.eval.classification.command import open_classifier

    open_classifier(str(folder / "classifier"))


def read_state(folder: Path) -> None:
    from d_emo.common.tensor_files import read_state

    read_state(folder / "dit.pt", ("ema", "model"), "ema")


def open_samples(folder: Path) -> None:
    from d_emo.eval.fid.image_sets import open_set

    images = open_set(str(folder / "samples.npz"))
    images.read(0, len(images))


def reference(folder: Path, made: dict[str, Path]) -> Path:
    np.savez(folder / "reference.npz", mu=np.zeros(16), sigma=np.eye(16))
    return folder / "reference.npz"


def read_reference(folder: Path) -> None:
    from d_emo.eval.fid.archives import archive_keys, read_array

    for key in archive_keys(folder / "reference.npz"):
        read_array(folder / "reference.npz", key)


def latents(name: str) -> Callable[[Path, dict[str, Path]], Path]:
    def make(folder: Path, made: dict[str, Path]) -> Path:
        shutil.copytree(made["latents"], folder / "latents")
        return folder / "latents" / name

    return make


def read_latents(folder: Path) -> None:
    from d_emo.images.latent_cache import latents_source

    source = latents_source(folder / "latents")
    for index in range(source.size):
        source.latents.read(index, False)


def read_names(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from d_emo.images.labels import read_class_names

        read_class_names(str(folder / name))

    return read


def read_options(folder: Path) -> None:
    from d_emo.train.diffusion.config import parse_config

    parse_config(["--config", str(folder / "run.yaml")])


def read_run(folder: Path) -> None:
    from d_emo.eval.compare_runs import read_run

    read_run(folder / "run")


def read_pictures(folder: Path) -> None:
    from d_emo.images.folders import folder_source

    source = folder_source(folder / "pictures", False)
    for index in range(source.size):
        source.read(index)


def read_videos(folder: Path) -> None:
    from d_emo.video.folders import folder_videos
    from d_emo.video.reading import middles

    source = folder_videos(folder / "videos")
    for index in range(source.size):
        source.read(index).frames(4, lambda count: middles(count, 4))


def open_video_classifier(folder: Path) -> None:
    from d_emo.eval.video.command import open_video_classifier

    open_video_classifier(str(folder / "video classifier"))


def inception(folder: Path, made: dict[str, Path]) -> Path:
    torch.save({"weight": torch.zeros(3)}, folder / "inception.pth")
    return folder / "inception.pth"


def read_coco_sizes(folder: Path) -> None:
    from d_emo.eval.tables.coco_sizes import read_sizes

    read_sizes(folder / "instances.json")


def masks(name: str) -> Callable[[Path, dict[str, Path]], Path]:
    """A folder of pictures and masks, a palette and COCO's panoptic file beside them; the file of that name."""

    def make(folder: Path, made: dict[str, Path]) -> Path:
        shutil.copytree(made["masks"], folder / "masks")
        (folder / "palette.txt").write_text("30 60 90 ground\n200 40 40 red\n")
        return write_panoptic(folder / "coco") if name.endswith("json") else folder / name

    return make


def read_masks(folder: Path) -> None:
    from d_emo.images.masks import folder_masks
    from d_emo.images.source import refuse_unreadable

    source = folder_masks(folder / "masks")
    refuse_unreadable(source.unreadable, "Repair it.")
    for index in range(source.size):
        source.read(index)


def read_palette(folder: Path) -> None:
    from d_emo.images.mask_files import read_palette

    read_palette(folder / "palette.txt")


def read_panoptic(folder: Path) -> None:
    from d_emo.images.panoptic import panoptic_pixels

    panoptic_pixels(folder / "coco" / "panoptic.json", folder / "coco")


def read_inception(folder: Path) -> None:
    from d_emo.eval.fid.extractors import make_extractor

    make_extractor("inception", str(folder / "inception.pth"), verify=False)


def open_detector(folder: Path) -> None:
    from d_emo.detection.saved import load_detector

    load_detector(folder / "detector")


def read_objects(folder: Path) -> None:
    from d_emo.images.coco import coco_objects

    source = coco_objects(folder / "boxes", folder / "boxes" / "annotations.json")
    source.read(0)


def make_average(folder: Path) -> None:
    from d_emo.common.snapshots import choose, list_snapshots, put_into
    from d_emo.pipelines import open_pipeline

    model = open_pipeline(str(folder / "snapshots")).transformer
    put_into(model, choose(list_snapshots(folder / "snapshots"), 0.07))


WEIGHTS = "diffusion_pytorch_model.safetensors"
READERS = {
    "model_index.json": Reader(copy("pipeline", "model_index.json"), open_pipeline, thorough=False),
    "a transformer's config.json": Reader(copy("pipeline", "transformer/config.json"), open_transformer),
    "a transformer's weights": Reader(copy("pipeline", f"transformer/{WEIGHTS}"), open_transformer),
    "scheduler_config.json": Reader(copy("pipeline", "scheduler/scheduler_config.json"), open_pipeline, thorough=False),
    "a VAE's config.json": Reader(copy("vae", "config.json"), open_vae, thorough=False),
    "a VAE's weights": Reader(copy("vae", WEIGHTS), open_vae),
    "a classifier's config.json": Reader(copy("classifier", "config.json"), open_classifier, thorough=False),
    "a classifier's weights": Reader(copy("classifier", "model.safetensors"), open_classifier),
    "a detector's config.json": Reader(copy("detector", "config.json"), open_detector, thorough=False),
    "a detector's weights": Reader(copy("detector", "model.safetensors"), open_detector),
    "COCO's objects": Reader(copy("boxes", "annotations.json"), read_objects),
    "preprocessor_config.json": Reader(copy("classifier", "preprocessor_config.json"), open_classifier, thorough=False),
    "a .pt file": Reader(copy("dit.pt"), read_state),
    "Inception's weights": Reader(inception, read_inception),
    "pictures as .npz": Reader(copy("samples.npz"), open_samples),
    "statistics as .npz": Reader(reference, read_reference),
    "a manifest of latents": Reader(latents("manifest.json"), read_latents),
    "labels of latents": Reader(latents("labels.npy"), read_latents),
    "statistics of latents": Reader(latents("statistics.json"), read_latents),
    "a file of latents": Reader(latents("latents-000000000.npy"), read_latents),
    "class names, a line each": Reader(
        text("names.txt", "cat\ndog\n"),
        read_names("names.txt"),
        unseen=("half",),  # fewer lines are names, too
    ),
    "class names as JSON": Reader(text("names.json", '{"0": "cat", "1": "dog"}'), read_names("names.json")),
    "a file of options": Reader(
        text("run.yaml", "learning_rate: 1e-4\nlog_every: 10\n"), read_options, unseen=("empty",)
    ),  # as one without options
    "COCO's annotations": Reader(
        text("instances.json", '{"info": {}, "images": [{"width": 640, "height": 480}]}'), read_coco_sizes
    ),
    "a mask": Reader(
        masks("masks/masks/a.png"),
        read_masks,
        unseen=("a folder", "a link to nowhere", "a pipe"),  # as without it, and then its picture has none
    ),
    "a palette": Reader(masks("palette.txt"), read_palette, unseen=("half",)),  # fewer classes are a palette, too
    "COCO's panoptic file": Reader(masks("panoptic.json"), read_panoptic),
    "a snapshot of averages": Reader(copy("snapshots", "snapshots/step-0000020.safetensors"), make_average),
    "a training log": Reader(copy("run", "train_log.csv"), read_run),
    "a picture": Reader(
        copy("pictures", "1/0.png"),
        read_pictures,
        unseen=("a folder", "a link to nowhere", "a pipe"),  # as without it
    ),
    "a video": Reader(copy("videos", "left/0.mp4"), read_videos),
    "a video classifier's config.json": Reader(
        copy("video classifier", "config.json"), open_video_classifier, thorough=False
    ),
    "a video classifier's weights": Reader(copy("video classifier", "model.safetensors"), open_video_classifier),
    "video_preprocessor_config.json": Reader(
        copy("video classifier", "video_preprocessor_config.json"),
        open_video_classifier,
        unseen=("a folder", "a link to nowhere", "a pipe"),  # transformers takes the frames' processor beside it
        thorough=False,
    ),
}


def verdict(reader: Reader, folder: Path, file: Path, field: str = "") -> tuple[str, str]:
    """What reading does: "read", "told", or "broken", and what was said; a message may name the field alone."""
    try:
        with patience(20):
            reader.read(folder)
    except NoAnswer:
        return "broken", "no answer"
    except Exception as error:
        line = explanation(error)
        if line is None:
            return "broken", f"{type(error).__name__}: {str(error)[:150]}"
        place = {file.name, *file.relative_to(folder).parts}
        if not any(part in line for part in place) and not (field and field in line):
            return "broken", f"names neither file nor folder: {line[:150]!r}"
        return "told", line
    return "read", ""


def check(reader: Reader, made: dict[str, Path], tmp_path: Path, thorough: bool) -> int:
    """Damage and read, in a folder of its own each time; how many damages there were."""
    whole = tmp_path / "whole"
    whole.mkdir()
    file, wrong, count = reader.make(whole, made), [], 0
    kind, said = verdict(reader, whole, file)
    assert kind == ("told" if reader is READERS["Inception's weights"] else "read"), said
    for count, (name, damage) in enumerate(damages(file), 1):
        if not thorough and not (name in RUINED or name in ("a list", "null", "100,000 levels")):
            continue
        folder = tmp_path / str(count)
        folder.mkdir()
        damaged = reader.make(folder, made)
        damage(damaged)
        kind, said = verdict(reader, folder, damaged, name.partition(" = ")[0] if " = " in name else "")
        if kind == "broken" or (kind == "read" and name in RUINED and name not in reader.unseen):
            wrong.append(f"{name}: {kind} {said}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    return count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_named_in_one_line(kind, made, tmp_path):
    check(READERS[kind], made, tmp_path, READERS[kind].thorough)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind, reader in READERS.items() if not reader.thorough])
def test_every_damage_is_named_in_one_line(kind, made, tmp_path):
    check(READERS[kind], made, tmp_path, True)
