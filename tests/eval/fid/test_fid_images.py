"""Sets of images, .npz files and references: what is read, what is refused, what is noted."""

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from helpers.processes import kill_when

from d_emo.eval.fid import archives, features, image_sets
from d_emo.eval.fid.extractors import FeatureExtractor, InceptionExtractor, PixelExtractor, make_extractor
from d_emo.eval.fid.features import compute_features
from d_emo.eval.fid.image_sets import ImageSet, open_set
from d_emo.eval.fid.metrics import moments_of
from d_emo.eval.fid.references import load_reference


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


class FakeInception(FeatureExtractor):
    """Random projections with Inception's layers, for tests of what surrounds the network."""

    name, identity, layers, published = "inception", "fake", ("pool", "spatial", "logits"), True

    def __call__(self, images):
        pixels = images.flatten(1).float() / 255
        generator = torch.Generator().manual_seed(0)
        sizes = {"pool": 2048, "spatial": 2023, "logits": 1008}
        return {name: pixels @ torch.randn(pixels.shape[1], size, generator=generator) for name, size in sizes.items()}


def random_images(count: int, side: int = 8, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (count, side, side, channels), dtype=np.uint8)


def save_folder(folder, images, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        PIL.Image.fromarray(image).save(folder / f"{index:03d}{suffix}")
    return folder


# --- .npz files


def test_images_written_for_adm_are_what_numpy_and_this_package_read(tmp_path):
    images, path = random_images(10), tmp_path / "out" / "samples.npz"
    archives.write_images(path, (images[start : start + 4] for start in range(0, 10, 4)), images.shape)
    with np.load(path, allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]  # no statistics: the original evaluator would believe them
        np.testing.assert_array_equal(archive["arr_0"], images)
    opened = open_set(str(path))
    assert opened.shape == images.shape
    order = np.random.RandomState(0).permutation(10)  # as of folders
    np.testing.assert_array_equal(opened.read(3, 9), images[order][3:9])
    assert isinstance(archives.map_images(path), np.memmap)


def test_grey_images_are_exported_in_three_channels(tmp_path):
    images, path = random_images(3, channels=1), tmp_path / "grey.npz"
    archives.write_images(path, [images], (3, 8, 8, 3))
    np.testing.assert_array_equal(np.load(path)["arr_0"], images.repeat(3, axis=3))


def test_a_reference_takes_the_samples_channels(tmp_path):
    folder = save_folder(tmp_path / "colour", random_images(6))
    colour, extractor = open_set(str(folder)), PixelExtractor()
    luma = (colour.read(0, 6) @ np.array([0.299, 0.587, 0.114])).round()  # ITU-R 601, within a grey level
    for channels in (1, 3):
        reference = load_reference(
            str(folder), extractor, tmp_path / "cache", Accelerator(cpu=True), size=(8, 8), channels=channels
        )
        assert reference.images is not None and reference.images.shape == (6, 8, 8, channels)
        read = reference.images.read(0, 6)
        assert read.dtype == np.uint8
        expected = luma[..., None] if channels == 1 else colour.read(0, 6)
        assert np.abs(read.astype(float) - expected).max() <= (1 if channels == 1 else 0)
    assert colour.with_channels(4) is colour  # latents of a model without a decoder
    grey = colour.with_channels(1)
    np.testing.assert_array_equal(grey.with_channels(3).read(2, 5), grey.read(2, 5).repeat(3, axis=3))
    assert len({colour.fingerprint, grey.fingerprint, grey.with_channels(3).fingerprint}) == 3


def test_stored_and_compressed_files_give_the_same_images(tmp_path):
    images = random_images(5)
    np.savez(tmp_path / "stored.npz", images, ignored=np.zeros(3))
    np.savez_compressed(tmp_path / "compressed.npz", images)
    for name in ("stored", "compressed"):
        order = np.random.RandomState(0).permutation(5)
        np.testing.assert_array_equal(open_set(str(tmp_path / f"{name}.npz")).read(0, 5), images[order])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": random_images(2)}, "has no images: there is no 'arr_0' among images"),
        ({"arr_0": random_images(2).astype(np.float32)}, "float32 of shape"),
        ({"arr_0": random_images(2).transpose(0, 3, 1, 2)}, r"uint8 of shape \(2, 3, 8, 8\)"),
        ({"arr_0": random_images(2)[:0]}, "holds no images"),
    ],
)
def test_wrong_archives_are_refused_by_name_and_rule(tmp_path, content, message):
    np.savez(tmp_path / "wrong.npz", **content)
    with pytest.raises(ValueError, match=message):
        open_set(str(tmp_path / "wrong.npz"))


