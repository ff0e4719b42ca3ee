"""Mean and deviation of a data set's latents: against NumPy on all of them at once, whole, or made again."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.autoencoders import tiny_autoencoder
from helpers.damage import DAMAGES
from helpers.made import write_pictures
from helpers.paths import ROOT
from helpers.processes import kill_when, run_script

from d_emo.images import latent_cache
from d_emo.images.autoencoders import LatentSpace, latent_space
from d_emo.images.latent_cache import LatentCache
from d_emo.images.latent_manifest import CacheManifest, LatentCacheError
from d_emo.images.latent_statistics import (
    Moments,
    merged,
    moments_of,
    read_statistics,
    same_scale,
    statistics_at,
    statistics_from,
)
from d_emo.images.latents import draw_latents
from d_emo.train import encode_latents

SPACE = LatentSpace(autoencoder="AutoencoderKL", channels=3, factor=4)
STATISTICS = "statistics.json"


def manifest_of(**changes) -> CacheManifest:
    values = {
        "source": "made up", "fingerprint": "f", "count": 20, "id2label": {}, "resolution": 16, "shape": (3, 4, 4),
        "flips": 2, "dtype": "float32", "vae": "v", "vae_digest": "v", "latent_space": SPACE, "shard_size": 7,
    }  # fmt: skip
    return CacheManifest(**{**values, **changes})


def posteriors(parts: int, offset: float = 0.0) -> np.ndarray:
    """(20, 2, M, 3, 4, 4), of other means and deviations in each channel."""
    random = np.random.RandomState(0)
    scale = np.array([1.0, 5.0, 0.01])[:, None, None]
    values = scale * random.standard_normal((20, 2, parts, 3, 4, 4)) + offset
    values[:, :, 1:] = scale * np.abs(random.standard_normal((20, 2, parts - 1, 3, 4, 4)))
    return values.astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 1000.0], ids=["about zero", "far from zero"])
@pytest.mark.parametrize("parts", [1, 2], ids=["deterministic", "posterior"])
def test_they_equal_the_formula_on_all_values_at_once(parts, offset):
    """E[m] and Var[m] + E[s^2] by NumPy in one piece; relative tolerance 1e-10, at any split."""
    values = posteriors(parts, offset)
    exact = values.astype(np.float64).transpose(2, 3, 0, 1, 4, 5).reshape(parts, 3, -1)
    variance = exact[0].var(axis=1) + (np.square(exact[1]).mean(axis=1) if parts == 2 else 0)
    for size in (1, 3, 20):
        blocks = [values[start : start + size] for start in range(0, 20, size)]
        found = statistics_from(moments_of(blocks), manifest_of()).latent_space
        np.testing.assert_allclose(found.mean, exact[0].mean(axis=1), rtol=1e-10)
        np.testing.assert_allclose(found.std, np.sqrt(variance), rtol=1e-10)
        assert found.measured_on == "made up" and replace(found, mean=(0,), std=(1,), measured_on="") == SPACE


def test_means_alone_would_give_too_small_a_deviation():
    values = posteriors(2)
    whole = statistics_from(moments_of([values]), manifest_of()).latent_space
    of_means = statistics_from(moments_of([values[:, :, :1]]), manifest_of()).latent_space
    assert (np.array(whole.std) > 1.2 * np.array(of_means.std)).all()


def test_latents_that_are_drawn_have_mean_zero_and_deviation_one():
    """Of 640 values a channel, 200 times over: tolerance 1e-2."""
    values = torch.from_numpy(posteriors(2)).flatten(0, 1)
    space = statistics_from(moments_of([posteriors(2)]), manifest_of()).latent_space
    noise = torch.randn(200, 40, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    drawn = torch.stack([draw_latents(space, values, one) for one in noise]).transpose(0, 2).flatten(1)
    assert drawn.mean(1).abs().max() < 1e-2 and (drawn.std(1) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("value", [0.0, 0.1, -3e4, np.inf, np.nan])
def test_a_channel_that_cannot_be_normalised_is_named(value):
    values = posteriors(1)
    values[:, :, :, 1] = value
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="channel 1 of the latents of made up by v has"):
        statistics_from(moments_of([values[:9], values[9:]]), manifest_of())


def test_moments_of_parts_are_those_of_the_whole_in_any_grouping():
    parts = [moments_of([posteriors(2)[start : start + 4]]) for start in range(0, 20, 4)]
    whole, paired = merged(parts), Moments.merged(merged(parts[:2]), merged(parts[2:]))
    assert whole.count == paired.count == 20 * 2 * 16
    np.testing.assert_allclose(paired.mean, whole.mean, rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(paired.squares, whole.squares, rtol=1e-10)


def test_spaces_of_one_scale_are_told_from_others():
    space = replace(SPACE, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert same_scale(space, replace(space, std=(1.0, 2.0, 3.0 * (1 + 1e-9)), measured_on="x"))
    assert not same_scale(space, replace(space, std=(1.0, 2.0, 3.001)))
    assert not same_scale(space, replace(space, mean=(0.1,)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "pictures", side=32, count=4)


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    tiny_autoencoder().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory, pictures, vae):
    """A folder of twelve pictures' latents in three files, measured."""
    return encode(tmp_path_factory.mktemp("measured") / "latents", pictures, vae, "--statistics", "true")


