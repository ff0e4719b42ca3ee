"""Encoding: in the autoencoder's colours, planned for folders that hold something else; scores on grey latents."""

import json

import numpy as np
import pytest
import torch
from helpers.autoencoders import tiny_autoencoder
from helpers.made import write_pictures
from helpers.training import TINY, run_here

from d_emo.images.autoencoders import open_vae
from d_emo.images.latent_cache import LatentCache
from d_emo.images.latents import encode_posterior
from d_emo.images.open_source import open_source
from d_emo.train import encode_latents


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures in colour, a grey autoencoder, one in colour."""
    root = tmp_path_factory.mktemp("made")
    write_pictures(root / "pictures", side=16, count=2)
    tiny_autoencoder(in_channels=1, out_channels=1).save_pretrained(root / "grey")
    tiny_autoencoder("AutoencoderTiny").save_pretrained(root / "tiny")
    return root


def encode(capsys, made, vae, folder, *more):
    words = ("--train-data-dir", made / "pictures", "--resolution", 16, "--vae", vae, "--output-dir", folder,
             "--num-workers", 0, *more)  # fmt: skip
    return run_here(capsys, *words, main=encode_latents.main)


def test_pictures_are_encoded_in_the_colours_that_the_autoencoder_takes(capsys, made, tmp_path):
    code, printed = encode(capsys, made, made / "grey", tmp_path / "latents")
    assert code == 0 and "16 x 16 in grey, and their mirror images" in printed
    picture = open_source(str(made / "pictures"), None).read(0).convert("L")
    pixels = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 127.5 - 1)[None, None]
    expected = encode_posterior(open_vae(str(made / "grey")), pixels)[0]
    torch.testing.assert_close(LatentCache(tmp_path / "latents").read(0, False), expected, atol=1e-5, rtol=1e-5)


def test_auto_stands_for_the_default_autoencoder(capsys, made, tmp_path, monkeypatch):
    monkeypatch.setattr("d_emo.train.diffusion.encoding.AUTO_VAE", str(made / "tiny"))
    assert encode(capsys, made, "auto", tmp_path / "latents")[0] == 0
    assert json.loads((tmp_path / "latents" / "manifest.json").read_text())["vae"] == str(made / "tiny")


def test_a_plan_for_a_folder_of_other_latents_is_refused(capsys, made, tmp_path):
    assert encode(capsys, made, made / "grey", tmp_path / "latents")[0] == 0
    code, printed = encode(capsys, made, made / "tiny", tmp_path / "latents", "--dry-run")
    assert code != 0 and "holds other latents: " in printed
    assert "Give the options that it was begun with, or choose another folder." in printed
    assert "autoencoder AutoencoderKL -> AutoencoderTiny" in printed and "of it there already" not in printed
    code, printed = encode(capsys, made, made / "grey", tmp_path / "latents", "--dry-run")
    assert code == 0 and "of it there already" in printed


def test_samples_of_a_model_of_grey_latents_are_scored_against_grey_pictures(capsys, made, tmp_path):
    assert encode(capsys, made, made / "grey", tmp_path / "latents")[0] == 0
    code, printed = run_here(
        capsys, *TINY, "--latents", tmp_path / "latents", "--vae", made / "grey", "--max-train-steps", 1, "--fid-every",
        1, "--fid-images", 4, "--fid-features", "pixels", "--fid-reference", made / "pictures", "--global-batch-size",
        4, "--output-dir", tmp_path / "run", "--kernels", "reference",
    )  # fmt: skip
    assert code == 0 and "Frechet distance (pixels)" in printed, printed
