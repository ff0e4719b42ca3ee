"""One of everything that the package reads, tiny: folders of pictures, pipelines, classifiers, archives, runs."""

import csv
import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from d_emo import EMOv2Config, EMOv2ForImageClassification, VEMOv2Config, VEMOv2ForVideoClassification
from d_emo.classification.transformers_models import make_image_processor
from d_emo.models.published import export_state
from helpers.classifiers import TINY_NETWORK
from helpers.detectors import write_detector
from helpers.extras import installed
from helpers.masks import write_masks
from helpers.models import randomize, tiny_model
from helpers.object_files import write_instances
from helpers.pipelines import tiny_pipeline, tiny_vae
from helpers.segmenters import segmenter
from helpers.videos import write_bars


def write_pictures(folder: Path, side: int = 16, count: int = 2) -> Path:
    """A folder of three classes."""
    for number, name in enumerate(("0", "1", "2")):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            picture = PIL.Image.new("RGB", (side, side), (number * 100, index * 40, 7))
            picture.save(folder / name / f"{index}.png")
    return folder


def write_classifier(folder: Path) -> Path:
    """An EMOv2 of 10,000 parameters with three classes, and its image processor."""
    config = EMOv2Config(**json.loads(TINY_NETWORK), image_size=32, id2label={0: "0", 1: "1", 2: "2"})
    torch.manual_seed(0)
    EMOv2ForImageClassification(config).eval().save_pretrained(folder)
    make_image_processor(32).save_pretrained(folder)
    return folder


def write_video_classifier(folder: Path) -> Path:
    """A V-EMOv2 of a few thousand parameters for the bars' classes, and its video processor."""
    from helpers.video_training import TINY_NETWORK as TINY_VIDEO_NETWORK

    names = dict(enumerate(("left", "right", "stay")))
    config = VEMOv2Config(**json.loads(TINY_VIDEO_NETWORK), image_size=32, id2label=names)
    torch.manual_seed(0)
    VEMOv2ForVideoClassification(config).eval().save_pretrained(folder)
    return folder


def write_segmenter(folder: Path) -> Path:
    """A segmenter of a few thousand parameters with three classes, and its image processor."""
    model = segmenter("segformer")
    model.save_pretrained(folder)
    model.make_image_processor().save_pretrained(folder)
    return folder


def write_pipeline(folder: Path) -> Path:
    """A pipeline that draws grey digits of 8 x 8."""
    model = {"sample_size": 8, "in_channels": 1, "num_classes": 10}
    pipeline = tiny_pipeline(**model)
    pipeline.save_pretrained(folder)
    return folder


def write_dit(path: Path) -> Path:
    """A DiT under its authors' names, bare."""
    torch.save(export_state(randomize(tiny_model("DiT", sample_size=16))), path)
    return path


def write_run(folder: Path) -> Path:
    """What a trainer leaves, without weights."""
    folder.mkdir()
    with (folder / "train_log.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "images_per_second"])
        writer.writerow([1, 0.5, 10.0])
    return folder


def write_snapshots(folder: Path, seeds: range = range(4)) -> Path:
    """A pipeline with snapshots of averages, of every tenth step, each of other weights."""
    from d_emo.common.snapshots import write_snapshot

    pipeline = tiny_pipeline(flow=True, in_channels=1, num_classes=10, sample_size=8)
    pipeline.save_pretrained(folder)
    for seed in seeds:
        values = randomize(pipeline.transformer, seed).state_dict()
        state = {length: {name: tensor.clone() for name, tensor in values.items()} for length in (0.05, 0.1)}
        write_snapshot(folder, 10 * (seed + 1), state)
    return folder


def write_samples(path: Path, count: int = 60, side: int = 8) -> Path:
    """An archive of pictures as ADM writes them."""
    np.savez(path, np.random.RandomState(0).randint(0, 256, (count, side, side, 3), dtype=np.uint8))
    return path


def write_vae(folder: Path) -> Path:
    """A VAE that halves each side."""
    tiny_vae().save_pretrained(folder)
    return folder


def write_latents(folder: Path, pictures: Path, vae: Path) -> Path:
    """Latents of the pictures."""
    from d_emo.train import encode_latents

    encode_latents.main([
        "--train-data-dir", str(pictures), "--vae", str(vae), "--resolution", "16", "--output-dir", str(folder),
        "--statistics", "true",
    ])  # fmt: skip
    return folder


class Made(dict[str, Path]):
    """What was made, by name; a test that wants what needs a missing extra is skipped."""

    def __missing__(self, name: str) -> Path:
        if name == "videos":
            pytest.skip("needs the extra video")
        raise KeyError(name)


def make_everything(folder: Path) -> dict[str, Path]:
    """One of each, by the name of its place."""
    made = {
        "pictures": write_pictures(folder / "pictures"),
        "classifier": write_classifier(folder / "classifier"),
        "detector": write_detector(folder / "detector", ["red", "blue"]),
        "masks": write_masks(folder / "masks"),
        "segmenter": write_segmenter(folder / "segmenter"),
        "pipeline": write_pipeline(folder / "pipeline"),
        "dit.pt": write_dit(folder / "dit.pt"),
        "emov2.pth": write_dit(folder / "emov2.pth"),  # none of EMOv2's: it is refused by name
        "run": write_run(folder / "run"),
        "snapshots": write_snapshots(folder / "snapshots"),
        "samples.npz": write_samples(folder / "samples.npz"),
        "vae": write_vae(folder / "vae"),
        "cache": folder / "cache",
        "video classifier": write_video_classifier(folder / "video classifier"),
        "boxes": write_instances(folder / "boxes"),
    }
    if installed("video"):
        made["videos"] = write_bars(folder / "videos", 1, 4)
    return Made(made, latents=write_latents(folder / "latents", made["pictures"], made["vae"]))
