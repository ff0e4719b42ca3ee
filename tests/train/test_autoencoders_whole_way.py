"""The whole way with every class of autoencoder: encode, train, continue, draw, score, save, load; others are refused.

One process in the fast tests, and two where several could differ: with a posterior and without. `pytest -m slow` has
two processes for all, and kill -9.
"""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from helpers.autoencoders import CONFIGS, tiny_autoencoder
from helpers.made import write_pictures
from helpers.paths import ROOT
from helpers.processes import Trainer, run_script
from helpers.training import assert_same_bits, losses, run_here, train_to_the_end

from d_emo import DEMOPipeline
from d_emo.eval import evaluate_fid
from d_emo.images.autoencoders import latent_space
from d_emo.images.latent_cache import LatentCache
from d_emo.train import encode_latents

ENCODE = ROOT / "train" / "encode_latents.py"
# The other class that is offered in each one's place: of the same channels and factor where there is one.
OTHERS = {
    "AutoencoderKL": "AsymmetricAutoencoderKL", "AutoencoderKL per channel": "AutoencoderTiny",
    "AutoencoderRAE": "AutoencoderDC", "AutoencoderDC": "AutoencoderKL", "AutoencoderKLFlux2": "AutoencoderKL",
    "AutoencoderTiny": "ConsistencyDecoderVAE", "AsymmetricAutoencoderKL": "AutoencoderKL",
    "ConsistencyDecoderVAE": "AutoencoderTiny",
}  # fmt: skip
COMMON = ("--global-batch-size", 4, "--checkpoint-every", 3, "--log-every", 1, "--report-to", "none", "--sample-every",
          0, "--num-workers", 0, "--ema-decay", "0.5", "--kernels", "reference")  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Nine pictures of 32 x 32, in three classes."""
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", side=32, count=3)


@pytest.fixture(scope="module")
def vaes(tmp_path_factory):
    """A folder of each."""
    root = tmp_path_factory.mktemp("vaes")
    for name in CONFIGS:
        tiny_autoencoder(name).save_pretrained(root / name)
    return root


def encode(capsys, pictures, vae, folder, tmp_path, processes=1, *more):
    words = ("--train-data-dir", pictures, "--vae", vae, "--output-dir", folder, "--resolution", 32, "--batch-size", 4,
             "--shard-size", 5, "--num-workers", 0, *more)  # fmt: skip
    if processes == 1:
        code, printed = run_here(capsys, *words, main=encode_latents.main)
    else:
        code, printed = run_script(tmp_path / "log", ENCODE, *words, processes=processes)
    assert code == 0, printed
    return LatentCache(folder)


def model_for(name):
    """The smallest model on 2 x 2 patches of an autoencoder's latents."""
    side = 32 // latent_space(tiny_autoencoder(name)).factor
    return ("--model", f"D-EMOv2-N-{max(2, side // 2)}")


def train(capsys, tmp_path, folder, *more, steps=5, processes=1):
    words = (*COMMON, "--output-dir", folder, "--max-train-steps", steps, *more)
    return train_to_the_end(capsys, tmp_path / "log", *words, processes=processes)


def loss_column(folder):
    return [float(line.split(",")[1]) for line in losses(folder)[1:]]


def refused(capsys, folder, *words):
    """What a run says that is refused."""
    code, printed = run_here(capsys, *COMMON, "--max-train-steps", 5, "--output-dir", folder, *words)
    assert code not in (0, None) and "Traceback" not in printed
    return printed


