"""Scores from sums over a set: by hand, against scikit-learn, classes that never occur, nothing labelled."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, jaccard_score, recall_score

from d_emo.eval.segmentation.scores import SegmentationScores


def scores_of(*pictures, classes=2):
    scores = SegmentationScores(classes)
    for predicted, labels in pictures:
        scores.update(predicted, labels)
    return scores


def two_pictures():
    """4 pixels with one vessel, missed; 100 pixels with 50, all found."""
    small = np.zeros((2, 2), int), np.array([[1, 0], [0, 0]])
    large = np.repeat([[0, 1]], 50, axis=0)
    return small, (large, large)


def test_pixels_are_summed_before_anything_is_divided():
    small, large = two_pictures()
    scores = scores_of(small, large)
    assert scores.matrix.tolist() == [[53, 0], [1, 50]]
    assert scores.miou == pytest.approx((53 / 54 + 50 / 51) / 2, abs=1e-12)
    assert scores.mdice == pytest.approx((106 / 107 + 100 / 101) / 2, abs=1e-12)
    assert scores.macc == pytest.approx((1 + 50 / 51) / 2, abs=1e-12)
    assert scores.aacc == pytest.approx(103 / 104, abs=1e-12)
    mean_of_pictures = np.mean([scores_of(small).miou, scores_of(large).miou])
    assert mean_of_pictures == pytest.approx((3 / 8 + 1) / 2) and abs(mean_of_pictures - scores.miou) > 0.2


def test_they_are_scikit_learns():
    random = np.random.default_rng(0)
    labels = random.integers(0, 5, (3, 20, 30))
    predicted = np.where(random.random(labels.shape) < 0.6, labels, random.integers(0, 5, labels.shape))
    labels[random.random(labels.shape) < 0.1] = 255
    scores = scores_of(*zip(predicted, labels, strict=True), classes=5)
    known = labels != 255
    truth, answers = labels[known], predicted[known]
    np.testing.assert_allclose(scores.iou, jaccard_score(truth, answers, average=None), atol=1e-12)
    np.testing.assert_allclose(scores.dice, f1_score(truth, answers, average=None), atol=1e-12)
    np.testing.assert_allclose(scores.accuracy, recall_score(truth, answers, average=None), atol=1e-12)
    assert scores.aacc == pytest.approx((truth == answers).mean(), abs=1e-12)
    assert scores.labelled == known.sum()


def test_a_class_that_never_occurs_is_left_out_of_the_means():
    labels = np.array([[0, 0, 1, 1]])
    scores = scores_of((labels, labels), classes=4)
    assert (scores.miou, scores.macc, scores.mdice) == (1, 1, 1)
    assert np.isnan(scores.iou[2:]).all() and np.isnan(scores.accuracy[2:]).all() and np.isnan(scores.dice[2:]).all()


def test_a_class_that_is_only_predicted_counts_in_iou_and_dice_but_has_no_accuracy():
    scores = scores_of((np.array([[0, 2]]), np.array([[0, 0]])), classes=3)
    np.testing.assert_equal(scores.iou, [0.5, np.nan, 0])
    np.testing.assert_equal(scores.accuracy, [0.5, np.nan, np.nan])
    assert scores.miou == 0.25 and scores.macc == 0.5
    assert scores.mdice == pytest.approx(1 / 3)


@pytest.mark.parametrize("pictures", [[], [(np.zeros((3, 3), int), np.full((3, 3), 255))]])
def test_where_nothing_has_a_label_there_is_no_score(pictures):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = scores_of(*pictures, classes=3)
        assert scores.labelled == 0
        assert np.isnan([scores.miou, scores.aacc, scores.macc, scores.mdice]).all()


def test_batches_tensors_and_merged_parts_count_alike():
    random = np.random.default_rng(1)
    labels, predicted = random.integers(0, 3, (4, 6, 5)), random.integers(0, 3, (4, 6, 5))
    labels[0] = 255
    together, parts = SegmentationScores(3), [SegmentationScores(3), SegmentationScores(3)]
    together.update(torch.tensor(predicted), torch.tensor(labels, dtype=torch.uint8))
    for index in range(4):
        parts[index % 2].update(predicted[index].astype(np.int32), labels[index].astype(np.int32))
    parts[0].merge(parts[1])
    np.testing.assert_array_equal(parts[0].matrix, together.matrix)
    assert together.matrix.sum() == 3 * 30 and together.matrix.dtype == np.int64


def test_another_ignored_label():
    scores = SegmentationScores(2, ignore_index=0)
    scores.update(np.array([0, 1, 1]), np.array([0, 0, 1]))
    assert scores.matrix.tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"shape \(2, 3\), the labels \(3, 2\)"),
        (np.full((1, 1), 2), np.zeros((1, 1), int), "prediction 2 is none of the 2 classes"),
        (np.zeros((1, 1), int), np.full((1, 1), 2), "label 2 is none of the 2 classes"),
        (np.zeros((1, 2), int), np.array([[255, -1]]), "label -1 is none of the 2 classes"),
    ],
)
def test_what_is_refused(predicted, labels, message):
    scores = SegmentationScores(2)
    with pytest.raises(ValueError, match=message):
        scores.update(predicted, labels)
    assert scores.labelled == 0
    with pytest.raises(ValueError, match="counts of 2 and of 3 classes"):
        scores.merge(SegmentationScores(3))
