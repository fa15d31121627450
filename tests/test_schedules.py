import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calipers.training.schedules import (
    Piecewise,
    SmoothRamp,
    constant,
    cyclic,
    linear,
    multistep,
    one_cycle,
    piecewise,
    smooth_ramp,
)

ALL = [
    constant(0.3),
    linear(1.0, 0.5, start=2, end=10),
    piecewise((0, 1.0), (3, 2.0), (3, 5.0), (7, 0.0)),
    cyclic(0.2, epochs=15),
    one_cycle(1e-3, epochs=20),
    multistep(5e-4, 50, 60),
    smooth_ramp(0.1, start=1, end=21),
]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
def test_schedules_print_pickle_and_compare(schedule):
    assert pickle.loads(pickle.dumps(schedule)) == schedule
    assert hash(schedule) == hash(pickle.loads(pickle.dumps(schedule)))
    assert all(isinstance(schedule(e), float) for e in (0, 1, 3, 3.5, 100))


def test_values():
    assert [linear(0.0, 1.0, start=1, end=3)(e) for e in (0, 1, 2, 3, 9)] == [0, 0, 0.5, 1, 1]
    jump = piecewise((0, 1.0), (3, 2.0), (3, 5.0), (7, 0.0))
    assert jump(3) == 5.0
    assert jump(3 - 1e-12) == pytest.approx(2.0)
    assert jump(5) == 2.5
    triangle = cyclic(0.2, epochs=10)
    assert [triangle(e) for e in (0, 2.5, 5, 7.5, 10)] == pytest.approx([0, 0.1, 0.2, 0.1, 0])
    steps = multistep(5e-4, 50, 60)
    assert [steps(e) for e in (49.999, 50, 60)] == pytest.approx([5e-4, 1e-4, 2e-5])


def published(s: float, top: float, s0: float, s1: float) -> float:
    """The ramp as reference code writes it, middle 0.25 and beta 4, on steps."""
    middle = s0 + 0.25 * (s1 - s0)
    t = (middle - s0) ** 3
    a = top / ((s1 - middle) * 4 * t + (middle - s0) * t)
    if s <= s0:
        return 0.0
    if s < middle:
        return a * (s - s0) ** 4
    begin = a * (middle - s0) ** 4
    return min(top, begin + (top - begin) * (s - middle) / (s1 - middle))


@given(st.floats(0, 30), st.floats(0.01, 1))
def test_the_ramp_is_the_published_one(epoch, top):
    assert smooth_ramp(top, start=1, end=21)(epoch) == pytest.approx(
        published(epoch, top, 1, 21), abs=1e-12
    )


def test_the_ramp_at_its_ends_and_its_switch():
    ramp = smooth_ramp(0.3, start=1, end=21)
    assert ramp(1) == 0.0
    assert ramp(21) == 0.3
    assert ramp(6) == pytest.approx(0.3 / 13)
    h = 1e-6
    left, right = (ramp(6) - ramp(6 - h)) / h, (ramp(6 + h) - ramp(6)) / h
    assert left == pytest.approx(right, rel=1e-4)
    values = [ramp(e / 100) for e in range(2300)]
    assert values == sorted(values)
    assert math.isclose(max(values), 0.3)


def test_bad_schedules_are_refused():
    with pytest.raises(ValueError, match="do not rise"):
        Piecewise(((3, 1.0), (1, 2.0)))
    with pytest.raises(ValueError, match="at least one"):
        Piecewise(())
    with pytest.raises(ValueError, match="not after start"):
        SmoothRamp(0.1, 5, 5)
    with pytest.raises(ValueError, match="middle"):
        SmoothRamp(0.1, 0, 5, middle=0)