def check_a_finished_run(capsys, folder, pictures, name, tmp_path):
    """It loads through Diffusers, draws, and is scored."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline) is DEMOPipeline and type(pipeline.vae).__name__ == name.split()[0]
    assert pipeline.latent_space == latent_space(tiny_autoencoder(name))
    pipeline.set_progress_bar_config(disable=True)
    pixels = pipeline([0, 2], num_inference_steps=4, output_type="np").images
    assert pixels.shape == (2, 32, 32, 3) and np.isfinite(pixels).all() and pixels.std() > 0
    code, printed = run_here(
        capsys, "--model", folder, "--preset", "quick", "--num-images", 8, "--steps", 4, "--reference", pictures,
        "--metrics", "kid", "--features", "pixels", "--batch-size", 4, "--output-dir", tmp_path / "scores",
        "--cache-dir", tmp_path / "features", main=evaluate_fid.main,
    )  # fmt: skip
    assert code == 0, printed
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["scores"]["kid"] > 0


def check_refusals(capsys, folder, cache, vaes, name, pictures, tmp_path):
    """Another class is refused by name: beside latents, and for a run that goes on."""
    other, wrong = OTHERS[name].split()[0], vaes / OTHERS[name]
    change = f"autoencoder {name.split()[0]} -> {other}"
    model = model_for(name)
    said = refused(capsys, tmp_path / "other", *model, "--latents", cache, "--vae", wrong)
    assert "--vae" in said and change in said and not (tmp_path / "other").exists()
    said = refused(capsys, folder, *model, "--train-data-dir", pictures, "--vae", wrong, "--resume-from", "latest")
    assert "latent_space" in said and f"{name.split()[0]}, " in said and f"{other}, " in said


def go_the_whole_way(capsys, name, pictures, vaes, tmp_path, processes):
    """Everything with one class; the folder of the run on latents."""
    vae, cache = vaes / name, tmp_path / "latents"
    encode(capsys, pictures, vae, cache, tmp_path, processes)
    on_latents, on_images = tmp_path / "on-latents", tmp_path / "on-images"
    from_cache = (*model_for(name), "--latents", cache, "--vae", vae)
    printed = train(capsys, tmp_path, on_latents, *from_cache, steps=3, processes=processes)
    assert latent_space(tiny_autoencoder(name)).describe() in printed
    train(capsys, tmp_path, on_latents, *from_cache, "--resume-from", "latest", processes=processes)
    data = (*model_for(name), "--train-data-dir", pictures, "--vae", vae, "--resolution", 32)
    train(capsys, tmp_path, on_images, *data, processes=processes)
    # Same images, mirror images, noise and draws; batches of the autoencoder differ, and the run on latents was
    # interrupted.
    assert len(loss_column(on_images)) == 5
    np.testing.assert_allclose(loss_column(on_latents), loss_column(on_images), rtol=1e-5)
    return on_latents


# Statistics by channel, pictures of another size than the data, a deterministic encoder; the others are alike.
SOON = ("AutoencoderRAE",)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in SOON)) for name in CONFIGS]
)
def test_every_class_goes_the_whole_way(capsys, name, pictures, vaes, tmp_path):
    run = go_the_whole_way(capsys, name, pictures, vaes, tmp_path, 1)
    check_a_finished_run(capsys, run, pictures, name, tmp_path)
    check_refusals(capsys, run, tmp_path / "latents", vaes, name, pictures, tmp_path)


@pytest.mark.parametrize("name", ["AutoencoderKLFlux2", "AutoencoderRAE"])
def test_two_processes_encode_the_same_latents(capsys, name, pictures, vaes, tmp_path):
    one = encode(capsys, pictures, vaes / name, tmp_path / "one", tmp_path)
    two = encode(capsys, pictures, vaes / name, tmp_path / "two", tmp_path, 2, "--statistics", "true")
    assert two.statistics.latent_space.channels == one.manifest.shape[0] and one.manifest == two.manifest
    for index in range(9):
        torch.testing.assert_close(one.read(index, True), two.read(index, True), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_class_goes_the_whole_way_on_two_processes(capsys, name, pictures, vaes, tmp_path):
    """Losses as those of one process, to 1e-5."""
    run = go_the_whole_way(capsys, name, pictures, vaes, tmp_path, 2)
    check_a_finished_run(capsys, run, pictures, name, tmp_path)
    data = (*model_for(name), "--latents", tmp_path / "latents", "--vae", vaes / name)
    train(capsys, tmp_path, tmp_path / "alone", *data)
    np.testing.assert_allclose(loss_column(run), loss_column(tmp_path / "alone"), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_killed_run_ends_with_the_same_bits(capsys, name, pictures, vaes, tmp_path):
    data = (*model_for(name), "--train-data-dir", pictures, "--vae", vaes / name, "--resolution", 32)
    train(capsys, tmp_path, tmp_path / "whole", *data)
    killed = tmp_path / "killed"
    words = (*COMMON, *data, "--output-dir", killed, "--max-train-steps", 5)
    with Trainer(tmp_path / "log", *words) as trainer:
        trainer.wait_until((killed / "checkpoint-0000003" / "manifest.json").is_file)
    train(capsys, tmp_path, killed, *data, "--resume-from", "latest")
    assert_same_bits(killed / "checkpoint-0000005", tmp_path / "whole" / "checkpoint-0000005")
    assert losses(killed) == losses(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AutoencoderRAE", "ConsistencyDecoderVAE"])
def test_grids_and_scores_on_the_way(capsys, name, pictures, vaes, tmp_path):
    """Where images are resized or decoding draws noise."""
    data = (*model_for(name), "--train-data-dir", pictures, "--vae", vaes / name, "--resolution", 32)
    shown = ("--sample-every", 5, "--sample-steps", 4, "--samples-per-class", 1, "--fid-every", 5, "--fid-images", 8,
             "--fid-features", "pixels")  # fmt: skip
    train(capsys, tmp_path, tmp_path / "run", *data, *shown)
    assert (tmp_path / "run" / "samples" / "step-0000005.png").is_file()
    assert list((tmp_path / "run" / "fid").glob("step-0000005/scores.json"))


@pytest.mark.slow
def test_an_autoencoder_that_makes_one_size_only_decides_the_resolution(capsys, pictures, vaes, tmp_path):
    """Without --resolution: where a folder's default is 256."""
    words = ("--train-data-dir", pictures, "--vae", vaes / "AutoencoderRAE")
    code, printed = run_here(capsys, *COMMON, *words, "--output-dir", tmp_path / "run", "--dry-run")
    assert code == 0 and "32 x 32, mirrored" in printed and "64 x 2 x 2" in printed
    said = refused(capsys, tmp_path / "run", *words, "--resolution", 64)
    assert "--resolution 64: AutoencoderRAE works at 32 pixels only; use 32." in said
    code, printed = run_here(
        capsys, *words, "--output-dir", tmp_path / "latents", "--num-workers", 0, main=encode_latents.main
    )
    assert code == 0, printed
    manifest = LatentCache(tmp_path / "latents").manifest
    assert manifest.resolution == 32 and asdict(manifest.latent_space)["deterministic"]
