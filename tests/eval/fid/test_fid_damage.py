"""Samples, features and reports as disks and other runs leave them: made again, waited for, or refused in one line."""

import functools

import numpy as np
import pytest
from accelerate import Accelerator
from helpers.damage import DAMAGES
from helpers.pipelines import tiny_pipeline
from helpers.processes import Script
from helpers.training import run_here

from d_emo.common.locks import FolderLock
from d_emo.eval import evaluate_fid
from d_emo.eval.fid import archives, features, sampling
from d_emo.eval.fid.extractors import PixelExtractor
from d_emo.eval.fid.features import compute_features
from d_emo.eval.fid.image_sets import ImageSet, open_set
from d_emo.eval.fid.protocol import SamplingSettings
from d_emo.eval.fid.references import load_reference
from d_emo.eval.fid.report import load_entries
from d_emo.eval.fid.sampling import sample_images


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def picture_set(count=20) -> ImageSet:
    images = np.random.RandomState(0).randint(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return ImageSet("pictures", images.shape, lambda start, stop: images[start:stop], "some")


def other_features(path):
    """A file of other images, whole in itself."""
    archives.write_arrays(path, pool=np.zeros((3, 48), dtype=np.float32))


def nan_features(path):
    archives.write_arrays(path, pool=np.full((5, 48), np.nan, dtype=np.float32))


@pytest.mark.parametrize("damage", [*DAMAGES.values(), other_features, nan_features])
def test_damaged_features_are_computed_again_and_others_are_kept(tmp_path, accelerator, monkeypatch, damage, capsys):
    monkeypatch.setattr(features, "SHARD_SIZE", 5)
    compute = functools.partial(compute_features, picture_set(), PixelExtractor(), tmp_path, accelerator)
    store = compute()
    expected = store.load("pool")
    paths = [store.files.path(shard) for shard in store.shards]
    kept = [path.stat().st_mtime_ns for path in paths]
    damage(paths[2])
    again = compute()
    np.testing.assert_array_equal(again.load("pool"), expected)
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, kept, strict=True)] == [1, 1, 0, 1]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_moments_are_computed_again(tmp_path, accelerator, damage):
    store = compute_features(picture_set(), PixelExtractor(), tmp_path, accelerator)
    expected = store.moments("pool", accelerator)
    DAMAGES[damage](store.folder / "moments-pool.npz")
    for _ in range(2):
        found = store.moments("pool", accelerator)
        np.testing.assert_array_equal(found.mean, expected.mean)
        np.testing.assert_array_equal(found.covariance, expected.covariance)
    assert (store.folder / "moments-pool.npz").is_file()


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_lies_in_the_place_of_a_store_is_replaced_and_links_are_not_followed(tmp_path, accelerator, kind):
    store = compute_features(picture_set(), PixelExtractor(), tmp_path / "first", accelerator)
    (tmp_path / "second").mkdir()
    (tmp_path / "elsewhere").mkdir()
    place = tmp_path / "second" / store.folder.name
    place.write_text("a file") if kind == "file" else place.symlink_to(tmp_path / "elsewhere")
    again = compute_features(picture_set(), PixelExtractor(), tmp_path / "second", accelerator)
    np.testing.assert_array_equal(again.load("pool"), store.load("pool"))
    assert not list((tmp_path / "elsewhere").iterdir())


WAITING = """
from pathlib import Path
from accelerate import Accelerator
from d_emo.eval.fid.extractors import PixelExtractor
from d_emo.eval.fid.features import compute_features
from d_emo.eval.fid.image_sets import open_set
compute_features(open_set("digits"), PixelExtractor(), Path({folder!r}), Accelerator(cpu=True))
print("done")
"""


