"""Every argument of every public function, class and pipeline call with every kind of value: it works, or one line.

`pytest -n 0 -q -s tests/sweep/test_public_calls.py` prints how many cases there are. The calls are in
`helpers/public_calls.py`.
"""

import collections
import inspect

import pytest
from helpers.extras import needs
from helpers.public_calls import CALLS, VALUES, answer

import d_emo


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs("video")) if name == "read_clip" else name for name in CALLS]
)
def test_each_argument_is_right_or_named_in_one_line(name):
    call, counts, wrong = CALLS[name], collections.Counter(), []
    for argument in call.names():
        flag = inspect.signature(call.function()).parameters[argument].annotation in (bool, "bool")
        for value in VALUES:
            if flag and "tensor" in value:  # any value is true or false, and a tensor says itself that it is neither
                continue
            kind, said = answer(call, argument, VALUES[value]())
            counts[kind] += 1
            if kind == "broken":
                wrong.append(f"{name} {argument} = {value}: {said}")
    print(f"\n{name}: {counts.total()} cases, {counts['accepted']} accepted, {counts['refused']} refused")
    assert not wrong, "\n".join(wrong)


def test_every_public_name_is_swept():
    swept = {name.partition(".")[0] for name in CALLS}
    assert set(d_emo.__all__) <= swept, set(d_emo.__all__) - swept
