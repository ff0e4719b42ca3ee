"""Mean average precision against COCO's own tool, on generated boxes and masks, and its corner cases by hand."""

import contextlib
import io
import pickle

import numpy as np
import pytest
import torch
from helpers.scenes import SIDE, ellipses, found, scene
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from d_emo.eval.detection.scores import NAMES, DetectionScores

CLASSES = 5


def generated(seed, images, masks=False, whole=False):
    """Scenes with crowds and areas of their own, some empty; findings near the objects and elsewhere, scores often
    equal. The last class never occurs, the one before only among the findings. `whole`: sides in whole pixels, so that
    overlaps hit thresholds exactly.
    """
    random = np.random.default_rng(seed)
    answers, scenes = [], []
    for number in range(images):
        objects = int(random.integers(0, 6)) * int(number % 4 > 0)
        corners = random.uniform(0, 90, (objects, 2))
        sides = random.choice([14, 50, 130], (objects, 1)) * random.uniform(0.8, 1.1, (objects, 2))
        boxes = np.concatenate([corners, corners + sides], axis=1)
        boxes = np.round(boxes) if whole else boxes
        labels = random.integers(0, CLASSES - 2, objects)
        crowd = random.uniform(size=objects) < 0.2
        areas = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) * random.uniform(0.6, 1, objects)
        scenes.append(scene(boxes, labels, crowd, areas, masks, image_id=1000 - 3 * number))
        near = np.repeat(boxes, 2, axis=0) + random.normal(0, 3, (2 * objects, 4))
        corners = random.uniform(0, 90, (3, 2))
        other = np.concatenate([corners, corners + random.uniform(10, 60, (3, 2))], axis=1)
        guesses = np.concatenate([near, other]) if number % 5 else near[:0]
        guesses = np.round(guesses) if whole else guesses
        guesses[:, 2:] = np.maximum(guesses[:, 2:], guesses[:, :2] + 2)
        names = np.concatenate([np.repeat(labels, 2), random.integers(0, CLASSES - 1, 3)])[: len(guesses)]
        scores = random.integers(1, 12, len(guesses)) / 12
        shapes = torch.from_numpy(ellipses(guesses)[:, None].astype(np.float32)) * 0.9 if masks else None
        answers.append(found(guesses, names, scores.astype(np.float32), shapes))
    return answers, scenes


def coco_scores(answers, scenes, kind):
    """The same by pycocotools: the six averages, and (K,) AP by class, -1 for nothing."""
    truth, results = [], []
    for answer, one in zip(answers, scenes, strict=True):
        for index, (x1, y1, x2, y2) in enumerate(one.boxes.astype(float).tolist()):
            entry = {"id": len(truth) + 1, "image_id": one.image_id, "category_id": int(one.labels[index]),
                     "bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(one.areas[index]),
                     "iscrowd": int(one.crowd[index])}  # fmt: skip
            if one.masks is not None:
                entry["segmentation"] = rle.encode(np.asfortranarray(one.masks[index].astype(np.uint8)))
            truth.append(entry)
        for index, (x1, y1, x2, y2) in enumerate(answer["boxes"].double().tolist()):
            entry = {"image_id": one.image_id, "category_id": int(answer["labels"][index]),
                     "score": float(answer["scores"][index])}  # fmt: skip
            if kind == "segm":
                mask = (answer["masks"][index, 0] > 0.5).numpy().astype(np.uint8)
                entry["segmentation"] = rle.encode(np.asfortranarray(mask))
            else:
                entry["bbox"] = [x1, y1, x2 - x1, y2 - y1]
            results.append(entry)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        images = [{"id": one.image_id, "height": SIDE, "width": SIDE} for one in scenes]
        categories = [{"id": number} for number in range(CLASSES)]
        coco.dataset = {"info": {}, "images": images, "annotations": truth, "categories": categories}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    by_class = evaluation.eval["precision"][:, :, :, 0, -1].mean(axis=(0, 1))
    return evaluation.stats[:6], by_class


def close(ours, theirs, tolerance=1e-6):
    theirs = np.where(np.asarray(theirs) < 0, np.nan, theirs)
    return np.allclose(ours, theirs, rtol=0, atol=tolerance, equal_nan=True)


def computed(answers, scenes, masks=False, classes=CLASSES):
    scores = DetectionScores(classes, masks)
    scores.update(answers, scenes)
    return scores


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_boxes_score_as_in_cocos_own_tool(seed, whole):
    answers, scenes = generated(seed, 40, whole=whole)
    scores = computed(answers, scenes)
    averages, by_class = coco_scores(answers, scenes, "bbox")
    assert 0.1 < averages[0] < 0.9 and (averages > 0).all()
    assert close([*scores.compute().values()], averages)
    assert close(scores.by_class()["AP"], by_class)
    assert np.isnan(scores.by_class()["AP"]).tolist() == [False] * 3 + [True] * 2