@pytest.mark.slow
def test_a_second_run_waits_for_a_reference_and_finds_it_made(tmp_path, accelerator):
    store = compute_features(open_set("digits"), PixelExtractor(), tmp_path / "cache", accelerator)
    made = {path: path.stat().st_mtime_ns for path in store.folder.glob("features-*")}
    lock = FolderLock(store.folder)
    with Script(tmp_path / "log", "-c", WAITING.format(folder=str(tmp_path / "cache"))) as waiting:
        waiting.wait_until(lambda: "waiting for process" in waiting.output)
        assert "done" not in waiting.output and store.folder.name in waiting.output
        lock.release()
        assert waiting.finish() == 0 and "done" in waiting.output and "Traceback" not in waiting.output
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())


def other_samples(path):
    archives.write_arrays(path, arr_0=np.zeros((5, 8, 8, 3), dtype=np.uint8), labels=np.zeros(5, dtype=np.int64))


def other_classes(path):
    stored = archives.read_array(path, "arr_0")
    archives.write_arrays(path, arr_0=stored, labels=archives.read_array(path, "labels") + 1)


@pytest.mark.parametrize("damage", [*DAMAGES.values(), other_samples, other_classes])
def test_damaged_samples_are_drawn_again_and_others_are_kept(tmp_path, accelerator, monkeypatch, damage):
    monkeypatch.setattr(sampling, "SHARD_SIZE", 5)
    settings = SamplingSettings(num_images=13, steps=10, sampler="fast")
    draw = functools.partial(sample_images, tiny_pipeline(), settings, tmp_path, accelerator, 5)
    expected = draw().read(0, 13)
    paths = sorted((tmp_path / "samples").glob("samples-*"))
    kept = [path.stat().st_mtime_ns for path in paths]
    damage(paths[1])
    np.testing.assert_array_equal(draw().read(0, 13), expected)
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, kept, strict=True)] == [1, 0, 1]


@pytest.mark.parametrize("damage", ["flipped bit", "cut short", "empty", "overwritten"])
def test_damaged_samples_of_others_are_refused_by_name(tmp_path, accelerator, monkeypatch, damage):
    monkeypatch.setattr(sampling, "SHARD_SIZE", 5)
    settings = SamplingSettings(num_images=13, steps=10, sampler="fast")
    sample_images(tiny_pipeline(), settings, tmp_path, accelerator, 5)
    DAMAGES[damage](tmp_path / "samples" / "samples-00000005.npz")
    with pytest.raises(ValueError, match=r"samples-00000005\.npz"):
        open_set(str(tmp_path)).read(0, 13)


def evaluate(capsys, tmp_path, *more):
    arguments = ("--reference", "digits", "--features", "pixels", "--metrics", "fid", "--cache-dir", tmp_path / "cache")
    return run_here(capsys, *arguments, "--output-dir", tmp_path / "out", *more, main=evaluate_fid.main)


@pytest.fixture
def few(tmp_path):
    archives.write_images(tmp_path / "few.npz", [open_set("digits").read(0, 30)], (30, 16, 16, 3))
    return tmp_path / "few.npz"


