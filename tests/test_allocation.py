"""Allocation: against trying all choices, what the bound promises, and what cannot be done, with figures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import OptionError
from edgert.experts.allocation import Allocation, Mask, Numbers, allocate, allocate_few
from edgert.types import Ids

Instance = tuple[Ids, Numbers, Mask]


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    """A few items with a few options; sizes and losses that are often equal, or zero, or far apart."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    count = shape[0] * shape[1]
    size = st.integers(0, 6) | st.integers(0, 1 << 40)
    loss = st.sampled_from([0.0, 1e-9, 0.1, 0.2, 0.3, 1.0]) | st.floats(1e-4, 1e6)
    sizes = np.array(draw(st.lists(size, min_size=count, max_size=count)), np.int64).reshape(shape)
    losses = np.array(draw(st.lists(loss, min_size=count, max_size=count)), np.float64).reshape(shape)
    allowed = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count))).reshape(shape)
    allowed[np.arange(shape[0]), draw(st.integers(0, shape[1] - 1))] = True
    return sizes, losses, allowed


def all_choices(allowed: Mask) -> list[Ids]:
    return [np.array(choice) for choice in itertools.product(*(np.flatnonzero(row).tolist() for row in allowed))]


def total(table: Numbers | Ids, choice: Ids) -> float:
    return math.fsum(table[np.arange(len(choice)), choice])


def best(weights: Numbers | Ids, values: Numbers | Ids, limit: float, allowed: Mask) -> float:
    """The least sum of values within the limit, by trying all; infinite if there is none."""
    within = (total(values, c) for c in all_choices(allowed) if total(weights, c) <= limit)
    return min(within, default=math.inf)


def holds(found: Allocation, optimum: float, values: Numbers | Ids, allowed: Mask) -> None:
    """What is promised of any answer: the bound is one, and one step of an item is the most that is lost."""
    rounding = 1e-9 * max(1.0, abs(optimum), float(np.abs(values).max()))
    spread = (np.where(allowed, values, -np.inf).max(axis=1) - np.where(allowed, values, np.inf).min(axis=1)).max()
    assert found.bound <= optimum + rounding
    assert optimum <= found.minimised + rounding
    assert found.minimised <= found.bound + spread + rounding


@given(instances(), st.floats(0, 1))
def test_the_least_loss_within_a_size(instance: Instance, share: float) -> None:
    sizes, losses, allowed = instance
    limits = [int(total(sizes, choice)) for choice in all_choices(allowed)]
    limit = min(limits) + int(share * (max(limits) - min(limits)))
    found = allocate(sizes, losses, most_bytes=limit, allowed=allowed)
    assert found.n_bytes == total(sizes, found.choice) <= limit
    assert found.loss == found.minimised == total(losses, found.choice)
    assert allowed[np.arange(len(sizes)), found.choice].all()
    holds(found, best(sizes, losses, limit, allowed), losses, allowed)


@given(instances(), st.floats(0, 1))
def test_the_fewest_bytes_within_a_loss(instance: Instance, share: float) -> None:
    sizes, losses, allowed = instance
    limits = [total(losses, choice) for choice in all_choices(allowed)]
    limit = min(limits) + share * (max(limits) - min(limits))
    found = allocate(sizes, losses, most_loss=limit, allowed=allowed)
    assert found.loss == total(losses, found.choice) <= limit
    assert found.n_bytes == found.minimised == total(sizes, found.choice)
    holds(found, best(losses, sizes, limit, allowed), sizes, allowed)


@given(instances(), st.floats(0, 1), st.randoms())
def test_the_least_cost_within_a_loss(instance: Instance, share: float, random: object) -> None:
    sizes, losses, allowed = instance
    costs = np.random.default_rng(random.getrandbits(32)).integers(0, 5, sizes.shape) / 4  # type: ignore[attr-defined]
    limits = [total(losses, choice) for choice in all_choices(allowed)]
    limit = min(limits) + share * (max(limits) - min(limits))
    found = allocate(sizes, losses, most_loss=limit, costs=costs, allowed=allowed)
    assert found.loss <= limit and found.minimised == total(costs, found.choice)
    holds(found, best(losses, costs, limit, allowed), costs, allowed)