@pytest.mark.parametrize("seed", range(2))
def test_masks_score_as_in_cocos_own_tool(seed):
    answers, scenes = generated(seed, 24, masks=True)
    scores = computed(answers, scenes, masks=True)
    values, by_class = scores.compute(), scores.by_class()
    for prefix, kind in (("", "bbox"), ("mask_", "segm")):
        averages, of_classes = coco_scores(answers, scenes, kind)
        assert (averages > 0).all()
        assert close([values[f"{prefix}{name}"] for name in NAMES.values()], averages), kind
        assert close(by_class[f"{prefix}AP"], of_classes), kind
    assert values["mAP"] != values["mask_mAP"]


def test_an_overlap_of_exactly_a_threshold_counts_as_it_does_in_cocos_own_tool():
    """0.6 and 0.7 are not float32 numbers: the thresholds of torchmetrics are a little more than COCO's."""
    answers = [found([(0, 0, 10, 6)], [0], [0.9])]
    scenes = [scene([(0, 0, 10, 10)], [0])]
    averages, _ = coco_scores(answers, scenes, "bbox")
    assert averages[0] == pytest.approx(0.3)  # 0.5, 0.55 and 0.6
    assert computed(answers, scenes).compute()["mAP"] == pytest.approx(0.3, abs=1e-6)


def test_the_set_counts_and_not_the_mean_over_its_pictures():
    """A small picture with one object and a large one with three; by hand.

    Pictures apart have average precisions of 1 and of a third. Together the four findings, best first, are right,
    wrong, right, wrong: precisions of 1 to a recall of 1/4 and of 2/3 to 1/2. Of 101 recalls 26 are up to 1/4 and 25
    more to 1/2.
    """
    small = scene([(0, 0, 10, 10)], [0], image_id=1, size=(20, 20))
    large = scene([(0, 0, 40, 40), (50, 0, 90, 40), (0, 50, 40, 90)], [0, 0, 0], image_id=2, size=(100, 100))
    elsewhere = [(120.0, 120, 140, 140), (100, 0, 110, 10)]
    of_small = found([(0, 0, 10, 10)], [0], [0.9])
    of_large = found([elsewhere[0], (0, 0, 40, 40), elsewhere[1]], [0, 0, 0], [0.8, 0.7, 0.6])
    whole = computed([of_small, of_large], [small, large], classes=1).compute()["mAP50"]
    assert whole == pytest.approx((26 * 1 + 25 * 2 / 3) / 101, abs=1e-6)
    apart = [computed([a], [b], classes=1).compute()["mAP50"] for a, b in ((of_small, small), (of_large, large))]
    assert apart == pytest.approx([1, 34 * 0.5 / 101], abs=1e-6)
    assert abs(np.mean(apart) - whole) > 0.1


def test_a_class_that_never_occurs_and_one_that_is_found_but_not_there_change_nothing():
    scenes = [scene([(0, 0, 10, 10), (20, 20, 60, 60)], [0, 2])]
    answers = [found([(0, 0, 10, 10), (20, 20, 60, 60), (90, 90, 99, 99)], [0, 2, 3], [0.5, 0.6, 0.9])]
    scores = computed(answers, scenes, classes=7)
    assert scores.compute()["mAP"] == pytest.approx(1)
    expected = [1, np.nan, 1, np.nan, np.nan, np.nan, np.nan]
    assert np.allclose(scores.by_class()["AP"], expected, equal_nan=True)
    assert scores.objects.tolist() == [1, 0, 1, 0, 0, 0, 0]


def test_crowds_are_neither_to_be_found_nor_wrong():
    crowd = scene([(0, 0, 100, 100), (110, 0, 150, 40)], [0, 0], crowd=[True, False])
    inside = [(0, 0, 20, 20), (40, 40, 60, 60), (110, 0, 150, 40)]
    answers = [found(inside, [0, 0, 0], [0.9, 0.8, 0.7])]
    assert computed(answers, [crowd]).compute()["mAP"] == pytest.approx(1)
    no_crowd = scene([(0, 0, 100, 100), (110, 0, 150, 40)], [0, 0])
    assert computed(answers, [no_crowd]).compute()["mAP"] < 0.5
    only = scene([(0, 0, 100, 100)], [0], crowd=[True])
    scores = computed([found([(0, 0, 20, 20)], [0], [0.9])], [only])
    assert np.isnan(scores.compute()["mAP"]) and scores.objects.sum() == 0


