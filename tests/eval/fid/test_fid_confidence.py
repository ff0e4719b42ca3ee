"""What stands beside a distance: its interval, the distances of classes, other features."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from helpers.training import run_here

from d_emo.eval import evaluate_fid
from d_emo.eval.fid import archives, by_class, confidence, extractors
from d_emo.eval.fid.by_class import class_distances, table_lines
from d_emo.eval.fid.confidence import GROUPS, frechet_interval
from d_emo.eval.fid.extractors import FeatureExtractor, PixelExtractor, make_extractor
from d_emo.eval.fid.features import compute_features
from d_emo.eval.fid.image_sets import open_set, with_classes
from d_emo.eval.fid.metrics import Moments, MomentSums, frechet_distance, moments_of
from d_emo.eval.fid.references import load_reference
from d_emo.eval.fid.scoring import Scores, as_json, load_scores, summary

# --- intervals


def test_a_group_taken_out_leaves_the_moments_of_the_others():
    rows = np.random.RandomState(0).randn(50, 6) + 100  # a large mean cancels worst
    sums = MomentSums(6)
    sums.add(rows)
    left, expected = sums.without(rows[10:20]).moments(), moments_of(np.delete(rows, slice(10, 20), axis=0))
    np.testing.assert_allclose(left.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(left.covariance, expected.covariance, atol=1e-9)
    assert left.count == 40


def test_an_interval_is_the_jackknifes_formula_written_out():
    rows, reference = np.random.RandomState(0).randn(101, 3), Moments(0, np.full(3, 0.4), 2 * np.eye(3))
    groups = np.array_split(np.arange(101), GROUPS)
    left = [frechet_distance(reference, moments_of(np.delete(rows, group, axis=0))) for group in groups]
    half = 2.093024 * np.sqrt((GROUPS - 1) / GROUPS * sum((value - np.mean(left)) ** 2 for value in left))
    distance = frechet_distance(reference, moments_of(rows))
    low, high = frechet_interval(rows.__getitem__, 101, reference)
    assert (low, high) == pytest.approx((distance - half, distance + half), rel=1e-4)
    with pytest.raises(ValueError, match="39 samples make no 20 groups"):
        frechet_interval(rows.__getitem__, 39, reference)


def test_an_interval_covers_the_distance_expected_of_so_many_samples():
    random, reference = np.random.RandomState(0), Moments(0, np.full(4, 0.5), np.diag([2.0, 1.0, 0.5, 0.2]))
    draws = [random.randn(200, 4) for _ in range(300)]
    expected = np.mean([frechet_distance(reference, moments_of(rows)) for rows in draws])
    intervals = [frechet_interval(rows.__getitem__, 200, reference) for rows in draws[:150]]
    covered = np.mean([low <= expected <= high for low, high in intervals])
    # 95% of 150 is known to 1.8%; the jackknife of a smooth statistic may be a little too wide or narrow.
    assert 0.89 <= covered <= 0.99
    # What is covered has the bias of 200 samples in it.
    assert expected > frechet_distance(reference, Moments(0, np.zeros(4), np.eye(4))) + 0.01


def test_intervals_narrow_with_the_root_of_the_samples():
    random, reference = np.random.RandomState(1), Moments(0, np.full(4, 0.5), np.eye(4))
    widths: dict[int, list[float]] = {100: [], 1600: []}
    for count, found in widths.items():
        for _ in range(20):
            rows = random.randn(count, 4)
            low, high = frechet_interval(rows.__getitem__, count, reference)
            found.append(high - low)
    assert np.mean(widths[100]) / np.mean(widths[1600]) == pytest.approx(4, rel=0.2)


# --- classes


class Means(FeatureExtractor):
    """Four features of any image: so few that ten images of a class are enough."""

    name, identity = "means", "means"

    def to(self, device):
        return self

    def __call__(self, images):
        quarters = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 2)
        return {"pool": quarters.flatten(1)[:, :4]}


def class_folders(root, counts, seed=0):
    random = np.random.RandomState(seed)
    for place, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            pixels = random.randint(0, 100 + 50 * place, (8, 8), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(root / name / f"{index:03d}.png")
    return root


def test_classes_with_enough_images_get_the_distance_of_their_own_images(tmp_path):
    accelerator = Accelerator(cpu=True)
    root = class_folders(tmp_path / "real", {"a": 30, "b": 12, "c": 7, "d": 40})
    reference = load_reference(str(root), Means(), tmp_path / "cache", accelerator, label_column="label")
    images = open_set(str(class_folders(tmp_path / "drawn", {"a": 9, "b": 20, "c": 50, "d": 5}, seed=1)))
    images = with_classes(images, str(tmp_path / "drawn"), "label")
    store = compute_features(images, Means(), tmp_path / "features", accelerator)
    found = {one.name: one for one in class_distances(store, reference, {0: "a", 1: "b", 2: "c"})}
    assert list(found) == ["a", "b", "c", "class 3"]
    assert (found["b"].samples, found["b"].reference) == (20, 12)
    assert [name for name, one in found.items() if one.fid is not None] == ["a", "b"]  # eight images for four features
    for name, label in (("a", 0), ("b", 1)):
        sides = [moments_of(side.load("pool")[side.images.labels == label]) for side in (store, reference.store)]
        assert found[name].fid == pytest.approx(frechet_distance(*sides), rel=1e-6)
    lines = table_lines(by_class.as_table(list(found.values()), 4))
    assert len(lines) == 3 and "2 of 4 classes have fewer than 8 images on a side (at most 7 on both)" in lines[-1]
    assert lines[0].split(":")[0] == max("ab", key=lambda name: found[name].fid)


@pytest.mark.parametrize(("images_a_feature", "share"), [(2, 0.134), (1, 0.302), (0.5, 0.681)])
def test_too_few_images_of_a_class_add_the_documents_share_of_the_variance(images_a_feature, share):
    features, random = 200, np.random.RandomState(0)
    rows = random.randn(int(images_a_feature * features), features)
    added = frechet_distance(Moments(0, rows.mean(0), np.eye(features)), moments_of(rows))
    assert added / features == pytest.approx(share, rel=0.03)


def test_class_folders_give_each_image_its_own_class(tmp_path):
    root = class_folders(tmp_path / "real", {"z": 5, "a": 3, "m": 4})
    images = with_classes(open_set(str(root)), str(root), "label")
    for index, label in enumerate(images.labels):
        name = sorted(("z", "a", "m"))[label]
        stored = [np.asarray(PIL.Image.open(path)) for path in (root / name).iterdir()]
        assert any(np.array_equal(images.read(index, index + 1)[0, ..., 0], pixels) for pixels in stored)
    assert images.fingerprint == open_set(str(root)).fingerprint  # stored features serve with and without


@pytest.mark.parametrize(
    ("reference", "samples", "message"),
    [
        ("half.npz", "folders", "--by-class: of --reference"),
        ("digits", "half.npz", "the classes are not known, which --by-class needs"),
    ],
)
def test_where_classes_are_not_known_one_line_says_so(capsys, tmp_path, reference, samples, message):
    digits = open_set("digits")
    archives.write_images(tmp_path / "half.npz", [digits.read(0, 90)], (90, 16, 16, 3))
    class_folders(tmp_path / "folders", {"a": 5, "b": 5})
    code, printed = run_here(
        capsys, "--samples", tmp_path / samples, "--reference", tmp_path / reference if "." in reference else reference,
        "--features", "pixels", "--by-class", "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache",
        main=evaluate_fid.main,
    )  # fmt: skip
    assert code != 0 and message in printed and "Traceback" not in printed
    assert not list((tmp_path / "out").glob("*.json"))


# --- several features


def test_several_features_stand_in_one_report(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("d_emo.eval.fid.command.make_extractor",
                        lambda name, *_: Means() if name == "means" else PixelExtractor())  # fmt: skip
    class_folders(tmp_path / "drawn", {"a": 30, "b": 30})
    class_folders(tmp_path / "real", {"a": 40, "b": 40}, seed=1)
    code, printed = run_here(
        capsys, "--samples", tmp_path / "drawn", "--reference", tmp_path / "real", "--features", "pixels", "means",
        "--confidence", "--by-class", "--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache",
        main=evaluate_fid.main,
    )  # fmt: skip
    assert code == 0, printed
    scores = load_scores(tmp_path / "out" / "scores.json")
    (other,) = scores.others
    assert (scores.features, other.features) == ("pixels", "means")
    assert set(other.values) == {"fid", "precision", "recall", "kid", "kid_std"} and not other.left_out
    page = (tmp_path / "out" / "report.html").read_text()
    for part in (scores, other):
        low, high = part.intervals["fid"]
        assert low <= part.values["fid"] <= high
        line = f"{part.values['fid']:.4f} (95%: {low:.4f} to {high:.4f})"
        assert line in printed and line in page
    assert "2 of 2 classes have fewer than 384 images" in printed  # pixels: 3 x 8 x 8 features
    assert [one["fid"] is not None for one in other.by_class["classes"]] == [True, True]  # means: 4
    assert page.count("<table>") == 2 and page.count("by class</h2><ul>") == 2
    assert "Frechet distance (pixels)" in summary(scores) and "Frechet distance (means)" in summary(scores)
    code, printed = run_here(
        capsys, "--samples", tmp_path / "drawn", "--reference", tmp_path / "real", "--features", "pixels", "pixels",
        main=evaluate_fid.main,
    )  # fmt: skip
    assert code != 0 and "one is named twice" in printed


def test_scores_of_before_there_were_intervals_are_read(tmp_path):
    conditions = {"features": {"name": "pixels"}, "samples": {"shape": [5, 8, 8, 1]}}
    stored = as_json(Scores(values={"fid": 1.5}, conditions=conditions))
    old = {name: value for name, value in stored.items() if name not in ("intervals", "by_class", "others")}
    (tmp_path / "scores.json").write_text(json.dumps(old))
    scores = load_scores(tmp_path / "scores.json")
    assert scores.values == {"fid": 1.5} and (scores.intervals, scores.by_class, scores.others) == ({}, {}, [])
    for name, wrong in (
        ("intervals", {"fid": [1]}),
        ("intervals", 3),
        ("others", [3]),
        ("others", {}),
        ("by_class", 1),
    ):
        (tmp_path / "scores.json").write_text(json.dumps({**stored, name: wrong}))
        with pytest.raises(ValueError, match="is damaged"):
            load_scores(tmp_path / "scores.json")


def test_fd_dinov2_is_the_class_token_of_images_resized_by_pil_and_not_cropped(tmp_path, monkeypatch):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}).save_pretrained(tmp_path)
    monkeypatch.setattr(extractors, "DINOV2_LARGE", str(tmp_path))
    images = np.random.RandomState(0).randint(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    # dgm_eval/models/dinov2.py restated: PIL's bicubic to 224 x 224, [0, 1], ImageNet's mean and deviation.
    inputs = []
    for image in images:
        resized = np.asarray(PIL.Image.fromarray(image).resize((224, 224), PIL.Image.Resampling.BICUBIC), np.float32)
        inputs.append((resized / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    pixels = torch.tensor(np.stack(inputs).transpose(0, 3, 1, 2), dtype=torch.float32)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 0]
    extractor = make_extractor("fd-dinov2")
    found = extractor(torch.from_numpy(images).permute(0, 3, 1, 2))["pool"]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    by_processor = make_extractor(str(tmp_path))(torch.from_numpy(images).permute(0, 3, 1, 2))["pool"]
    assert (found - by_processor).abs().max() > 1e-2  # the crop matters
    assert extractor.name == "fd-dinov2" and not extractor.published
    monkeypatch.setattr(extractors, "DINOV2_LARGE", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"--features fd-dinov2: .*nowhere cannot be opened.*leave these features out"):
        make_extractor("fd-dinov2")


def test_the_quantile_is_students():
    stats = pytest.importorskip("scipy.stats")
    assert stats.t.ppf(0.975, GROUPS - 1) == pytest.approx(confidence.QUANTILE, abs=1e-3)