@given(instances())
def test_a_limit_below_the_least_is_refused_with_both_figures(instance: Instance) -> None:
    sizes, losses, allowed = instance
    least = min(int(total(sizes, choice)) for choice in all_choices(allowed))
    with pytest.raises(OptionError, match=rf"{least - 1:,} bytes are below {least:,}, .* {len(sizes)} matrices"):
        allocate(sizes, losses, most_bytes=least - 1, allowed=allowed)
    least_loss = min(total(losses, choice) for choice in all_choices(allowed))
    with pytest.raises(OptionError, match=r"a loss of .* is below"):
        allocate(sizes, losses, most_loss=np.nextafter(least_loss, -1), allowed=allowed)
    assert allocate(sizes, losses, most_bytes=least, allowed=allowed).n_bytes == least
    assert allocate(sizes, losses, most_loss=least_loss, allowed=allowed).loss == least_loss


def test_equal_options_and_equal_items_go_by_index() -> None:
    sizes, losses = np.array([[4, 2, 4, 2]] * 3), np.array([[0.0, 1.0, 0.0, 1.0]] * 3)
    assert allocate(sizes, losses, most_bytes=6).choice.tolist() == [1, 1, 1]
    assert allocate(sizes, losses, most_bytes=9).choice.tolist() == [0, 1, 1]
    assert allocate(sizes, losses, most_loss=1.0).choice.tolist() == [1, 0, 0]
    assert allocate(sizes, losses, most_bytes=100).choice.tolist() == [0, 0, 0]


def test_of_equal_loss_the_smaller_and_of_equal_size_the_better() -> None:
    sizes, losses = np.array([[8, 4, 4]]), np.array([[0.5, 0.5, 0.7]])
    assert allocate(sizes, losses, most_bytes=100).choice.tolist() == [1]
    assert allocate(sizes, losses, most_loss=100.0).choice.tolist() == [1]


def test_room_that_no_step_along_a_hull_fits_is_used() -> None:
    sizes, losses = np.array([[0, 5, 10]]), np.array([[10.0, 9.0, 0.0]])  # the middle one lies above the hull
    found = allocate(sizes, losses, most_bytes=7)
    assert found.choice.tolist() == [1] and found.bound == pytest.approx(3.0)


def test_a_large_model_comes_within_a_thousandth_of_the_bound_and_the_order_of_options_does_not_matter() -> None:
    random = np.random.default_rng(5)
    n_items, bits = 3 * 1024, np.linspace(2.1, 8.5, 24)
    sizes = np.tile((bits * 768 * 2048 / 8).astype(np.int64), (n_items, 1))
    losses = np.exp(random.normal(0, 2, (n_items, 1)) + random.normal(0, 0.3, sizes.shape)) * 4.0**-bits
    limit = int(n_items * 3.0 * 768 * 2048 / 8)
    found = allocate(sizes, losses, most_bytes=limit)
    assert found.n_bytes <= limit and found.minimised <= 1.001 * found.bound
    order = random.permutation(24)
    assert np.array_equal(order[allocate(sizes[:, order], losses[:, order], most_bytes=limit).choice], found.choice)
    back = allocate(sizes, losses, most_loss=found.loss)
    assert back.n_bytes <= 1.0001 * found.n_bytes and back.minimised <= 1.0001 * back.bound