def test_pickled_and_broken_archives_are_refused(tmp_path, accelerator):
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="'mu' cannot be read"):
        load_reference(str(tmp_path / "objects.npz"), FakeInception(), tmp_path, accelerator)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut short")
    for source in ("cut.npz", "absent.npz"):
        with pytest.raises(ValueError, match=r"is not an \.npz file|there is no such file"):
            open_set(str(tmp_path / source))


# --- folders, tables


def test_folders_are_read_whole_in_a_fixed_shuffled_order(tmp_path):
    images = random_images(12)
    save_folder(tmp_path / "a", images[:6])
    save_folder(tmp_path / "b", images[6:])
    opened = open_set(str(tmp_path))
    found = opened.read(0, 12)
    assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in images)
    assert not np.array_equal(found, images)
    np.testing.assert_array_equal(opened.read(4, 7), found[4:7])
    assert any("shuffled order" in note for note in opened.notes)
    assert opened.first(5).fingerprint != opened.fingerprint
    with pytest.raises(ValueError, match="has 12 images; 13 of them"):
        opened.first(13)


def test_a_changed_picture_changes_the_hash(tmp_path):
    save_folder(tmp_path, random_images(3))
    before = open_set(str(tmp_path)).fingerprint
    save_folder(tmp_path, random_images(3, seed=1)[:1])
    assert open_set(str(tmp_path)).fingerprint != before


