"""What public functions of `eval.fid` are given that they cannot use: one line that names it, never a number."""

import numpy as np
import pytest
from accelerate import Accelerator

from d_emo.eval.fid import archives, extractors, features, metrics, protocol, references, sampling
from d_emo.eval.fid.image_sets import open_set

FEATURES = np.random.RandomState(0).rand(10, 4)
BAD_FEATURES = {
    "nothing": None, "a number": 3, "a word": "x", "no rows": FEATURES[:0], "one dimension": FEATURES[0],
    "NaN": FEATURES * np.nan, "infinite": FEATURES * np.inf, "objects": FEATURES.astype(object),
    "words": FEATURES.astype(str), "no columns": FEATURES[:, :0],
}  # fmt: skip
METRICS = {
    "moments": metrics.moments_of,
    "Inception Score": metrics.inception_score,
    "precision, recall": lambda values: metrics.precision_recall(values, FEATURES),
    "recall, precision": lambda values: metrics.precision_recall(FEATURES, values),
    "KID": lambda values: metrics.kernel_distance(values, FEATURES),
    "KID, samples": lambda values: metrics.kernel_distance(FEATURES, values),
}
NO_NUMBERS = [0, -1, 1.5, float("nan"), float("inf"), "", "x", b"x", [], {}, True, range(2)]


def refused(call, *names):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(name in message for name in names), message
    for raw in ("NoneType'", "not supported between", "ambiguous", "has no attribute", "cannot convert"):
        assert raw not in message


@pytest.mark.parametrize("bad", BAD_FEATURES)
@pytest.mark.parametrize("metric", METRICS)
def test_features_that_are_none_give_no_score(metric, bad):
    refused(lambda: METRICS[metric](BAD_FEATURES[bad]))


@pytest.mark.parametrize("metric", ["precision, recall", "recall, precision", "KID", "KID, samples"])
def test_features_of_two_networks_are_not_compared(metric):
    refused(lambda: METRICS[metric](FEATURES[:, :3]), "the other side has")


@pytest.mark.parametrize("side", [None, FEATURES, metrics.Moments(9, FEATURES, FEATURES)], ids=["none", "array", "2d"])
def test_a_distance_takes_moments(side):
    whole = metrics.moments_of(FEATURES)
    refused(lambda: metrics.frechet_distance(side, whole))
    refused(lambda: metrics.frechet_distance(whole, side))


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["num_images", "steps", "guidance_scale", "guidance_channels", "seed"])
def test_settings_that_are_no_numbers_are_refused_by_their_option(name, value):
    if (name, value) in (("seed", 0), ("guidance_scale", 1.5)) and value is not False:
        return
    refused(lambda: protocol.SamplingSettings(**{name: value}), f"--{name.replace('_', '-')}")


@pytest.mark.parametrize("value", [None, 0, "", "other", [], range(2)], ids=repr)
@pytest.mark.parametrize("name", ["sampler", "labels", "weights", "dtype"])
def test_settings_that_are_no_choices_are_refused_by_their_option(name, value):
    refused(lambda: protocol.SamplingSettings(**{name: value}), f"--{name}", "is not one of")


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_numbers_of_readers_are_refused_by_name(tmp_path, value):
    accelerator, images = Accelerator(cpu=True), open_set("digits")
    refused(lambda: images.first(value), "count")
    refused(lambda: open_set("digits", (value, 4)), "height")
    refused(lambda: open_set("digits", (4, value)), "width")
    refused(
        lambda: features.compute_features(images, extractors.PixelExtractor(), tmp_path, accelerator, value),
        "batch_size",
    )
    refused(lambda: archives.write_images(tmp_path / "a.npz", [], (value, 4, 4, 3)), "shape[0]")
    if value != 0 or value is False:
        refused(lambda: sampling.sample_labels(protocol.SamplingSettings(num_images=3), value), "num_classes")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [None, 0, 1.5, "", "\0", b"x", [], range(2)], ids=repr)
def test_names_of_readers_are_refused_by_name(tmp_path, value):
    accelerator = Accelerator(cpu=True)
    refused(lambda: open_set(value), "source")
    refused(lambda: extractors.make_extractor(value), "--features")
    refused(lambda: references.load_reference(value, extractors.PixelExtractor(), tmp_path, accelerator), "--reference")
    if value != "":
        refused(lambda: archives.read_array(value, "mu"), "path")
        refused(lambda: archives.map_images(value), "path")


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([np.zeros((2, 4, 4, 3), np.uint8)], "2 images were given, 3 announced"),
        ([np.zeros((3, 4, 4, 3), np.float32)], "uint8 array of shape"),
        ([np.zeros((3, 5, 4, 3), np.uint8)], r"images of shape (5, 4, 3), not (4, 4, 3)"),
        ([None], "uint8 array of shape"),
        (None, "series of arrays of images"),
    ],
)
def test_images_that_do_not_fit_are_not_written(tmp_path, blocks, message):
    refused(lambda: archives.write_images(tmp_path / "a.npz", blocks, (3, 4, 4, 3)), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [3, "ab", (4,), (4, 4, 4), range(2)], ids=repr)
def test_a_size_is_height_and_width(size):
    refused(lambda: open_set("digits", size), "h")


def test_scores_of_a_packaged_model_do_not_go_into_a_folder_that_has_its_name(tmp_path, monkeypatch):
    from d_emo.common import packaged
    from d_emo.eval.evaluate_fid import parse_options
    from d_emo.eval.fid.command import output_dir

    monkeypatch.chdir(tmp_path)
    (tmp_path / "apples").mkdir()
    options = parse_options(["--model", "apples", "--reference", "digits"])
    assert output_dir(options, "quick").as_posix() == "apples/evaluation/quick"
    (tmp_path / "shelf" / "apples").mkdir(parents=True)
    (tmp_path / "shelf" / "apples" / "model_index.json").write_text("{}")
    monkeypatch.setattr(packaged, "_FOLDER", tmp_path / "shelf")
    assert output_dir(options, "quick").as_posix() == "evaluation/apples-quick"
