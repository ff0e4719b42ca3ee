"""Latents encoded beforehand: the same training as encoding on the fly, and folders that are whole or refused."""

import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL
from helpers.damage import DAMAGES
from helpers.paths import ROOT
from helpers.processes import kill_when, run_script
from helpers.training import run_here

from d_emo.common.locks import FolderLock
from d_emo.images.autoencoders import latent_space
from d_emo.images.decode import DECODE_VERSION
from d_emo.images.latent_cache import LatentCache
from d_emo.images.latent_manifest import LatentCacheError
from d_emo.images.latents import draw_latents, encode_images
from d_emo.train import encode_latents

COUNT = 11


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory):
    """A small VAE with random weights, factor 2, of which mean and deviation differ from pixel to pixel."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Class folders of random 16 x 16 pictures."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.RandomState(0)
    for index in range(COUNT):
        folder = root / ("cat" if index < 5 else "dog")
        folder.mkdir(exist_ok=True)
        PIL.Image.fromarray(random.randint(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
    return root


def pixels_of(path) -> torch.Tensor:
    """A picture as the VAE takes it, (1, 3, 16, 16) in [-1, 1]."""
    return torch.from_numpy(np.asarray(PIL.Image.open(path))).permute(2, 0, 1)[None] / 127.5 - 1


def encode_arguments(pictures, vae, folder, *more):
    arguments = ("--train-data-dir", pictures, "--resolution", 16, "--vae", vae, "--output-dir", folder)
    return [str(part) for part in (*arguments, "--shard-size", 4, "--batch-size", 3, "--num-workers", 0, *more)]


def encode(*arguments):
    encode_latents.main(encode_arguments(*arguments))
    return LatentCache(arguments[2])


@pytest.fixture(scope="module")
def encoded(pictures, vae_folder, tmp_path_factory):
    """Folders of latents, of both views and of one, which nothing changes."""
    root = tmp_path_factory.mktemp("encoded")
    encode(pictures, vae_folder, root / "latents")
    encode(pictures, vae_folder, root / "unmirrored", "--random-flip", "false")
    return root


@pytest.fixture
def latents(encoded, tmp_path):
    """Latents of both views, for a test to change."""
    return shutil.copytree(encoded / "latents", tmp_path / "latents")


def test_moments_of_both_views_are_the_vaes(pictures, vae_folder, encoded):
    cache = LatentCache(encoded / "latents")
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    assert cache.manifest.shape == (4, 8, 8) and cache.manifest.id2label == {"0": "cat", "1": "dog"}
    np.testing.assert_array_equal(cache.labels, [0] * 5 + [1] * 6)
    for index, path in enumerate(sorted(pictures.rglob("*.png"))):
        pixels = pixels_of(path)
        for flipped in (False, True):
            posterior = vae.encode(pixels.flip(-1) if flipped else pixels).latent_dist
            found = cache.read(index, flipped)
            # A batch of another size rounds differently: tolerance 1e-5.
            torch.testing.assert_close(found[0], posterior.mean[0].detach(), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[1], posterior.std[0].detach(), atol=1e-5, rtol=1e-5)
    assert (cache.read(0, False) - cache.read(0, True)).abs().max() > 0.01


def test_drawing_from_stored_moments_equals_encoding(pictures, vae_folder, encoded):
    cache = LatentCache(encoded / "latents")
    vae = AutoencoderKL.from_pretrained(vae_folder).eval()
    pixels = (
        torch.from_numpy(np.asarray(PIL.Image.open(pictures / "cat" / "00.png"))).permute(2, 0, 1)[None] / 127.5 - 1
    )
    noise = torch.randn(1, 4, 8, 8)
    posterior, space = cache.read(0, False)[None], latent_space(vae)
    stored = draw_latents(space, posterior, noise)
    torch.testing.assert_close(stored, encode_images(vae, space, pixels, noise), atol=1e-5, rtol=1e-5)
    mean = vae.encode(pixels).latent_dist.mean.detach()
    torch.testing.assert_close(draw_latents(space, posterior, 0 * noise), (mean - 0.1) * 0.5, atol=1e-5, rtol=1e-5)


def train(capsys, folder, vae, *data):
    code, printed = run_here(
        capsys, *data, "--vae", vae, "--model", "D-EMOv2-N-2", "--output-dir", folder, "--max-train-steps", 4,
        "--global-batch-size", 4, "--log-every", 1, "--sample-every", 0, "--report-to", "none", "--num-workers", 0,
        "--learning-rate", "1e-3",
    )  # fmt: skip
    assert code == 0, printed
    rows = (folder / "train_log.csv").read_text().splitlines()[1:]
    return [float(row.split(",")[1]) for row in rows]


def test_training_on_latents_equals_encoding_on_the_fly(capsys, pictures, vae_folder, encoded, tmp_path):
    on_the_fly = train(
        capsys, tmp_path / "fly", vae_folder, "--train-data-dir", pictures, "--resolution", 16, "--random-flip", "true"
    )
    cached = train(capsys, tmp_path / "cached", vae_folder, "--latents", encoded / "latents")
    assert len(cached) == 4
    # Same images, mirror images, noise and draws; only the VAE's batches differ. Tolerance 1e-5.
    np.testing.assert_allclose(cached, on_the_fly, rtol=1e-5)


def test_half_precision_is_close(pictures, vae_folder, encoded, tmp_path):
    exact = LatentCache(encoded / "latents")
    half = encode(pictures, vae_folder, tmp_path / "half", "--dtype", "float16")
    assert (tmp_path / "half" / "latents-000000000.npy").stat().st_size < 0.55 * (
        (encoded / "latents" / "latents-000000000.npy").stat().st_size
    )
    torch.testing.assert_close(half.read(3, True), exact.read(3, True), atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_write_the_same_files(pictures, vae_folder, tmp_path):
    one = encode(pictures, vae_folder, tmp_path / "one")
    script = ROOT / "train" / "encode_latents.py"
    arguments = encode_arguments(pictures, vae_folder, tmp_path / "two")
    code, output = run_script(tmp_path / "log", script, *arguments, processes=2)
    assert code == 0, output
    two = LatentCache(tmp_path / "two")
    for index in range(COUNT):
        torch.testing.assert_close(one.read(index, True), two.read(index, True), atol=1e-5, rtol=1e-5)


KILL_SCRIPT = """
import time
from d_emo.train import encode_latents
from d_emo.train.diffusion import encoding
original = encoding.encode_posterior
encoding.encode_posterior = lambda *a: time.sleep(0.3) or original(*a)
encode_latents.main({arguments!r})
"""


@pytest.mark.slow
def test_kill_nine_and_a_second_run_give_the_same_latents(pictures, vae_folder, tmp_path):
    whole = encode(pictures, vae_folder, tmp_path / "whole")
    arguments = encode_arguments(pictures, vae_folder, tmp_path / "killed")
    code = KILL_SCRIPT.format(arguments=arguments)
    kill_when(tmp_path / "log", code, lambda: any((tmp_path / "killed").glob("latents-*")))
    with pytest.raises(LatentCacheError, match=r"of 11 images are not encoded yet \(first missing file latents-0"):
        LatentCache(tmp_path / "killed")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("latents-*")}
    resumed = encode(pictures, vae_folder, tmp_path / "killed")
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    for index in range(COUNT):
        torch.testing.assert_close(resumed.read(index, False), whole.read(index, False), atol=1e-5, rtol=1e-5)


def test_damaged_and_foreign_folders_are_refused(pictures, vae_folder, latents, tmp_path):
    folder = latents
    path = folder / "latents-000000004.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(LatentCacheError, match=r"latents-000000004\.npy is damaged"):
        LatentCache(folder)
    with path.open("wb") as file:
        np.save(file, np.zeros((4, 2, 2, 4, 8, 9), dtype=np.float32))
    with pytest.raises(LatentCacheError, match=r"holds float32 \(4, 2, 2, 4, 8, 9\), not float32 \(4, 2, 2, 4, 8, 8\)"):
        LatentCache(folder)
    with pytest.raises(SystemExit, match=r"holds other latents: dtype 'float32' -> 'float16'"):
        encode(pictures, vae_folder, folder, "--dtype", "float16")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit, match="is not empty and holds no latents"):
        encode(pictures, vae_folder, tmp_path / "other")
    with pytest.raises(LatentCacheError, match=r"there are no latents \(no manifest\.json\)"):
        LatentCache(tmp_path)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(LatentCacheError, match="is damaged"):
        LatentCache(folder)


@pytest.mark.parametrize("stored", [None, 1, 3])
def test_latents_of_another_decode_rule_are_refused_with_the_command_that_renews_them(
    capsys, pictures, vae_folder, latents, tmp_path, stored
):
    folder = latents
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.pop("decode_version") == DECODE_VERSION
    manifest |= {} if stored is None else {"decode_version": stored}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    command = (
        rf"rule {stored or 1}, now there is rule {DECODE_VERSION}.*python train/encode_latents\.py --vae .* --reso"
    )
    with pytest.raises(LatentCacheError, match=command):
        LatentCache(folder)
    code, printed = run_here(capsys, "--latents", folder, "--vae", vae_folder, "--output-dir", tmp_path / "run")
    assert code != 0 and "encode_latents.py" in printed and not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match=command):
        encode(pictures, vae_folder, folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latents", "nowhere"], "--latents nowhere: nowhere: there are no latents"),
        (["--latents", "{latents}", "--resolution", "32"], "the latents are of 16 x 16 images"),
        (["--latents", "{latents}", "--vae", "none"], "the latents were made by another VAE"),
        (["--latents", "{unmirrored}", "--vae", "{vae}", "--random-flip", "true"], "hold no mirror images"),
        (["--latents", "{latents}", "--train-data-dir", "x"], "--train-data-dir and --latents are both given"),
    ],
)
def test_latents_that_do_not_fit_the_run_are_refused(capsys, vae_folder, encoded, tmp_path, arguments, message):
    places = {"latents": encoded / "latents", "unmirrored": encoded / "unmirrored", "vae": vae_folder}
    code, printed = run_here(capsys, *(text.format(**places) for text in arguments), "--output-dir", tmp_path / "run")
    assert code != 0 and message in printed and not (tmp_path / "run").exists()


def test_unreadable_images_stop_or_are_replaced_with_their_label(pictures, vae_folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    for path in sorted(pictures.rglob("*.png")):
        target = broken / path.relative_to(pictures)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"no picture" if path.name == "04.png" else path.read_bytes())
    with pytest.raises(SystemExit, match=r"04\.png cannot be read.*--on-bad-image skip"):
        encode(broken, vae_folder, tmp_path / "stop")
    cache = encode(broken, vae_folder, tmp_path / "skip", "--on-bad-image", "skip")
    assert cache.labels[4] == 1 and cache.labels[3] == 0  # the next readable one is a dog
    torch.testing.assert_close(cache.read(4, False), cache.read(5, False), atol=1e-5, rtol=1e-5)
    assert json.loads((tmp_path / "skip" / "replaced-000000004.json").read_text()) == {"4": 5}


def test_mistakes_of_the_command_end_with_one_line(tmp_path):
    for arguments, message in (
        (["--train-data-dir", "x"], "--output-dir is missing"),
        (["--output-dir", "x", "--vae", "none"], "latents are what a VAE makes"),
        (["--output-dir", "x", "--dtype", "int8"], "use one of float32, float16"),
        (["--output-dir", "x", "--batchsize", "3"], "did you mean batch_size"),
    ):
        with pytest.raises(SystemExit, match=message):
            encode_latents.main(arguments)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".npy", ".json")}


def test_a_second_run_makes_damaged_files_again_and_no_others(pictures, vae_folder, tmp_path, capsys):
    folder = tmp_path / "latents"
    arguments = (pictures, vae_folder, folder, "--batch-size", 1)  # or a batch of another size would round otherwise
    encode(*arguments)
    whole = contents(folder)
    for damages in (
        {"latents-000000000.npy": "flipped bit", "latents-000000008.npy": "folder", "labels.npy": "flipped bit"},
        {"latents-000000000.npy": "cut short", "checksums-000000008.json": "deleted", "labels.npy": "deleted"},
    ):
        kept = (folder / "latents-000000004.npy").stat().st_mtime_ns
        for name, damage in damages.items():
            DAMAGES[damage](folder / name)
        with pytest.raises(LatentCacheError):
            LatentCache(folder)
        capsys.readouterr()
        encode(*arguments)
        assert contents(folder) == whole
        printed = capsys.readouterr().out
        assert printed.count("encoded again: ") == 2 and "run train/encode_latents.py again" not in printed
        assert (folder / "latents-000000004.npy").stat().st_mtime_ns == kept


def test_training_on_damaged_latents_ends_with_one_line(capsys, latents, tmp_path):
    DAMAGES["flipped bit"](latents / "latents-000000004.npy")
    code, printed = run_here(capsys, "--latents", latents, "--output-dir", tmp_path / "run")
    assert code != 0 and "latents-000000004.npy is damaged" in printed and "--latents" in printed
    assert "Traceback" not in printed and not (tmp_path / "run").exists()


def test_two_that_encode_into_one_folder_are_kept_apart(pictures, vae_folder, tmp_path):
    with (
        FolderLock(tmp_path / "latents"),
        pytest.raises(SystemExit, match=r"--output-dir .*latents is in use by .* or name another"),
    ):
        encode(pictures, vae_folder, tmp_path / "latents")
    encode(pictures, vae_folder, tmp_path / "latents")


def test_latents_that_are_not_finite_are_not_written(pictures, vae_folder, tmp_path):
    vae = AutoencoderKL.from_pretrained(vae_folder)
    vae.quant_conv.bias.data.fill_(float("nan"))
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(SystemExit, match=r"--vae .*: its latents of image 0 are NaN or infinite"):
        encode(pictures, tmp_path / "vae", tmp_path / "latents")
    assert not list((tmp_path / "latents").glob("latents-*"))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_wherever_it_is_read(pictures, vae_folder, tmp_path, workers):
    shutil.copytree(pictures, tmp_path / "broken")
    (tmp_path / "broken" / "cat" / "04.png").write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"04\.png cannot be read .*--on-bad-image skip"):
        encode(tmp_path / "broken", vae_folder, tmp_path / "latents", "--num-workers", workers)
