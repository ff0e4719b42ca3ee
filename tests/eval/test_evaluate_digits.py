"""The digits evaluation tells drawing from remembering, and right from wrong."""

import numpy as np
import pytest
from helpers.pipelines import tiny_pipeline
from helpers.training import run_here

from d_emo.eval import evaluate_digits
from d_emo.eval.digits_report import nearest, real_digits, score_digits


@pytest.fixture(scope="module")
def digits():
    return real_digits(16)


def test_classifier_is_good_enough_to_judge(digits):
    real, classes = digits
    report = score_digits(real[:200], classes[:200], real, classes)
    assert report.classifier_accuracy >= 0.93


def test_copies_of_real_images_score_right_and_count_as_close(digits):
    real, classes = digits
    report = score_digits(real[:100], classes[:100], real, classes)
    assert report.requested_class > 0.97
    assert report.nearest_real_to_sample == 0
    assert report.close_share == 1


def test_wrong_labels_and_noise_score_badly(digits):
    real, classes = digits
    assert score_digits(real[:100], (classes[:100] + 1) % 10, real, classes).requested_class < 0.05
    noise = np.random.RandomState(0).uniform(-1, 1, (100, 256)).astype(np.float32)
    report = score_digits(noise, classes[:100], real, classes)
    assert report.requested_class < 0.3
    assert report.close_share == 0
    assert report.nearest_real_to_sample > report.nearest_real_to_real


def test_nearest_equals_brute_force():
    random = np.random.RandomState(1)
    points, others = random.randn(5, 7).astype(np.float32), random.randn(9, 7).astype(np.float32)
    distances = np.sqrt(((points[:, None] - others[None]) ** 2).mean(-1))
    indices, values = nearest(points, others)
    np.testing.assert_array_equal(indices, distances.argmin(1))
    np.testing.assert_allclose(values, distances.min(1), rtol=1e-5)


def test_command_refuses_what_is_not_a_digits_model(tmp_path, capsys):
    code, printed = run_here(capsys, "--model", tmp_path, main=evaluate_digits.main)
    assert code and "is not a pipeline folder" in printed
    tiny_pipeline().save_pretrained(tmp_path)
    code, printed = run_here(capsys, "--model", tmp_path, main=evaluate_digits.main)
    assert code and "was not trained on the digits" in printed
