"""Checks of arguments: each gives Python's own type, or one line of one form, whoever asks."""

import math
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest

from d_emo.common import checks
from d_emo.common.files import check_replaceable
from d_emo.common.numbers import finite_from, whole_from
from d_emo.common.ranges import Real, Whole
from d_emo.images.digits import digits_source
from d_emo.images.source import held_out

RULES = [
    (Whole(1), "a whole number from 1 on"),
    (Whole(0, 9, "3 is usual"), "a whole number from 0 to 9 (3 is usual)"),
    (Real(), "a finite number"),
    (Real(1), "a number from 1 on"),
    (Real(0, positive=True), "a number above 0"),
    (Real(high=2), "a number to 2"),
    (Real(high=2, below=True), "a number below 2"),
    (Real(0, 1, below=True), "a number from 0 and below 1"),
]


@pytest.mark.parametrize(("rule", "text"), RULES, ids=[text for _, text in RULES])
def test_a_rule_says_its_bounds_where_there_are_some(rule, text):
    assert str(rule) == text
    for value in (math.nan, math.inf, -math.inf, 10**400, -(10**400), True, "1", None, [1], np.zeros(2)):
        with pytest.raises(ValueError, match=r"^size=[^\n]* is not [^\n]*\.$") as error:
            rule.check(value, "size")
        assert str(error.value).endswith(f" is not {text}.") and len(str(error.value)) < 200


def test_numbers_of_numpy_become_pythons():
    assert type(checks.whole(np.int64(3), "size")) is int and type(checks.number(np.float32(0.5), "share")) is float
    assert checks.number(3, "share") == 3.0 and checks.one_of(np.int64(3), "channels", (1, 3)) == 3
    assert checks.path_named("a", "folder") == Path("a") == checks.path_named(Path("a"), "folder")


def test_texts_and_values_have_the_same_rule():
    with pytest.raises(ArgumentTypeError, match=r"^0 is not a whole number from 1 on$"):
        whole_from(1)("0")
    with pytest.raises(ArgumentTypeError, match=r"^-1 is not a number from 0 on$"):
        finite_from(0)("-1")
    assert whole_from(0)("0") == 0 and finite_from(0)("0.5") == 0.5


def test_any_share_between_nothing_and_all_may_be_held_out():
    """A thousandth of ImageNet is enough to validate on."""
    train, held = held_out(digits_source(), 0.006)  # one image a class is the least
    assert held.size == 11 and train.size + held.size == 1797
    for share in (0, 1, -0.1):
        with pytest.raises(ValueError, match="share="):
            held_out(digits_source(), share)


def test_a_folder_is_replaced_by_its_like_only(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / ".lock").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "config.json").touch()
    for name in ("none", "traces", "older"):
        check_replaceable(tmp_path / name, "--output-dir", "config.json", "model")
    for name, reason in (("file", "is no folder"), ("other", "is not empty and holds no model")):
        with pytest.raises(ValueError, match=rf"--output-dir .*{name} {reason}"):
            check_replaceable(tmp_path / name, "--output-dir", "config.json", "model")