@pytest.fixture
def folder(measured, tmp_path):
    shutil.copytree(measured, tmp_path / "latents")
    return tmp_path / "latents"


def arguments(folder, pictures, vae, *more):
    words = ("--train-data-dir", pictures, "--vae", vae, "--resolution", 32, "--output-dir", folder, "--shard-size", 5,
             "--batch-size", 1, "--num-workers", 0, *more)  # fmt: skip
    return [str(word) for word in words]


def encode(folder, *more):
    encode_latents.main(arguments(folder, *more))
    return folder


def test_the_command_measures_the_latents_that_it_wrote(measured, vae, capsys):
    cache = LatentCache(measured)
    values = torch.stack([cache.read(index, flipped) for index in range(12) for flipped in (False, True)]).double()
    found = cache.statistics.latent_space
    means, deviations = (values[:, part].transpose(0, 1).flatten(1) for part in (0, 1))
    variance = means.var(1, correction=0) + deviations.square().mean(1)
    torch.testing.assert_close(torch.tensor(found.mean).double(), means.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found.std).double(), variance.sqrt(), rtol=1e-5, atol=1e-6)
    assert (cache.statistics.images, cache.statistics.views) == (12, 2) and found.measured_on == "pictures"
    assert latent_space(tiny_autoencoder()) == cache.manifest.latent_space
    assert read_statistics(measured / STATISTICS) == statistics_at(str(measured)) == cache.statistics


def test_a_finished_folder_is_measured_and_not_encoded_again(folder, pictures, vae, capsys):
    expected = (folder / STATISTICS).read_bytes()
    (folder / STATISTICS).unlink()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("[a-z]*")}
    encode(folder, pictures, vae)
    assert LatentCache(folder).statistics is None
    encode(folder, pictures, vae, "--statistics", "true")
    assert (folder / STATISTICS).read_bytes() == expected
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert "measured on 12 images and their mirror images: mean " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_measures_the_same_bits(folder, pictures, vae, tmp_path, processes):
    expected = (folder / STATISTICS).read_bytes()
    (folder / STATISTICS).unlink()
    words = arguments(folder, pictures, vae, "--statistics", "true")
    code, output = run_script(tmp_path / "log", ROOT / "train" / "encode_latents.py", *words, processes=processes)
    assert code == 0, output
    assert (folder / STATISTICS).read_bytes() == expected and output.count("measured on 12 images") == 1


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "deleted"])
def test_damaged_ones_are_refused_by_name_and_measured_again_unasked(folder, pictures, vae, damage, capsys):
    expected = (folder / STATISTICS).read_bytes()
    DAMAGES[damage](folder / STATISTICS)
    with pytest.raises(LatentCacheError, match=r"statistics\.json.*encode_latents"):
        LatentCache(folder)
    encode(folder, pictures, vae)
    printed = capsys.readouterr().out
    assert (folder / STATISTICS).read_bytes() == expected
    assert printed.count("measured again: ") == 1 and "makes damaged files anew" not in printed


