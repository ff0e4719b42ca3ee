"""The whole way on real pictures: encode, train, resume, sample, score, on one process and on two.

The pictures are those of the project's shared folder; the VAE is small and trained here, since none can be downloaded.
"""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from helpers.paths import ROOT, SHARED
from helpers.processes import run_script
from helpers.training import losses, run_here, train_to_the_end

from d_emo import DEMOPipeline
from d_emo.eval import evaluate_fid
from d_emo.images.decode import to_tensor
from d_emo.images.latent_cache import LatentCache
from d_emo.images.tables import datasets_source
from d_emo.train import encode_latents

PHOTOS, SIDE = "imagenet-one-per-class-256.parquet", 32
CIFAR = "cifar10-test.parquet"
# Micro batches of four, so that BatchNorm sees the same on one process and on two.
COMMON = ("--model", "D-EMOv2-N-4", "--global-batch-size", 8, "--micro-batch-size", 4, "--log-every", 1,
          "--sample-every", 6, "--sample-steps", 2, "--samples-per-class", 1, "--report-to", "none", "--num-workers", 0,
          "--learning-rate", "1e-3", "--ema-decay", "0.9")  # fmt: skip


@pytest.fixture(scope="module")
def trained_vae(tmp_path_factory):
    """A VAE of factor 4 that has seen photos for a minute at most: reconstructions are blurred, but of the photo."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared")
    torch.manual_seed(0)
    source = datasets_source(str(SHARED / "data" / PHOTOS), label_column=None)
    photos = torch.stack([to_tensor(source.read(index), 3, SIDE) for index in range(256)])
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=8,
        layers_per_block=1,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    first = last = None
    for step in range(120):
        batch = photos[step * 16 % 256 :][:16]
        posterior = vae.encode(batch).latent_dist
        error = (vae.decode(posterior.sample()).sample - batch).square().mean()
        optimizer.zero_grad()
        (error + 1e-4 * posterior.kl().mean() / batch[0].numel()).backward()
        optimizer.step()
        first, last = first or error.item(), error.item()
    assert last < 0.5 * first
    with torch.no_grad():
        vae.register_to_config(scaling_factor=1 / vae.encode(photos).latent_dist.mean.std().item())
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


def train_in_parts(tmp_path, capsys, data, processes):
    """Six steps, continued after three; the losses, and the folder."""
    folder = tmp_path / f"run-{processes}"
    for more in (("--max-train-steps", 3), ("--max-train-steps", 6, "--resume-from", "latest")):
        arguments = (*COMMON, *data, "--output-dir", folder, *more)
        train_to_the_end(capsys, tmp_path / f"log-{processes}", *arguments, processes=processes)
    return [float(line.split(",")[1]) for line in losses(folder)[1:]], folder


def score(tmp_path, capsys, model, pictures):
    """A FID-like distance of 24 images by the model to the pictures, which must be found."""
    code, printed = run_here(
        capsys, "--model", model, "--preset", "quick", "--num-images", 24, "--steps", 10, "--reference", pictures,
        "--features", "pixels", "--output-dir", tmp_path / "scores", "--cache-dir", tmp_path / "features",
        main=evaluate_fid.main,
    )  # fmt: skip
    assert code == 0, printed
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["scores"]["fid"] > 0


@pytest.mark.slow
def test_photos_through_a_trained_vae(shared, trained_vae, tmp_path, capsys):
    """On one process and on two: the same latents, losses equal to 1e-6, samples and scores."""
    photos = shared / "data" / PHOTOS
    encode = ("--dataset", photos, "--resolution", SIDE, "--vae", trained_vae, "--num-workers", 0, "--shard-size", 300)
    one, two = tmp_path / "latents-1", tmp_path / "latents-2"
    code, printed = run_here(capsys, *encode, "--output-dir", one, main=encode_latents.main)
    assert code == 0 and "1,000 images in" in printed, printed
    script = ROOT / "train" / "encode_latents.py"
    code, printed = run_script(tmp_path / "log", script, *encode, "--output-dir", two, processes=2)
    assert code == 0, printed
    torch.testing.assert_close(LatentCache(one).read(777, True), LatentCache(two).read(777, True), atol=1e-5, rtol=1e-5)

    found = {}
    for processes in (1, 2):
        data = ("--latents", one, "--vae", trained_vae)
        found[processes], folder = train_in_parts(tmp_path, capsys, data, processes)
    assert len(found[1]) == 6 and found[2] == pytest.approx(found[1], rel=1e-6)
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-0000003.png", "step-0000006.png"]
    pipeline = DEMOPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("golden retriever", num_inference_steps=10).images[0]
    assert image.size == (SIDE, SIDE)

    score(tmp_path, capsys, folder, photos)


@pytest.mark.slow
def test_cifar10_in_pixels(shared, tmp_path, capsys):
    """On one process and on two: losses equal to 1e-6, samples and scores."""
    pictures = shared / "data" / CIFAR
    found = {}
    for processes in (1, 2):
        found[processes], folder = train_in_parts(tmp_path, capsys, ("--dataset", pictures), processes)
    assert len(found[1]) == 6 and found[2] == pytest.approx(found[1], rel=1e-6)
    pipeline = DEMOPipeline.from_pretrained(folder)
    assert pipeline.id2label[0] == "airplane" and pipeline.vae is None
    score(tmp_path, capsys, folder, pictures)
