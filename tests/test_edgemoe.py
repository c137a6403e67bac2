"""EdgeMoE's two widths, and cheap guesses at sensitivity against definitions written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgert.errors import OptionError
from edgert.experts.allocation import Mask
from edgert.experts.edgemoe import choose_low
from edgert.experts.sensitivity import output_errors, rank_correlation, second_order, wanda_score

LOSSES = arrays.arrays(np.float64, (3, 4), elements=st.sampled_from([0.0, 0.1, 0.2, 0.5, math.nan]) | st.floats(0, 1))


@given(LOSSES, st.floats(0, 4))
def test_the_least_sensitive_get_the_low_width_until_the_tolerance_is_reached(
    alone: np.ndarray, tolerance: float
) -> None:
    measured = list[int]()

    def measure(low: Mask) -> float:
        assert not low[np.isnan(alone)].any()
        measured.append(int(low.sum()))
        return math.fsum(alone[low])

    found = choose_low(alone, measure, tolerance)
    assert found.loss == math.fsum(alone[found.low]) <= tolerance
    assert [count for count, _ in found.measured] == measured and len(measured) <= 2 + math.log2(12) + 1
    ranked = sorted((loss, place) for place, loss in enumerate(alone.reshape(-1).tolist()) if not math.isnan(loss))
    count = int(found.low.sum())
    assert sorted(np.flatnonzero(found.low).tolist()) == sorted(place for _, place in ranked[:count])
    if count < len(ranked):
        assert math.fsum(loss for loss, _ in ranked[: count + 1]) > tolerance


def test_no_more_than_so_many_are_lowered() -> None:
    for most in range(5):
        assert choose_low(np.ones((2, 2)), lambda low: 0.0, 0.02, most).low.sum() == most


def test_a_base_that_loses_too_much_is_refused() -> None:
    with pytest.raises(OptionError, match=r"base width the loss is 3\.00%, above 2\.00%"):
        choose_low(np.ones((2, 2)), lambda low: 0.03, 0.02)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=9))
def test_rank_correlation_is_that_of_mean_ranks(pairs: list[tuple[int, int]]) -> None:
    def rank(values: list[int], value: int) -> float:
        return sum(other < value for other in values) + (values.count(value) + 1) / 2

    a, b = ([pair[side] for pair in pairs] for side in (0, 1))
    found = rank_correlation(np.array([*a, np.nan]), np.array([*b, 1.0]))
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(found)
    else:
        expected = np.corrcoef([rank(a, value) for value in a], [rank(b, value) for value in b])[0, 1]
        assert found == pytest.approx(expected)


def test_guesses_are_what_they_say() -> None:
    random = np.random.default_rng(3)
    errors = random.random((2, 4, 3, 2)).astype(np.float32)
    share, gains = random.random((2, 4)), np.array([0.5, 2.0], np.float32)
    rise = output_errors(errors, share, 0, 1)
    assert rise[1, 2] == pytest.approx(share[1, 2] * float((errors[1, 2, :, 0] - errors[1, 2, :, 1]).sum()), rel=1e-5)
    assert np.allclose(second_order(errors, share, gains, 0, 1), rise * [[0.5], [2.0]])
    matrices = [random.normal(size=shape).astype(np.float32) for shape in ((5, 3), (5, 3), (3, 5))]
    rows, hidden = random.normal(size=(7, 3)), random.normal(size=(7, 5))
    expected = sum(
        abs(float(w[i, j])) * math.sqrt(sum(x[j] ** 2 for x in inputs))
        for w, inputs in zip(matrices, (rows, rows, hidden), strict=True)
        for i, j in np.ndindex(*w.shape)
    )
    moments = [np.mean(inputs**2, axis=0, dtype=np.float32) for inputs in (rows, rows, hidden)]
    assert wanda_score(matrices, moments, 7) == pytest.approx(expected, rel=1e-5)
