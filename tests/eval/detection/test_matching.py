"""Which finding is which object, by hand: classes, crowds, duplicates."""

import numpy as np
import pytest
from helpers.scenes import found, scene

from d_emo.eval.detection.matching import IN_CROWD, NOTHING, Confusion, match

LEFT, RIGHT, BELOW = (0, 0, 40, 40), (100, 0, 140, 40), (0, 100, 40, 140)


def test_the_best_finding_chooses_first_and_objects_are_found_once():
    there = scene([LEFT, RIGHT, BELOW], [0, 1, 2])
    guesses = [LEFT, LEFT, (102, 0, 142, 40), (200, 200, 220, 220)]
    answer = found(guesses, [0, 0, 2, 1], [0.6, 0.9, 0.8, 0.7])
    matches = match(answer, there)
    assert matches.found.tolist() == [0, 2, 1, 0]  # the best first
    assert matches.objects.tolist() == [0, 1, NOTHING, NOTHING]  # the second finding of LEFT is of nothing
    assert matches.right == 1 and matches.score == pytest.approx(2 * 1 / (3 + 4))
    text = "1 of 3 right, 1 missed, 1 of another class, 2 found where nothing is"
    assert matches.describe() == text


def test_findings_of_a_smaller_score_and_of_a_smaller_overlap_do_not_count():
    there = scene([LEFT], [0])
    half, less = (0, 0, 40, 20), (0, 0, 40, 19)  # overlaps of exactly 0.5, and below
    assert match(found([half], [0], [0.5]), there).right == 1
    assert match(found([less], [0], [0.5]), there).right == 0
    assert match(found([half], [0], [0.25]), there).found.tolist() == []
    assert match(found([half], [0], [0.25]), there, score=0.25).right == 1


def test_of_several_objects_the_one_that_overlaps_most_is_taken_if_it_is_free():
    there = scene([(0, 0, 40, 40), (0, 4, 40, 44)], [0, 1])
    answer = found([(0, 3, 40, 43), (0, 3, 40, 43)], [1, 0], [0.9, 0.8])
    assert match(answer, there).objects.tolist() == [1, 0]


def test_what_lies_in_a_crowd_is_neither_right_nor_wrong():
    there = scene([(0, 0, 100, 100), RIGHT], [0, 0], crowd=[True, False])
    answer = found([(10, 10, 30, 30), (90, 90, 120, 120)], [0, 0], [0.9, 0.8])
    matches = match(answer, there)
    assert matches.objects.tolist() == [IN_CROWD, NOTHING]  # the second lies in it by a ninth
    assert matches.true.tolist() == [0] and matches.score == 0
    assert match(found([(10, 10, 30, 30)], [0], [0.9]), scene([(0, 0, 100, 100)], [0], crowd=[True])).score == 1


def test_empty_pictures():
    assert match(found(), scene()).score == 1
    assert match(found([LEFT], [0], [0.9]), scene()).score == 0
    assert match(found(), scene([LEFT], [0])).score == 0


def test_counts_by_class_over_pictures():
    confusion = Confusion(3)
    confusion.add(match(found([LEFT, RIGHT, BELOW], [0, 1, 1], [0.9, 0.8, 0.7]), scene([LEFT, RIGHT], [0, 0])))
    confusion.add(match(found([LEFT], [0], [0.9]), scene([LEFT, RIGHT, BELOW], [0, 0, 1])))
    confusion.add(match(found([LEFT], [2], [0.9]), scene([(0, 0, 100, 100)], [0], crowd=[True])))
    expected = np.zeros((4, 4), dtype=int)
    expected[0, 0], expected[0, 1], expected[0, 3] = 2, 1, 1  # right, taken for 1, missed
    expected[1, 3] = 1  # missed
    expected[3, 1] = 1  # found where nothing is
    assert confusion.matrix.tolist() == expected.tolist()
    counts = confusion.of_class(0)
    assert (counts.objects, counts.right, counts.other, counts.missed) == (4, 2, 1, 1)
    assert (counts.found, counts.wrongly, counts.taken_for) == (2, 0, 1)
    assert (confusion.of_class(1).found, confusion.of_class(1).wrongly, confusion.of_class(1).taken_for) == (2, 1, None)
    assert confusion.of_class(2).objects == confusion.of_class(2).found == 0
