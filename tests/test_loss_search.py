"""The search for the smallest bundle within a bound, on models that are formulas: what it finds, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from edgert.allocating import Solution
from edgert.bits import Bits
from edgert.divergence import Rise
from edgert.errors import OptionError
from edgert.loss_search import Search
from edgert.quant.formats import FORMATS

_BITS = Bits((FORMATS["int4"],), np.zeros((1, 1, 3), np.int64))
_LEAST, _MOST = 200, 800  # bytes


def of_size(n_bytes: int, seconds: float | None = None) -> Solution:
    """A solution whose expected loss halves with every 100 bytes."""
    return Solution(_BITS, n_bytes, 2.0 ** (-n_bytes / 100), 0.0, seconds)


def solve(expected: float) -> Solution:
    """The smallest one within an expected loss."""
    n_bytes = math.ceil(-100 * math.log2(expected))
    if n_bytes > _MOST:
        raise OptionError("less than any loses")
    return of_size(max(n_bytes, _LEAST))


def search(rise: Callable[[Solution], float], error: float = 0.0) -> Search:
    return Search(solve, of_size(_MOST), of_size(_LEAST), lambda found: Rise(rise(found), error))


@pytest.mark.parametrize("factor", [0.05, 0.4, 1.0, 3.0])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_what_is_found_keeps_the_bound_and_is_the_smallest_that_did(factor: float, power: float) -> None:
    made = search(lambda found: factor * (found.loss * 10) ** power / 10)
    found = made.go(0.1)
    assert found is not None and len(made.tried) <= 6
    kept = [one.solution.n_bytes for one in made.tried if one.worst <= 0.1]
    assert found.n_bytes == min(kept)


def test_a_later_larger_bundle_that_keeps_the_bound_is_not_taken_for_an_earlier_smaller_one() -> None:
    rises = iter([0.02, 0.2, 0.03, 0.2, 0.04, 0.2])
    made = search(lambda found: next(rises))
    found = made.go(0.1)
    kept = [one.solution for one in made.tried if one.worst <= 0.1]
    assert len(kept) > 1 and found is not None and found.n_bytes == min(one.n_bytes for one in kept)


def test_attempts_lie_between_the_largest_loss_that_passed_and_the_least_that_missed() -> None:
    made = search(lambda found: 0.02 if found.loss < 0.2 else 0.9)
    made.go(0.1)
    passed, missed = 0.0, math.inf
    for one in made.tried:
        assert passed < one.expected < missed
        passed, missed = (one.expected, missed) if one.worst <= 0.1 else (passed, one.expected)


@pytest.mark.parametrize("scale", [1e-5, 1e-2, 1.0, 30.0])
def test_where_losses_are_expected_far_too_low_or_high_no_bundle_is_tried_twice(scale: float) -> None:
    """The least bundle loses 0.5 whatever is expected of it, and the bound asks for about 430 bytes."""

    def scaled(found: Solution) -> Solution:
        return replace(found, loss=scale * found.loss)

    made = Search(
        lambda expected: scaled(solve(expected / scale)),
        scaled(of_size(_MOST)),
        scaled(of_size(_LEAST)),
        lambda found: Rise(2 * found.loss / scale, 0.0),
    )
    found = made.go(0.1)
    sizes = [one.solution.n_bytes for one in made.tried]
    assert found is not None and len(set(sizes)) == len(sizes) and 430 <= found.n_bytes <= 480, sizes


def test_before_it_is_given_up_the_largest_is_tried() -> None:
    made = search(lambda found: 0.05 if found.n_bytes == _MOST else 0.11)
    found = made.go(0.1)
    assert found is not None and found.n_bytes == _MOST and len(made.tried) <= 6
    assert search(lambda found: 0.11).go(0.1) is None
    tried = search(lambda found: 0.11)
    tried.go(0.1)
    assert tried.tried[-1].solution.n_bytes == _MOST


def test_one_measurement_raises_little_and_noise_nothing() -> None:
    made = search(lambda found: 1e-5)
    made.go(0.01)
    steps = [after.expected / before.expected for before, after in zip(made.tried, made.tried[1:], strict=False)]
    assert steps and max(steps) <= 4.0
    noisy = search(lambda found: -0.02, error=0.015)
    assert noisy.go(0.01) is not None and len(noisy.tried) == 1


def test_a_rise_that_is_lost_in_a_small_error_is_no_end() -> None:
    """As for a model that is surer than it should be: noise helps it, up to a point."""
    made = search(lambda found: -0.002 if found.n_bytes > 450 else 0.05, error=0.001)
    found = made.go(0.01)
    assert found is not None and 450 < found.n_bytes < 500, [one.solution.n_bytes for one in made.tried]
    assert len({one.solution.n_bytes for one in made.tried}) == len(made.tried) > 1


def test_nothing_but_the_largest_is_expected_to_lose_more_than_it_may() -> None:
    for most in (0.05, 0.01, 1e-9):
        made = search(lambda found: -0.02)
        found = made.go(0.1, most)
        assert found is not None and found.loss <= max(most, of_size(_MOST).loss)
        assert all(one.solution.loss <= max(most, of_size(_MOST).loss) for one in made.tried)
    assert found.n_bytes == _MOST


def test_the_fastest_is_taken_where_time_counts() -> None:
    seconds = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])

    def timed(expected: float) -> Solution:
        return of_size(500 - len(made.tried), next(seconds))

    made = Search(timed, of_size(_MOST), of_size(_LEAST), lambda found: Rise(0.01, 0.0))
    found = made.go(0.1)
    assert found is not None and found.seconds == 1.0