def test_damaged_latents_are_made_again_and_the_statistics_stay(folder, pictures, vae):
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".npy", ".json")}
    DAMAGES["flipped bit"](folder / "latents-000000005.npy")
    encode(folder, pictures, vae)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before


KILL_SCRIPT = """
import time
from d_emo.train import encode_latents
from d_emo.train.diffusion import measuring
original = measuring.moments_of
measuring.moments_of = lambda blocks: time.sleep(0.5) or original(blocks)
encode_latents.main({arguments!r})
"""


@pytest.mark.slow
def test_kill_nine_while_measuring_and_a_second_run_give_the_same_bits(folder, pictures, vae, tmp_path):
    expected = (folder / STATISTICS).read_bytes()
    (folder / STATISTICS).unlink()
    (folder / ".lock").unlink(missing_ok=True)
    words = arguments(folder, pictures, vae, "--statistics", "true")
    kill_when(tmp_path / "log", KILL_SCRIPT.format(arguments=words), lambda: (folder / ".lock").exists())
    assert not (folder / STATISTICS).exists()
    encode(folder, pictures, vae, "--statistics", "true")
    assert (folder / STATISTICS).read_bytes() == expected


def test_constant_latents_are_refused_in_one_line(pictures, tmp_path):
    vae = tiny_autoencoder("AutoencoderTiny")
    for parameter in vae.encoder.layers[-1].parameters():
        parameter.data.zero_()
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(SystemExit, match=r"--statistics: channel 0 .* cannot be normalised; use another --vae"):
        encode(tmp_path / "latents", pictures, tmp_path / "vae", "--statistics", "true")
    assert not (tmp_path / "latents" / STATISTICS).exists()


def test_large_files_are_read_in_blocks(folder, monkeypatch):
    manifest = LatentCache(folder).manifest
    shard = range(5, 10)
    monkeypatch.setattr(latent_cache, "BLOCK_BYTES", 2 * manifest.image_bytes)
    found = list(latent_cache.blocks(folder, manifest, shard))
    assert [len(block) for block in found] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(found), np.load(folder / "latents-000000005.npy"))


@pytest.mark.parametrize("place", ["nowhere", "nowhere/statistics.json", "{folder}"])
def test_places_without_statistics_are_named(place, tmp_path):
    name = place.format(folder=tmp_path)
    with pytest.raises(ValueError, match=r"there are no statistics; measure some: .*--statistics true"):
        statistics_at(name)


PHOTOS = "imagenet-one-per-class-256.parquet"


@pytest.mark.parametrize("kind", ["AutoencoderKL", pytest.param("AutoencoderDC", marks=pytest.mark.slow)])
def test_latents_of_photos_are_normalised_to_mean_zero_and_deviation_one(shared, tmp_path, kind):
    """Of ImageNet's photos, drawn, by an autoencoder without statistics: tolerance 1e-2 a channel."""
    without = {"scaling_factor": 1.0, **({"shift_factor": None} if kind == "AutoencoderKL" else {})}
    tiny_autoencoder(kind, **without).save_pretrained(tmp_path / "vae")
    encode_latents.main([
        "--dataset", str(shared / "data" / PHOTOS), "--vae", str(tmp_path / "vae"), "--resolution", "32",
        "--output-dir", str(tmp_path / "latents"), "--num-workers", "0", "--batch-size", "50", "--statistics", "true",
    ])  # fmt: skip
    cache = LatentCache(tmp_path / "latents")
    own, space = cache.manifest.latent_space, cache.statistics.latent_space
    assert cache.manifest.count == 1000 and own.mean == (0.0,) and own.std == (1.0,)
    stored = torch.stack([cache.read(index, flipped) for index in range(1000) for flipped in (False, True)])
    noise = torch.randn(2000, *cache.manifest.shape, generator=torch.Generator().manual_seed(0))
    for chosen, normal in ((space, True), (own, False)):
        drawn = draw_latents(chosen, stored, noise).transpose(0, 1).flatten(1).double()
        off = max(drawn.mean(1).abs().max().item(), (drawn.std(1) - 1).abs().max().item())
        assert (off < 1e-2) == normal, off
