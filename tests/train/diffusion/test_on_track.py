"""The published loss curve: the copy, what it is compared with, and when."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from accelerate import Accelerator
from helpers.models import randomize

from d_emo.eval.fid.protocol import SD_LATENTS
from d_emo.train.data.options import DataOptions
from d_emo.train.data.sources import load_source
from d_emo.train.diffusion import figures, trainer
from d_emo.train.diffusion.config import TrainConfig, parse_config
from d_emo.train.diffusion.on_track import CLASSES, LATENTS, published_loss, read_published
from d_emo.train.diffusion.plan import make_plan
from d_emo.train.engine import start

PAPER = ("--model", "D-EMOv2-S-2", "--global-batch-size", "256", "--micro-batch-size", "1")


def plan_of(*arguments, published_data=True):
    """The plan of a run, as if on ImageNet's latents."""
    config = parse_config(["--train-data-dir", "imagenet", *PAPER, *arguments])
    config = replace(config, data=DataOptions())  # the digits, at the paper's settings
    plan = make_plan(config, load_source(config.data), Accelerator(cpu=True))
    if published_data:
        source = plan.source.__class__(**{**plan.source.__dict__, "id2label": {i: str(i) for i in range(CLASSES)}})
        plan = replace(plan, latent_shape=LATENTS, space=SD_LATENTS, source=source, flip=True)
    return plan


def test_means_equal_the_published_ones():
    published = read_published("D-EMOv2-S-2")
    # The paper's values at steps 100 and 1,000 are means over the hundred steps before.
    assert published.losses[0] == pytest.approx(0.4988) and published.losses[9] == pytest.approx(0.1928)
    assert published.mean(399_500, 400_000) == pytest.approx(0.1545, abs=5e-4)
    assert published.mean(400_900, 401_000) is None
    assert read_published("DiT-S-2") is None and read_published("window") is None


def test_the_copy_is_the_published_curve_thinned(shared):
    with (shared / "reference" / "demo_train_loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    for model in ("D-EMOv2-S-2", "D-EMOv2-B-2", "D-EMOv2-L-2", "D-EMOv2-XL-2"):
        published = read_published(model)
        whole = np.array([float(row[model]) for row in rows])
        # Means over windows of a thousand steps are the copy's own; tolerance: its digits.
        for last in np.linspace(2000, 400_000, 10).round(-3).astype(int):
            expected = whole[last // 100 - 10 : last // 100].mean()
            assert published.mean(last - 1000, last) == pytest.approx(expected, abs=1e-5)
        assert published.mean(300, 700) == pytest.approx(whole[3:7].mean(), abs=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        ("--objective", "sit"),
        ("--global-batch-size", "128"),
        ("--learning-rate", "2e-4"),
        ("--class-dropout-prob", "0"),
        ("--min-snr-gamma", "5"),
        ("--patch-bottleneck", "64"),
        ("--model", "DiT-S-2"),
        ("--model", "D-EMOv2-S-4"),
    ],
)
def test_other_settings_are_not_compared(change):
    assert published_loss(plan_of()) is not None
    assert published_loss(plan_of(*change)) is None


def test_other_data_is_not_compared():
    assert published_loss(plan_of(published_data=False)) is None


@pytest.mark.parametrize(
    "change", [{"autoencoder": "AutoencoderTiny"}, {"std": (1 / 0.13025,)}, {"measured_on": "imagenet"}]
)
def test_other_latents_of_that_shape_are_not_compared(change):
    assert published_loss(replace(plan_of(), space=replace(SD_LATENTS, **change))) is None


def test_log_line_and_picture_show_the_published_loss(tmp_path, capsys):
    config = parse_config(
        ["--model", "D-EMOv2-N-8", "--global-batch-size", "4", "--max-train-steps", "4", "--log-every", "2",
         "--report-to", "none", "--sample-every", "0", "--output-dir", str(tmp_path / "run")]
    )  # fmt: skip
    accelerator = Accelerator(cpu=True)
    run = trainer.make_run(make_plan(config, load_source(config.data), accelerator), accelerator)
    assert run.published is None
    randomize(run.model)
    run.published = read_published("D-EMOv2-S-2")
    with start.claimed(run.plan, accelerator, TrainConfig().flat()) as claim:
        trainer.train(run, claim)
    printed = capsys.readouterr().out
    losses = [float(row["loss"]) for row in csv.DictReader((tmp_path / "run" / "train_log.csv").open())]
    assert f"({losses[0] / run.published.mean(0, 2):.3f} of the published)" in printed
    plain, both = tmp_path / "plain.png", tmp_path / "both.png"
    figures.plot_loss(tmp_path / "run" / "train_log.csv", plain, "run")
    figures.plot_loss(tmp_path / "run" / "train_log.csv", both, "run", run.published)
    assert plain.read_bytes() != both.read_bytes()