def test_two_evaluations_of_one_folder_are_kept_apart(capsys, tmp_path, few):
    with FolderLock(tmp_path / "out"):
        code, printed = evaluate(capsys, tmp_path, "--samples", few)
    assert code != 0 and "out is in use by this process; wait until it is done, or name another" in printed
    code, printed = evaluate(capsys, tmp_path, "--samples", few)
    assert code == 0, printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--export-npz", "{tmp}"], "is a folder; name a file in it"),
        (["--export-npz", "{tmp}/few.npz"], "is --samples, which it would overwrite"),
        (["--export-npz", "{tmp}/few.npz/x.npz"], "few.npz is no folder; name another place"),
        (["--output-dir", "{tmp}/few.npz"], "few.npz is no folder; name another"),
        (["--cache-dir", "{tmp}/few.npz"], "few.npz is no folder; name another"),
        (["--inception-weights", "{tmp}/none.pth"], "--inception-weights {tmp}/none.pth: there is no such file"),
        (["--reference", "{tmp}/none"], "--reference {tmp}/none: there is no such folder"),
        (["--samples", "{tmp}/none.npz"], "--samples {tmp}/none.npz: there is no such file"),
        (["--reference", ""], "--reference is empty"),
        (["--num-workers", "-1"], "--num-workers: -1 is not a whole number from 0 on"),
    ],
)
def test_what_could_not_be_written_or_read_is_found_before_anything_is_computed(
    capsys, tmp_path, few, monkeypatch, arguments, message
):
    monkeypatch.setattr(PixelExtractor, "__call__", lambda *_: pytest.fail("features were computed"))
    filled = [text.format(tmp=tmp_path) for text in arguments]
    samples = [] if "--samples" in filled else ["--samples", few]
    code, printed = evaluate(capsys, tmp_path, *samples, *filled)
    assert code != 0 and message.format(tmp=tmp_path) in printed and "Traceback" not in printed
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_through_links(capsys, tmp_path, few):
    (tmp_path / "other").mkdir()
    (tmp_path / "target").write_text("precious")
    (tmp_path / "out").mkdir()
    names = ("scores.json", "report.html", "samples.png")
    for name in names:
        (tmp_path / "out" / name).symlink_to(tmp_path / "target")
    (tmp_path / "adm.npz").symlink_to(tmp_path / "target")
    code, printed = evaluate(capsys, tmp_path, "--samples", few, "--export-npz", tmp_path / "adm.npz")
    assert code == 0, printed
    assert (tmp_path / "target").read_text() == "precious"
    assert not any((tmp_path / "out" / name).is_symlink() for name in names)
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "features").symlink_to(tmp_path / "other")
    code, printed = evaluate(capsys, tmp_path, "--samples", few, "--output-dir", tmp_path / "again")
    assert code != 0 and "a link lies there, and nothing is written through links" in printed
    assert not list((tmp_path / "other").iterdir())


FULL = """
import resource, sys
from d_emo.eval import evaluate_fid
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
evaluate_fid.main({arguments!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "file"), [(8000, "features-00000000.npz"), (5000, "samples-00000000.npz")])
def test_a_disk_that_takes_no_more_ends_with_one_line_and_what_is_kept(tmp_path, accelerator, limit, file, few):
    model, arguments = tmp_path / "model", ["--samples", str(few)]
    if file.startswith("samples"):
        tiny_pipeline(flow=True, in_channels=1, num_classes=10).save_pretrained(model)
        arguments = ["--model", str(model), "--preset", "quick", "--num-images", "60", "--steps", "2"]
    for channels in (1, 3):  # the reference's features are there
        load_reference("digits", PixelExtractor(), tmp_path / "cache", accelerator, size=(16, 16), channels=channels)
    arguments += ["--reference", "digits", "--features", "pixels", "--metrics", "fid", "--cache-dir",
                  str(tmp_path / "cache"), "--output-dir", str(tmp_path / "full")]  # fmt: skip
    with Script(tmp_path / "log", "-c", FULL.format(limit=limit, arguments=arguments)) as running:
        assert running.finish() == 1
        assert f"{file}: File too large" in running.output and "goes on from here" in running.output
        assert "Traceback" not in running.output and "Exception ignored" not in running.output
    assert not list((tmp_path / "full").rglob(".partial*"))


@pytest.mark.parametrize("damage", ["cut short", "empty", "overwritten"])
def test_damaged_scores_of_a_step_are_left_out_aloud(capsys, tmp_path, few, damage):
    for step in (1, 2):
        code, printed = evaluate(
            capsys, tmp_path, "--samples", few, "--output-dir", tmp_path / f"fid/step-000000{step}"
        )
        assert code == 0, printed
    assert [entry.step for entry in load_entries(tmp_path / "fid", "run")] == [1, 2]
    DAMAGES[damage](tmp_path / "fid" / "step-0000001" / "scores.json")
    assert [entry.step for entry in load_entries(tmp_path / "fid", "run")] == [2]
    assert "left out: " in capsys.readouterr().out