def test_objects_are_small_or_large_by_the_areas_that_were_given():
    box = [(0, 0, 120, 120)]
    given = computed([found(box, [0], [0.9])], [scene(box, [0], areas=[50.0])]).compute()
    assert given["mAP_small"] == pytest.approx(1) and np.isnan(given["mAP_large"])
    none = computed([found(box, [0], [0.9])], [scene(box, [0], areas=[0.0])]).compute()
    assert none["mAP_small"] == pytest.approx(1) and np.isnan(none["mAP_large"])


@pytest.mark.parametrize("masks", [False, True])
def test_pictures_without_objects_findings_or_both(masks):
    def nothing_found():
        return found(masks=torch.zeros(0, 1, SIDE, SIDE)) if masks else found()

    box = [(10, 10, 50, 50)]
    shapes = torch.from_numpy(ellipses(box)) if masks else None
    one_found = found(box, [0], [0.9], shapes)
    names = [f"{prefix}mAP" for prefix in (["", "mask_"] if masks else [""])]
    empty, full = scene(masks=masks, image_id=1), scene(box, [0], masks=masks, image_id=2)
    for answers, scenes, expected in (
        ([nothing_found()], [empty], np.nan),
        ([one_found], [empty], np.nan),
        ([nothing_found()], [full], 0),
        ([nothing_found(), one_found], [empty, full], 1),
        ([one_found, one_found], [empty, full], 0.5),  # wrong in the first, with the same score: the first comes first
        ([one_found, nothing_found()], [empty, full], 0),
        ([], [], np.nan),
    ):
        values = computed(answers, scenes, masks).compute()
        assert [values[name] for name in names] == pytest.approx([expected] * len(names), nan_ok=True, abs=1e-6)


@pytest.mark.parametrize("masks", [False, True])
def test_parts_of_processes_make_the_whole_in_any_order(masks):
    answers, scenes = generated(7, 15, masks=masks)
    whole = computed(answers, scenes, masks)
    parts = [computed(answers[rank::4], scenes[rank::4], masks) for rank in (2, 0, 3, 1)]
    nobody = DetectionScores(CLASSES, masks)
    nobody.compute()  # as a validation before would have left it
    for part in pickle.loads(pickle.dumps(parts)):  # as processes hand them over
        nobody.merge(part)
    assert nobody.images == 15 and (nobody.objects == whole.objects).all()
    assert nobody.compute() == pytest.approx(whole.compute(), nan_ok=True, abs=0)
    for name, values in whole.by_class().items():
        assert np.array_equal(nobody.by_class()[name], values, equal_nan=True)


def test_the_means_over_classes_are_the_means():
    scores = computed(*generated(3, 30, masks=True), masks=True)
    for prefix in ("", "mask_"):
        for of_class, mean in (("AP", "mAP"), ("AP50", "mAP50")):
            expected = scores.compute()[f"{prefix}{mean}"]
            assert np.nanmean(scores.by_class()[f"{prefix}{of_class}"]) == pytest.approx(expected, abs=1e-6)


def test_what_does_not_fit_is_refused():
    box = [(0, 0, 9, 9)]
    with pytest.raises(ValueError, match="found is of 1 pictures, scenes of 2"):
        computed([found()], [scene(), scene()])
    with pytest.raises(ValueError, match="picture 8: labels of what was found go from 5 to 5; classes are 0 to 4"):
        computed([found(box, [5], [0.5])], [scene(image_id=8)])
    with pytest.raises(ValueError, match="labels of its objects go from -1 to -1"):
        computed([found()], [scene(box, [-1])])
    with pytest.raises(ValueError, match="scores of what was found are not finite"):
        computed([found(box, [0], [float("nan")])], [scene()])
    with pytest.raises(ValueError, match="its objects have none"):
        computed([found(masks=torch.zeros(0, 1, 4, 4))], [scene()], masks=True)
    with pytest.raises(ValueError, match="none were found"):
        computed([found()], [scene(masks=True)], masks=True)
    with pytest.raises(ValueError, match=r"found are of \(4, 4\) pixels, those of the objects of \(240, 240\)"):
        computed([found(box, [0], [0.5], torch.ones(1, 1, 4, 4))], [scene(masks=True)], masks=True)
    with pytest.raises(ValueError, match="do not join"):
        DetectionScores(3, False).merge(DetectionScores(4, False))
