"""evaluate_segmenter: the scores of what the model says, sizes, windows, classes, pages, bad input."""

import csv
import functools
import json

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from helpers.segmenters import segmenter
from helpers.training import run_here
from transformers import DPTImageProcessorPil, MobileNetV2ImageProcessorPil, SegformerImageProcessorPil

from d_emo import predict_in_windows
from d_emo.eval import evaluate_segmenter
from d_emo.eval.segmentation.command import align_pixels
from d_emo.eval.segmentation.predict import default_stride, evaluate_pixels, likeliest
from d_emo.eval.segmentation.scores import SegmentationScores
from d_emo.images.decode import UnreadableImageError
from d_emo.images.masks import folder_masks
from d_emo.images.pixels import LabelledPicture, PixelSource
from d_emo.segmentation.transformers_models import make_segmentation_processor

NAMES = ["sky", "tree", "road"]
SIZES = [(48, 40), (70, 33), (64, 64), (33, 90)]  # widths and heights
CPU = torch.device("cpu")


@functools.cache
def network(head="segformer"):
    return segmenter(head, id2label=dict(enumerate(NAMES)))


def processor(**size):
    made = make_segmentation_processor(size=size or {"shortest_edge": 32, "longest_edge": 128})
    made.do_resize = bool(size)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny segmenter of three classes with random weights, saved with its processor."""
    path = tmp_path_factory.mktemp("segmenter")
    network().save_pretrained(path)
    processor(shortest_edge=64, longest_edge=128).save_pretrained(path)
    return path


def write_pictures(root, classes=3, sizes=SIZES, ignored=True):
    """Photos of noise and their masks, in folders whose names are told."""
    random = np.random.RandomState(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number, (width, height) in enumerate(sizes):
        pixels = random.randint(0, 256, (height, width, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(root / "images" / f"{number}.png")
        labels = random.randint(0, classes, (height, width), dtype=np.uint8)
        if ignored:
            labels[:5] = 255
        PIL.Image.fromarray(labels).save(root / "masks" / f"{number}.png")
    return root


def run(capsys, *arguments):
    return run_here(capsys, *arguments, main=evaluate_segmenter.main)


def expected_scores(root, prepare, predict):
    """The scores, one step after the other."""
    matrix = np.zeros((3, 3), int)
    for path in sorted((root / "images").iterdir()):
        labels = np.asarray(PIL.Image.open(root / "masks" / path.name))
        pixels = prepare(images=PIL.Image.open(path), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = predict(pixels)
        answers = F.interpolate(logits, labels.shape, mode="bilinear", align_corners=False)[0].argmax(0).numpy()
        known = labels != 255
        np.add.at(matrix, (labels[known], answers[known]), 1)
    return matrix


@pytest.mark.parametrize(
    ("options", "size", "window"),
    [
        ((), {"shortest_edge": 64, "longest_edge": 128}, None),
        (("--short-side", "32"), {"shortest_edge": 32, "longest_edge": 128}, None),
        (("--full-size",), {}, None),
        (("--full-size", "--window", "32", "--stride", "20", "--batch-size", "3"), {}, (32, 20)),
        (("--window", "32"), {"shortest_edge": 64, "longest_edge": 128}, (32, 21)),
    ],
)
def test_scores_are_those_computed_step_by_step(capsys, tmp_path, folder, options, size, window):
    photos = write_pictures(tmp_path / "photos")
    code, output = run(capsys, "--model", folder, "--data-dir", photos, "--output-dir", tmp_path / "out", *options)
    assert code == 0, output
    predict = (
        (lambda pixels: predict_in_windows(network(), pixels, *window))
        if window
        else lambda pixels: network()(pixels).logits
    )
    matrix = expected_scores(photos, processor(**size), predict)
    assert len(np.unique(matrix.argmax(axis=1))) >= 1 and (matrix.sum(axis=0) > 0).sum() > 1  # not always one answer
    found, union = np.diag(matrix), matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["labelled_pixels"] == matrix.sum() and report["images"] == 4
    assert report["miou"] == pytest.approx((found / union).mean(), abs=1e-9)
    assert report["aacc"] == pytest.approx(found.sum() / matrix.sum(), abs=1e-9)
    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "out" / "classes.csv").open())}
    assert list(rows) == sorted(NAMES, key=lambda name: float(rows[name]["iou"]))
    for label, name in enumerate(NAMES):
        assert float(rows[name]["iou"]) == pytest.approx(found[label] / union[label], abs=1e-9)
        assert int(rows[name]["pixels"]) == matrix[label].sum()
    assert f"mIoU {report['miou']:.2%}" in output


def test_the_page_shows_the_worst_pictures(capsys, tmp_path, folder):
    photos = write_pictures(tmp_path / "photos")
    options = ("--data-dir", photos, "--output-dir", tmp_path / "out", "--pictures", "2")
    code, output = run(capsys, "--model", folder, *options)
    assert code == 0, output
    scores = {}
    source = folder_masks(photos)
    evaluate_pixels(
        network(), processor(shortest_edge=64, longest_edge=128), source, device=CPU,
        keep=lambda sample, _, alone: scores.update({sample.name.rpartition("/")[2]: alone.miou}),
    )  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    worst = sorted(scores, key=lambda name: scores[name])
    shown = [page.find(f"<figcaption>{name},") for name in worst]
    assert -1 < shown[0] < shown[1] and shown[2:] == [-1, -1]
    assert page.count("<img") == 2 and "Confused most" in page


def source_of(*samples, names=NAMES):
    def read(index):
        if samples[index] is None:
            raise UnreadableImageError("photo 1 cannot be read")
        return samples[index]

    return PixelSource(name="made", size=len(samples), read=read, id2label=dict(enumerate(names)))


def sample(labels, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 256, (*labels.shape, 3), dtype=np.uint8)
    return LabelledPicture(PIL.Image.fromarray(pixels), labels.astype(np.int32), f"photo {seed}")


def test_shares_of_processes_make_the_whole():
    samples = [sample(np.random.RandomState(seed).randint(0, 3, (32, 32)), seed) for seed in range(5)]
    options = {"device": CPU, "window": 32}
    alone = evaluate_pixels(network(), processor(), source_of(*samples), **options)
    joined = SegmentationScores(3)
    for rank in range(7):
        joined.merge(evaluate_pixels(network(), processor(), source_of(*samples), rank=rank, world_size=7, **options))
    np.testing.assert_array_equal(joined.matrix, alone.matrix)
    assert alone.labelled == 5 * 1024


def test_loader_processes_read_the_same(tmp_path):
    source = folder_masks(write_pictures(tmp_path))
    seen = []
    keep = lambda sample, predicted, _: seen.append((sample.name, predicted.shape))  # noqa: E731
    here = evaluate_pixels(network(), processor(), source, device=CPU, keep=keep)
    there = evaluate_pixels(network(), processor(), source, device=CPU, num_workers=1)
    np.testing.assert_array_equal(here.matrix, there.matrix)
    assert [shape for _, shape in seen] == [(height, width) for width, height in SIZES]


def test_what_is_likeliest_of_many_classes_is_the_argmax_of_all():
    logits = torch.randn(2, 37, 5, 6, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(logits, (20, 17), mode="bilinear", align_corners=False)
    torch.testing.assert_close(likeliest(logits, (20, 17)), whole.argmax(1))
    torch.testing.assert_close(likeliest(logits, (5, 6)), logits.argmax(1))


def test_windows_are_apart_by_two_thirds():
    assert [default_stride(window) for window in (256, 64, 1)] == [170, 42, 1]


def test_an_unreadable_picture_stops_and_another_number_of_classes_is_refused():
    good = sample(np.zeros((32, 32)))
    with pytest.raises(UnreadableImageError, match=r"photo 1 cannot be read. Repair or remove it."):
        evaluate_pixels(network(), processor(), source_of(good, None), device=CPU)
    with pytest.raises(ValueError, match="the model has 3 classes, made 2"):
        evaluate_pixels(network(), processor(), source_of(good, names=["a", "b"]), device=CPU)


def test_classes_with_names_are_the_models_by_name():
    labels = np.array([[0, 1], [255, 0]])
    aligned, note = align_pixels(source_of(sample(labels), names=["road", "sky"]), dict(enumerate(NAMES)))
    assert aligned.read(0).labels.tolist() == [[2, 0], [255, 2]] and not note
    assert aligned.id2label == dict(enumerate(NAMES))
    same, _ = align_pixels(source_of(sample(labels)), dict(enumerate(NAMES)))
    assert same.read(0).labels.tolist() == labels.tolist()
    with pytest.raises(ValueError, match=r"made has 2 classes, the model 3, and these are not .*: sea"):
        align_pixels(source_of(sample(labels), names=["sky", "sea"]), dict(enumerate(NAMES)))


def test_plain_numbers_mean_the_models_classes_although_one_is_not_shown(capsys, tmp_path, folder):
    photos = write_pictures(tmp_path / "photos", classes=1)
    for path in (photos / "masks").iterdir():
        labels = np.asarray(PIL.Image.open(path)).copy()
        labels[labels == 0] = 2
        PIL.Image.fromarray(labels).save(path)
    code, output = run(capsys, "--model", folder, "--data-dir", photos, "--output-dir", tmp_path / "out")
    assert code == 0 and "4 images, 3 classes" in output, output
    rows = {row["name"]: row["pixels"] for row in csv.DictReader((tmp_path / "out" / "classes.csv").open())}
    assert rows["sky"] == rows["tree"] == "0" and int(rows["road"]) > 5000
    assert "hardest  road" in output and "nan" not in output


def test_names_of_the_masks_classes_in_another_order(capsys, tmp_path, folder):
    photos = write_pictures(tmp_path / "photos")
    (tmp_path / "names.txt").write_text("road\ntree\nsky\n")
    figures = []
    for options in ((), ("--class-names", tmp_path / "names.txt"), ("--max-images", "1")):
        out = tmp_path / f"out{len(figures)}"
        code, output = run(capsys, "--model", folder, "--data-dir", photos, "--output-dir", out, *options)
        assert code == 0, output
        rows = {row["name"]: int(row["pixels"]) for row in csv.DictReader((out / "classes.csv").open())}
        figures.append(rows)
    assert figures[0]["sky"] == figures[1]["road"] and figures[0]["road"] == figures[1]["sky"]
    assert sum(figures[2].values()) == 48 * 35


def test_bad_input_is_one_line_and_nothing_is_written(capsys, tmp_path, folder):
    photos = write_pictures(tmp_path / "photos")
    void = write_pictures(tmp_path / "void", sizes=[(32, 32)])
    PIL.Image.fromarray(np.full((32, 32), 255, np.uint8)).save(void / "masks" / "0.png")
    small = write_pictures(tmp_path / "small", sizes=[(32, 32)])
    PIL.Image.fromarray(np.zeros((30, 32), np.uint8)).save(small / "masks" / "0.png")
    unknown = write_pictures(tmp_path / "unknown", classes=9)
    broken = write_pictures(tmp_path / "broken")
    (broken / "images" / "1.png").write_bytes(b"no picture")
    before = sorted(tmp_path.rglob("*"))
    data = ("--data-dir", photos)
    for arguments, message in (
        ((), "no data was named: --data-dir FOLDER"),
        ((*data, "--dataset", "x"), "--data-dir and --dataset are both given"),
        ((*data, "--stride", "3"), "--stride 3: it goes with --window."),
        ((*data, "--window", "3", "--stride", "4"), "--stride 4: leaves gaps between windows of 3."),
        ((*data, "--short-side", "3", "--full-size"), "--short-side and --full-size are both given"),
        ((*data, "--output-dir", photos), "--output-dir"),
        (("--data-dir", tmp_path / "nowhere"), "nowhere: there is no such folder"),
        (("--data-dir", void), "no pixel of void has a class"),
        (("--data-dir", small), "32 x 30 pixels, and its picture"),
        (("--data-dir", unknown), "which is no class: they are 0 to 2"),
        (("--data-dir", broken), "1.png cannot be read"),
    ):
        code, output = run(capsys, "--model", folder, "--output-dir", tmp_path / "out", *arguments)
        assert code not in (0, None) and message in output, (arguments, code, output)
        assert "Traceback" not in output
        assert sorted(tmp_path.rglob("*")) == before, arguments
    code, output = run(capsys, "--model", tmp_path, *data, "--output-dir", tmp_path / "out")
    assert code and "does not load as a semantic segmenter" in output


def test_a_processor_of_transformers_own_is_taken_as_well(tmp_path):
    source = folder_masks(write_pictures(tmp_path))
    squares = SegformerImageProcessorPil(size={"height": 64, "width": 64})
    assert evaluate_pixels(network(), squares, source, device=CPU).labelled > 0


def test_a_processor_that_cuts_the_centre_shows_the_whole_picture():
    """As MobileNetV2's and MobileViT's segmenters have it: laid over the whole picture, the centre's map is wrong."""
    halves = sample(np.repeat([[0, 1]], 64, axis=1).repeat(64, axis=0))
    seen = []

    class Watching(torch.nn.Module):
        def forward(self, pixels):
            seen.append(pixels.shape[2:])
            return network()(pixels)

    cutting = MobileNetV2ImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    scores = evaluate_pixels(Watching(), cutting, source_of(halves), device=CPU)
    assert seen == [(64, 128)]
    whole = MobileNetV2ImageProcessorPil(size={"shortest_edge": 64}, do_center_crop=False)
    expected = evaluate_pixels(network(), whole, source_of(halves), device=CPU)
    assert np.array_equal(scores.matrix, expected.matrix)


def test_a_processor_that_fills_pictures_up_is_refused():
    filling = DPTImageProcessorPil(do_pad=True, size_divisor=32)
    with pytest.raises(ValueError, match=r"fills pictures up \(do_pad\).*set do_pad to false"):
        evaluate_pixels(network(), filling, source_of(sample(np.zeros((32, 32)))), device=CPU)