@given(instances(), st.floats(0, 1), st.integers(1, 4))
def test_few_options_keep_the_limit_and_lose_no_less(instance: Instance, share: float, most: int) -> None:
    sizes, losses, allowed = instance
    limits = [int(total(sizes, choice)) for choice in all_choices(allowed)]
    limit = min(limits) + int(share * (max(limits) - min(limits)))
    found = allocate_few(sizes, losses, most_options=most, most_bytes=limit, allowed=allowed)
    assert found.n_bytes == total(sizes, found.choice) <= limit
    assert allowed[np.arange(len(sizes)), found.choice].all()
    if len(set(found.choice.tolist())) > most:  # either nothing can be left out, or the limit is at its least
        return
    few = [choice for choice in all_choices(allowed) if len(set(choice.tolist())) <= most]
    optimum = min(total(losses, choice) for choice in few if total(sizes, choice) <= limit)
    assert found.loss >= optimum - 1e-9 * max(1.0, optimum)


def test_the_options_given_up_are_those_that_others_stand_in_for() -> None:
    random, n_items = np.random.default_rng(3), 600
    bits = np.array([2.0, 2.1, 3.0, 4.0, 4.1, 8.0])  # some almost the same, the last for a few items
    sizes = np.tile((bits * 1000).astype(np.int64), (n_items, 1))
    losses = np.exp(random.normal(0, 1, (n_items, 1))) * 4.0**-bits
    losses[:5] *= 1e5
    limit = 3200 * n_items
    whole = allocate(sizes, losses, most_bytes=limit)
    used = np.bincount(whole.choice)
    assert (used > 0).all() and used.argmin() == 5 and whole.price > 0
    found = allocate_few(sizes, losses, most_options=4, most_bytes=limit)
    kept = set(bits[found.choice].tolist())
    assert len(kept) == 4 and kept >= {3.0, 8.0} and found.loss <= 1.03 * whole.loss
    back = allocate_few(sizes, losses, most_options=4, most_loss=found.loss)
    assert len(set(back.choice.tolist())) <= 4 and back.n_bytes <= 1.001 * found.n_bytes


def test_the_only_option_of_an_item_stays_and_a_limit_that_asks_for_more_gets_them() -> None:
    sizes, losses = np.array([[1, 2, 3]] * 4), np.array([[3.0, 2.0, 0.0]] * 4)
    allowed = np.ones(sizes.shape, np.bool_)
    allowed[0] = [False, True, False]
    found = allocate_few(sizes, losses, most_options=1, most_bytes=8, allowed=allowed)
    assert found.choice.tolist() == [1, 1, 1, 1]
    allowed[1] = [True, False, False]
    found = allocate_few(sizes, losses, most_options=1, most_bytes=9, allowed=allowed)
    assert found.choice[:2].tolist() == [1, 0] and 2 not in found.choice
    found = allocate_few(sizes, losses, most_options=1, most_loss=2.0 + 3.0, allowed=allowed)
    assert found.choice.tolist() == [1, 0, 2, 2]


@pytest.mark.parametrize(
    "limits", [{}, {"most_bytes": 4, "most_loss": 1.0}, {"most_bytes": 4, "costs": np.ones((1, 1))}]
)
def test_limits_that_make_no_sense_are_refused(limits: dict[str, object]) -> None:
    with pytest.raises(OptionError, match="most bytes or the most loss"):
        allocate(np.ones((1, 1), np.int64), np.ones((1, 1)), **limits)  # type: ignore[arg-type]


def test_figures_that_are_none_are_refused() -> None:
    sizes, losses = np.ones((2, 2), np.int64), np.array([[0.0, 1.0], [np.nan, 1.0]])
    with pytest.raises(OptionError, match="option 0 of item 1 has 1 bytes and a loss of nan"):
        allocate(sizes, losses, most_bytes=9)
    allowed = np.array([[True, True], [False, True]])
    assert allocate(sizes, losses, most_bytes=9, allowed=allowed).choice.tolist() == [0, 1]
    with pytest.raises(OptionError, match="no option is allowed for item 1"):
        allocate(sizes, losses, most_bytes=9, allowed=allowed & [[True], [False]])
