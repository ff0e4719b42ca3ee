"""A vision model's features beside latents: the model's own, training on them as with it, what is refused."""

import shutil

import numpy as np
import pytest
import torch
from helpers.autoencoders import tiny_autoencoder
from helpers.damage import DAMAGES
from helpers.made import write_pictures
from helpers.training import TINY, losses, run_here, train_to_the_end

from d_emo.images.decode import to_tensor
from d_emo.images.features import StoredTeacher, _same_model, are_unfinished, features_manifest
from d_emo.images.latent_cache import LatentCache
from d_emo.images.latent_manifest import FEATURES, LatentCacheError
from d_emo.images.open_source import open_source
from d_emo.train import encode_latents
from d_emo.train.diffusion.teacher import Teacher

TEACHER, SIDE = "digits-classifier", 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures, an autoencoder, latents in files of three images, features in files of four, which are as large."""
    root = tmp_path_factory.mktemp("made")
    write_pictures(root / "pictures", side=SIDE, count=4)
    torch.manual_seed(0)
    tiny_autoencoder().save_pretrained(root / "vae")
    encode_latents.main(words(root, root / "latents", "--align", TEACHER))
    return root


def words(made, folder, *more):
    """Arguments of the encoder; a batch of another size would round otherwise."""
    given = ("--train-data-dir", made / "pictures", "--resolution", SIDE, "--vae", made / "vae", "--num-workers", 0)
    return [str(word) for word in (*given, "--output-dir", folder, "--shard-size", 3, "--batch-size", 1, *more)]


@pytest.fixture
def latents(made, tmp_path):
    """A copy of the folder."""
    return shutil.copytree(made / "latents", tmp_path / "latents")


def test_they_are_the_models_of_both_views(made):
    cache = LatentCache(made / "latents")
    stored = StoredTeacher(TEACHER, cache)
    teacher = Teacher(TEACHER, (cache.manifest.shape[-1] // 2,) * 2)
    assert stored.shape == teacher.shape and stored.digest == teacher.digest and stored.describe().startswith(TEACHER)
    source = open_source(str(made / "pictures"), None)
    for index in (0, 3, source.size - 1):
        view = to_tensor(source.read(index), 3, SIDE)
        for flipped in (False, True):
            expected = teacher.features((view.flip(-1) if flipped else view)[None])[0]
            # Half precision: 2^-11 of a value, and as much of the largest for what is near zero.
            found = stored.read(index, flipped).float().permute(1, 2, 0)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.slow
def test_training_on_them_is_training_with_the_model(made, tmp_path, capsys):
    aligned = ("--align", TEACHER, "--align-block", 2)
    pictures = ("--train-data-dir", made / "pictures", "--resolution", SIDE, "--random-flip", "true")
    latents = ("--latents", made / "latents")
    names = {"fly": (*pictures, *aligned), "stored": (*latents, *aligned), "plain": latents}
    for name, words in names.items():
        length = ("--max-train-steps", 4, "--learning-rate", "1e-3")
        run = (*TINY, "--model", "D-EMOv2-N-2", "--vae", made / "vae", *length)
        printed = train_to_the_end(capsys, tmp_path / "log", *run, "--output-dir", tmp_path / name, *words)
        told = f"alignment  with {TEACHER}, 48 features of 4 x 4 places, from "
        assert (told in printed) == (name == "stored")
    on_the_fly, stored, plain = ([float(line.split(",")[1]) for line in losses(tmp_path / name)[1:]] for name in names)
    # Half precision of the features moves a cosine by less than 1e-3.
    np.testing.assert_allclose(stored, on_the_fly, atol=1e-3)
    assert len(set(stored)) == 4 and min(abs(a - b) for a, b in zip(stored, plain, strict=True)) > 0.01


def test_a_finished_folder_gets_them_and_keeps_its_latents(made, tmp_path, capsys):
    encode_latents.main(words(made, tmp_path / "latents"))
    assert not (tmp_path / "latents" / FEATURES).exists()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("latents-*")}
    capsys.readouterr()
    encode_latents.main(words(made, tmp_path / "latents", "--align", TEACHER, "--dry-run"))
    assert f"features   of {TEACHER}, " in capsys.readouterr().out and not (tmp_path / "latents" / FEATURES).exists()
    encode_latents.main(words(made, tmp_path / "latents", "--align", TEACHER))
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "latents").glob("latents-*")} == before
    for path in (made / "latents" / FEATURES).iterdir():
        assert (tmp_path / "latents" / FEATURES / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_file_is_refused_in_training_and_made_again(made, latents, tmp_path, capsys):
    whole = (latents / FEATURES / "latents-000000004.npy").read_bytes()
    DAMAGES["flipped bit"](latents / FEATURES / "latents-000000004.npy")
    run = ("--latents", latents, "--align", TEACHER, "--output-dir", tmp_path / "run")
    code, printed = run_here(capsys, *TINY, "--model", "D-EMOv2-N-2", *run)
    assert code != 0 and "latents-000000004.npy is damaged" in printed and "Traceback" not in printed
    assert f"These are features: add --align {TEACHER}" in printed
    encode_latents.main(words(made, latents, "--align", TEACHER))
    assert capsys.readouterr().out.count("encoded again: ") == 1
    assert (latents / FEATURES / "latents-000000004.npy").read_bytes() == whole


def test_what_was_interrupted_before_the_last_of_them_is_said_and_gone_on_with(made, latents, tmp_path, capsys):
    (latents / FEATURES / "latents-000000000.npy").unlink()
    run = ("--latents", latents, "--align", TEACHER, "--output-dir", tmp_path / "run")
    code, printed = run_here(capsys, *TINY, "--model", "D-EMOv2-N-2", *run)
    assert code != 0 and "are not encoded yet" in printed and f"add --align {TEACHER}" in printed
    encode_latents.main(words(made, latents))
    assert "features is not complete; --align goes on with it" in capsys.readouterr().out
    manifest = (latents / FEATURES / "manifest.json").read_bytes()
    for damaged in (b"{}", b"[]", b"junk"):
        (latents / FEATURES / "manifest.json").write_bytes(damaged)
        assert are_unfinished(latents)
    (latents / FEATURES / "manifest.json").write_bytes(manifest)
    assert not are_unfinished(made / "latents") and not are_unfinished(tmp_path / "none")
    encode_latents.main(words(made, latents, "--align", TEACHER, "--statistics", "true"))
    printed = capsys.readouterr().out
    assert f"train with --latents {latents} --align {TEACHER}" in printed and "of it there already" in printed
    assert (latents / "statistics.json").is_file() and not (latents / FEATURES / "statistics.json").exists()
    for path in (made / "latents" / FEATURES).iterdir():
        assert (latents / FEATURES / path.name).read_bytes() == path.read_bytes()


@pytest.mark.slow
def test_one_view_is_enough_without_mirroring(made, tmp_path, capsys):
    encode_latents.main(words(made, tmp_path / "latents", "--align", TEACHER, "--random-flip", "false"))
    run = ("--latents", tmp_path / "latents", "--align", TEACHER, "--align-block", 2, "--num-workers", 1)
    log = tmp_path / "log"
    train_to_the_end(capsys, log, *TINY, "--model", "D-EMOv2-N-2", *run, "--vae", made / "vae", "--max-train-steps", 2,
                     "--output-dir", tmp_path / "run")  # fmt: skip
    with pytest.raises(ValueError, match="holds features of other images"):
        (tmp_path / "mixed").mkdir()
        shutil.copytree(made / "latents", tmp_path / "mixed", dirs_exist_ok=True)
        shutil.rmtree(tmp_path / "mixed" / FEATURES)
        shutil.copytree(tmp_path / "latents" / FEATURES, tmp_path / "mixed" / FEATURES)
        StoredTeacher(TEACHER, LatentCache(tmp_path / "mixed"))


def test_features_that_do_not_fit_are_refused_in_one_line(made, latents, tmp_path, capsys):
    def refusal(*more):
        code, printed = run_here(
            capsys, *TINY, "--model", "D-EMOv2-N-2", "--latents", latents, "--output-dir", tmp_path / "run", *more
        )
        assert code != 0 and "Traceback" not in printed and not (tmp_path / "run").exists()
        return printed

    assert f"holds features of {TEACHER}; name that" in refusal("--align", "facebook/dinov2-base")
    folder = other_teacher(tmp_path)
    assert _same_model(str(folder), f"{folder}/.") and not _same_model(str(folder), TEACHER)
    cache = LatentCache(latents)
    manifest = cache.manifest.__class__(**{**vars(cache.manifest), "fingerprint": "other"})
    cache.manifest = manifest
    with pytest.raises(ValueError, match="holds features of other images; remove it"):
        StoredTeacher(TEACHER, cache)
    with pytest.raises(ValueError, match="its features lie in 3 x 4 places"):
        features_manifest(manifest, "x", "y", (3, 4, 8))
    with pytest.raises(SystemExit, match=r"holds other latents: .*vae_digest.* Or remove .*features: "):
        encode_latents.main(words(made, latents, "--align", folder))
    with pytest.raises(LatentCacheError, match=r"features holds a vision model's features, no latents; name .*latents"):
        LatentCache(latents / FEATURES)
    assert "has one token for all of an image" in refusal("--align", TEACHER, "--model", "D-EMOv2-N-8")
    shutil.rmtree(latents / FEATURES)
    printed = refusal("--align", TEACHER)
    assert "there are no features in" in printed and f"--align {TEACHER} adds them" in printed


def other_teacher(folder):
    """A folder of a tiny vision transformer."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "vit")
    return folder / "vit"
