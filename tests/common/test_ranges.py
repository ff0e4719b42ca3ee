"""Rules of fields, and the decorator that asks them."""

import inspect
import math

import numpy as np
import pytest

from d_emo.common.ranges import Each, Flag, Maybe, OneOf, OneOrPair, Real, Rule, Whole, checked, take

NAN, INF = math.nan, math.inf
WHOLE, ODD, SHARE = Whole(1, 9), Whole(1, 9, odd=True), Real(0, 1, positive=True, below=True)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (WHOLE, [1, 9, np.int64(3)], [0, 10, -1, 10**30, 2.0, True, "3", None, NAN, INF, [1], np.float32(2), b"1"]),
        (ODD, [1, 3, 9], [2, 4, 11]),
        (Real(0, 1), [0, 1, 0.5, np.float32(0.5)], [-1e-9, 1.1, NAN, INF, -INF, 10**400, "0.5", True, None, [0.5], 1j]),
        (SHARE, [1e-9, 0.999], [0, 1, -1, 2, NAN]),
        (OneOf(("a", "b")), ["a", "b"], ["", "c", "A", None, 0, ["a"], np.array(["a", "b"])]),
        (OneOf((8, 16)), [8, np.int32(16)], [4, True, 8.0, "8"]),
        (Flag(), [True, False, np.True_], [0, 1, "true", None, []]),
        (Maybe(WHOLE), [None, 1], [0, "None", False]),
        (OneOrPair(WHOLE), [1, (1, 2), [3, 4]], [(), (1,), (1, 2, 3), "12", (0, 1), (1, None), {1: 2}, 0]),
        (Each(WHOLE, 1, 2), [[1], (1, 2)], [[], [1, 2, 3], [0], [1, "2"], "1", 1, None, {1}, np.array([1])]),
    ],
)
def test_rules_take_what_they_say_and_nothing_else(rule: Rule, good, bad):
    for value in good:
        taken = rule.take(value)
        assert taken == (tuple(value) if isinstance(rule, OneOrPair) and isinstance(value, list) else taken)
        assert type(taken).__module__ == "builtins"
    for value in bad:
        with pytest.raises(ValueError, match=r"^Thing: field=.* is not ") as refusal:
            take("Thing", {"field": value}, {"field": rule})
        assert str(refusal.value).endswith(f" is not {rule}.") and "\n" not in str(refusal.value)


def test_long_and_many_line_values_are_one_short_line():
    for value in ("x" * 10_000, "a\nb", list(range(10_000)), 10**5000, {str(i): i for i in range(1000)}):
        with pytest.raises(ValueError, match="Thing: field=") as refusal:
            take("Thing", {"field": value}, {"field": WHOLE})
        assert len(str(refusal.value)) < 250 and "\n" not in str(refusal.value)


class Thing:
    """A class with rules."""

    @checked({"size": WHOLE, "share": SHARE}, lambda values: "size and share" * (values["size"] * values["share"] > 4))
    def __init__(self, size: int = 2, share: float = 0.5, **more):
        self.size, self.share, self.more = size, share, more


def test_a_constructor_is_checked_whatever_way_it_is_called():
    assert list(inspect.signature(Thing.__init__).parameters) == ["self", "size", "share", "more"]
    thing = Thing(np.int64(3), other=1, _note=2)
    assert (thing.size, type(thing.size), thing.more) == (3, int, {"other": 1, "_note": 2})
    for call in (lambda: Thing(0), lambda: Thing(size=0)):
        with pytest.raises(ValueError, match=r"^Thing: size=0 is not a whole number from 1 to 9\.$"):
            call()
    with pytest.raises(ValueError, match=r"^Thing: size and share\.$"):
        Thing(9)
    with pytest.raises(ValueError, match=r"^Part: size=-1"):
        type("Part", (Thing,), {})(-1)
    with pytest.raises(TypeError, match="positional"):
        Thing(1, 0.5, 3)