def test_bad_folders_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="there are no images in this folder"):
        open_set(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"there is no such folder, \.npz or \.parquet file"):
        open_set(str(tmp_path / "nowhere"))
    save_folder(tmp_path / "mixed", [*random_images(3), random_images(1, side=9)[0]])
    with pytest.raises(ValueError, match=r"of several sizes cannot be scored"):
        open_set(str(tmp_path / "mixed")).read(0, 4)
    broken = save_folder(tmp_path / "broken", random_images(1))
    (broken / "000.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"000\.png cannot be read .*repair or remove it"):
        open_set(str(broken))


def test_references_are_cropped_to_the_samples_size_as_adm_prepares_images(tmp_path):
    save_folder(tmp_path, [*random_images(2), *random_images(2, side=20)])
    assert open_set(str(tmp_path), size=(8, 8)).read(0, 4).shape == (4, 8, 8, 3)


@pytest.mark.parametrize("height_width", [(48, 16), (16, 48), (12, 20)])
@pytest.mark.parametrize("reference", ["folder", "npz", "larger folder"])
def test_samples_of_unequal_sides_are_compared_with_references_of_their_shape(
    tmp_path, accelerator, height_width, reference
):
    height, width = height_width
    images = np.random.RandomState(0).randint(0, 256, (12, height, width, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", images)
    np.savez(tmp_path / "reference.npz", images)
    save_folder(tmp_path / "folder", images)
    save_folder(tmp_path / "larger folder", images.repeat(2, axis=1).repeat(2, axis=2))
    samples = open_set(str(tmp_path / "samples.npz"))
    source = str(tmp_path / ("reference.npz" if reference == "npz" else reference))
    loaded = load_reference(source, PixelExtractor(), tmp_path / "cache", accelerator, size=samples.shape[1:3])
    assert loaded.images.shape == samples.shape
    moments = compute_features(samples, PixelExtractor(), tmp_path / "own", accelerator).moments("pool", accelerator)
    np.testing.assert_allclose(moments.mean, loaded.moments["pool"].mean, atol=1e-6)  # so that their distance is 0


def test_an_archive_sorted_by_class_is_shuffled_as_a_folder_is(tmp_path):
    images = np.repeat(np.arange(50, dtype=np.uint8), 20)[:, None, None, None] * np.ones((1, 2, 2, 3), dtype=np.uint8)
    np.savez(tmp_path / "sorted.npz", images)
    opened = open_set(str(tmp_path / "sorted.npz"))
    for start in range(0, 1000, 100):  # a tenth, as the Inception Score takes it, has more than its five classes
        assert len(np.unique(opened.read(start, start + 100))) > 30
    np.testing.assert_array_equal(np.sort(opened.read(0, 1000)[:, 0, 0, 0]), images[:, 0, 0, 0])
    assert any("shuffled order" in note for note in opened.notes)


def test_another_decode_rule_makes_features_again(tmp_path, monkeypatch, accelerator):
    folder = save_folder(tmp_path / "pictures", random_images(3))
    stores = []
    for version in (1, 2, 2):
        monkeypatch.setattr(image_sets, "DECODE_VERSION", version)
        stores.append(compute_features(open_set(str(folder)), PixelExtractor(), tmp_path / "cache", accelerator).folder)
    assert stores[0] != stores[1] == stores[2]


def test_jpeg_samples_are_warned_of(tmp_path):
    assert any("JPEG" in note for note in open_set(str(save_folder(tmp_path, random_images(2), ".jpg"))).notes)


def test_parquet_tables_are_opened(tmp_path, offline):
    import datasets

    pictures = [PIL.Image.fromarray(image) for image in random_images(4)]
    datasets.Dataset.from_dict({"picture": pictures}).cast_column("picture", datasets.Image()).to_parquet(
        tmp_path / "table.parquet"
    )
    assert open_set(str(tmp_path / "table.parquet"), image_column="picture").shape == (4, 8, 8, 3)
    # Where no "image" is there, the only column of that type is meant; a named one must exist.
    assert open_set(str(tmp_path / "table.parquet")).shape == (4, 8, 8, 3)
    with pytest.raises(ValueError, match="no column 'photo' among picture; set --image-column"):
        open_set(str(tmp_path / "table.parquet"), image_column="photo")


# --- references


def adm_file(path, count=40, **extra):
    """A file like ADM's references: statistics of other images than the ones it holds."""
    features = FakeInception()(torch.from_numpy(random_images(60, seed=9)).permute(0, 3, 1, 2))
    pool, spatial = (moments_of(features[name].numpy()) for name in ("pool", "spatial"))
    arrays = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    np.savez(path, arr_0=random_images(count), unknown=np.arange(3), **{**arrays, **extra})
    return pool, spatial


def test_adm_statistics_replace_those_of_the_files_images(tmp_path, accelerator):
    pool, spatial = adm_file(tmp_path / "adm.npz")
    reference = load_reference(str(tmp_path / "adm.npz"), FakeInception(), tmp_path / "cache", accelerator)
    assert reference.adm_statistics and reference.statistics == "of the file"
    for name, expected in (("pool", pool), ("spatial", spatial)):
        np.testing.assert_array_equal(reference.moments[name].mean, expected.mean)
        np.testing.assert_array_equal(reference.moments[name].covariance, expected.covariance)
    assert reference.store is not None and len(reference.manifold_indices()) == 40


def test_pytorch_fid_statistics_give_fid_alone_and_say_so(tmp_path, accelerator):
    np.savez(tmp_path / "pt.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    reference = load_reference(str(tmp_path / "pt.npz"), FakeInception(), tmp_path, accelerator)
    assert set(reference.moments) == {"pool"} and reference.store is None and not reference.adm_statistics
    assert any("pytorch-fid" in note for note in reference.notes)


def test_statistics_of_another_network_are_left_aside_or_refused(tmp_path, accelerator):
    adm_file(tmp_path / "adm.npz")
    reference = load_reference(str(tmp_path / "adm.npz"), PixelExtractor(), tmp_path / "cache", accelerator)
    assert len(reference.moments["pool"].mean) == 8 * 8 * 3
    assert any("left aside for pixels" in note for note in reference.notes)
    np.savez(tmp_path / "small.npz", mu=np.zeros(64), sigma=np.eye(64))
    with pytest.raises(ValueError, match="statistics are of 64 features, Inception's pooled layer has 2048"):
        load_reference(str(tmp_path / "small.npz"), FakeInception(), tmp_path, accelerator)
    np.savez(tmp_path / "keys.npz", mean=np.zeros(2048), cov=np.eye(2048))
    with pytest.raises(ValueError, match="it holds cov, mean; wanted: mu and sigma, or arr_0"):
        load_reference(str(tmp_path / "keys.npz"), FakeInception(), tmp_path, accelerator)


# --- features


def as_set(images: np.ndarray, fingerprint="some") -> ImageSet:
    return ImageSet("pictures", images.shape, lambda start, stop: images[start:stop], fingerprint)


def test_features_are_computed_once_and_after_a_crash_only_what_is_missing(tmp_path, accelerator):
    images, seen = as_set(random_images(1200)), []

    class Crashing(PixelExtractor):
        def __call__(self, batch):
            seen.append(len(batch))
            if sum(seen) > 800 and crash:
                raise MemoryError
            return super().__call__(batch)

    crash = True
    with pytest.raises(MemoryError):
        compute_features(images, Crashing(), tmp_path, accelerator, batch_size=100)
    crash = False
    seen.clear()
    store = compute_features(images, Crashing(), tmp_path, accelerator, batch_size=100)
    assert sum(seen) == 700  # the first shard of 500 was whole
    expected = images.read(0, 1200).transpose(0, 3, 1, 2).reshape(1200, -1) / np.float32(255)
    np.testing.assert_allclose(store.load("pool"), expected, rtol=1e-6)
    np.testing.assert_allclose(store.load("pool", np.array([900, 3, 501])), expected[[900, 3, 501]], rtol=1e-6)
    seen.clear()
    compute_features(images, Crashing(), tmp_path, accelerator)
    assert not seen
    np.testing.assert_allclose(store.moments("pool", accelerator).covariance, np.cov(expected, rowvar=False), atol=1e-7)


FEATURES_SCRIPT = """
import time
from pathlib import Path
import torch
from accelerate import Accelerator
from d_emo.eval.fid import features
from d_emo.eval.fid.extractors import PixelExtractor
from d_emo.eval.fid.image_sets import open_set
features.SHARD_SIZE = 100
class Slow(PixelExtractor):
    def __call__(self, images):
        time.sleep(0.1)
        return super().__call__(images)
features.compute_features(open_set("digits"), Slow(), Path({folder!r}), Accelerator(cpu=True))
"""


@pytest.mark.slow
def test_kill_nine_while_features_are_computed_changes_no_score(tmp_path, accelerator, monkeypatch):
    kill_when(
        tmp_path / "log",
        FEATURES_SCRIPT.format(folder=str(tmp_path / "killed")),
        lambda: len(list((tmp_path / "killed").glob("*/features-*"))) >= 3,
    )
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*/features-*")}
    assert 3 <= len(kept) < 18
    monkeypatch.setattr(features, "SHARD_SIZE", 100)
    moments = [
        compute_features(open_set("digits"), PixelExtractor(), tmp_path / name, accelerator).moments(
            "pool", accelerator
        )
        for name in ("killed", "undisturbed")
    ]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    np.testing.assert_array_equal(moments[0].mean, moments[1].mean)
    np.testing.assert_array_equal(moments[0].covariance, moments[1].covariance)


def test_features_that_are_nan_are_refused_with_their_image(tmp_path, accelerator):
    class Broken(PixelExtractor):
        def __call__(self, batch):
            features = super().__call__(batch)["pool"]
            features[7] = float("nan")
            return {"pool": features}

    store = compute_features(as_set(random_images(20)), Broken(), tmp_path, accelerator)
    with pytest.raises(ValueError, match=r"features of image 7 \(pool\) are NaN"):
        store.moments("pool", accelerator)


def test_a_damaged_feature_file_is_named(tmp_path, accelerator):
    store = compute_features(as_set(random_images(20)), PixelExtractor(), tmp_path, accelerator)
    path = store.files.path(store.shards[0])
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ValueError, match=r"features-00000000\.npz"):
        store.load("pool")


def test_missing_inception_weights_name_address_hash_and_option(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(ValueError, match=r"https://\S+6726825d\.pth .*begins with 6726825d.*--inception-weights FILE"):
        make_extractor("inception")


def test_wrong_inception_weights_are_refused_by_hash_and_pickles_in_any_case(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"some": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"begins with \w{8}, not 6726825d"):
        InceptionExtractor(str(path))
    torch.save(PixelExtractor(), path)
    with pytest.raises(ValueError, match="not a file of tensors"):
        InceptionExtractor(str(path), verify=False)
    with pytest.raises(ValueError, match="there is no such file"):
        InceptionExtractor(str(tmp_path / "absent.pth"))


def test_a_backbone_of_transformers_gives_pooled_features(tmp_path):
    from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    extractor = make_extractor(str(tmp_path)).to(torch.device("cpu"))
    images = torch.from_numpy(random_images(3)).permute(0, 3, 1, 2)
    pool = extractor(images)["pool"]
    assert pool.shape == (3, 12) and pool.std() > 0
    torch.testing.assert_close(extractor(images[:, :1])["pool"].shape, torch.Size([3, 12]))
    with pytest.raises(ValueError, match="neither one of inception, fd-dinov2, clip, dinov2, pixels nor"):
        make_extractor(str(tmp_path / "nowhere"))


def test_pixels_of_large_images_are_refused():
    with pytest.raises(ValueError, match="196,608 values, more than 4,096"):
        PixelExtractor()(torch.zeros(1, 3, 256, 256, dtype=torch.uint8))
