"""How many bits each matrix gets: one option for every item, the least of one sum while another stays within a limit.

The multiple-choice knapsack, solved over the lower convex hulls of the items (Sinha and Zoltners, Operations Research
27, 1979): steps along all hulls are taken in order of what they save for what they use up, as long as they fit; then
what room is left is filled. What the linear relaxation reaches is a bound on every possible choice, and what is found
is never farther from it than one step of one item. It knows bytes and losses, and nothing of experts, bits or formats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.errors import OptionError
from edgert.types import Ids

Numbers = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Allocation:
    """An option for every item: choice (n_items,), with the bytes and the loss of all together.

    minimised: the sum that was to be small (loss within a size; bytes, or costs, within a loss). bound: no choice
    within the limit has less of it, to rounding; and of the costliest step of an item, less than one lies between.
    price: what a limit higher by one would save of it, 0 where nothing would.
    """

    choice: Ids
    n_bytes: int
    loss: float
    minimised: float
    bound: float
    price: float


def allocate(
    sizes: Ids,
    losses: Numbers,
    *,
    most_bytes: int | None = None,
    most_loss: float | None = None,
    costs: Numbers | None = None,
    allowed: Mask | None = None,
) -> Allocation:
    """The option of each item with the least loss within `most_bytes`, or the fewest bytes within `most_loss`.

    All arrays are (n_items, n_options): sizes in bytes, losses additive and in any unit, costs (to be minimised within
    `most_loss` instead of bytes), allowed: where False the option is not to be chosen. The same input gives the same
    choice on every machine. Of options with equal figures the lower index is chosen, of steps that save equally much
    for what they use the one of the lower item. OptionError where even the best choice exceeds the limit.
    """
    allowed = np.ones(sizes.shape, np.bool_) if allowed is None else allowed
    _check(sizes, losses, allowed)
    if (most_bytes is None) == (most_loss is None) or (costs is not None and most_loss is None):
        raise OptionError("give the most bytes or the most loss, not both; costs are minimised within the most loss")
    if most_loss is not None:
        _check_limit(np.where(allowed, losses, np.inf), most_loss, "a loss of {0:.4g} is below {1:.4g}, the least that")
        solution = _solve(losses, sizes.astype(np.float64) if costs is None else costs, most_loss, allowed)
    else:
        assert most_bytes is not None
        _check_limit(np.where(allowed, sizes, np.inf), most_bytes, "{0:,.0f} bytes are below {1:,.0f}, the least that")
        solution = _solve(sizes.astype(np.float64), losses, most_bytes, allowed)
    items = np.arange(len(sizes))
    n_bytes, loss = int(sizes[items, solution.choice].sum()), math.fsum(losses[items, solution.choice])
    return Allocation(solution.choice, n_bytes, loss, solution.value, solution.bound, solution.price)


def allocate_few(
    sizes: Ids,
    losses: Numbers,
    *,
    most_options: int,
    most_bytes: int | None = None,
    most_loss: float | None = None,
    costs: Numbers | None = None,
    allowed: Mask | None = None,
) -> Allocation:
    """As `allocate`, with at most so many of the options in use, all items together, as far as the limit lets it.

    They are given up one by one: first the one whose items lose least with their next best at the price of the limit.
    Leaving out the one that fewest items use loses several times as much: many of those may have nothing like it. What
    is the only option of some item stays.
    """
    allowed = np.ones(sizes.shape, np.bool_) if allowed is None else allowed

    def solve(allowed: Mask) -> Allocation:
        return allocate(sizes, losses, most_bytes=most_bytes, most_loss=most_loss, costs=costs, allowed=allowed)

    found = solve(allowed)
    values = losses if most_loss is None else sizes if costs is None else costs
    weights = sizes if most_loss is None else losses
    while len(used := np.unique(found.choice)) > most_options:
        kept = (allowed & (np.count_nonzero(allowed, axis=1) == 1)[:, None]).any(axis=0)
        spared = used[~kept[used]]
        if not len(spared):
            break
        allowed = allowed.copy()
        totals = np.where(allowed, values + found.price * weights, np.inf)
        allowed[:, _least_missed(totals, spared)] = False
        try:
            found = solve(allowed)
        except OptionError:  # the limit asks for it
            break
    return found


def _least_missed(totals: Numbers, options: Ids) -> int:
    """Which of the options is left out with the least rise of all items' best totals; each item has another."""
    best = totals.min(axis=1)
    rises = []
    for option in options.tolist():
        others = totals.copy()
        others[:, option] = np.inf
        rises.append(float((others.min(axis=1) - best).sum()))
    return int(options[np.argmin(rises)])


def _check(sizes: Ids, losses: Numbers, allowed: Mask) -> None:
    assert sizes.ndim == 2 and sizes.shape == losses.shape == allowed.shape, (sizes.shape, losses.shape, allowed.shape)
    if not allowed.any(axis=1).all():
        raise OptionError(f"no option is allowed for item {int(allowed.any(axis=1).argmin())}; allow one")
    wrong = allowed & ~(np.isfinite(losses) & (sizes >= 0))
    if wrong.any():
        item, option = np.argwhere(wrong)[0]
        raise OptionError(
            f"option {option} of item {item} has {sizes[item, option]:,} bytes and a loss of {losses[item, option]}; "
            "both must be numbers, and bytes not negative"
        )


def _check_limit(weights: Numbers, limit: float, message: str) -> None:
    """OptionError unless the lightest options are within the limit. weights: infinite where not allowed."""
    least = math.fsum(weights.min(axis=1))
    if not least <= limit:
        raise OptionError(
            f"{message.format(float(limit), least)} {len(weights):,} matrices with {weights.shape[1]} options each can "
            "have; raise the limit, or allow other options"
        )


class _Solution(NamedTuple):
    choice: Ids
    value: float
    bound: float
    price: float


class _Steps(NamedTuple):
    """Steps along the hulls of all items, those first that save most for what they use: each (n_steps,)."""

    items: Ids
    options: Ids  # where each step leads
    weights: Numbers  # what it uses up
    values: Numbers  # what it saves


def _solve(weights: Numbers, values: Numbers, limit: float, allowed: Mask) -> _Solution:
    """The least sum of values while the sum of weights is within the limit, which the lightest options are."""
    choice, steps = _hulls(weights, values, allowed)
    items = np.arange(len(choice))

    def total(table: Numbers, of: Ids) -> float:
        return math.fsum(table[items, of])

    def after(n_steps: int) -> Ids:
        reached = choice.copy()
        reached[steps.items[:n_steps]] = steps.options[:n_steps]  # of an item's steps the last one counts
        return reached

    taken = int(np.searchsorted(np.cumsum(steps.weights), limit - total(weights, choice), side="right"))
    while total(weights, after(taken)) > limit:  # sums of many numbers are rounded
        taken -= 1
    found = after(taken)
    bound, room, price = total(values, found), limit - total(weights, found), 0.0
    if taken < len(steps.items):  # the relaxation takes a part of the step that does not fit
        bound -= float(min(1.0, room / steps.weights[taken]) * steps.values[taken])
        price = float(steps.values[taken] / steps.weights[taken])
    _fill(found, steps, taken, weights, values, limit, allowed)
    return _Solution(found, total(values, found), bound, price)


def _hulls(weights: Numbers, values: Numbers, allowed: Mask) -> tuple[Ids, _Steps]:
    """The lightest option of each item, (n_items,), and all steps from there on.

    All hulls are followed at once: from the present option the steepest way to a heavier one, of equally steep ones
    the shortest.
    """
    lightest = np.where(allowed, weights, np.inf).min(axis=1, keepdims=True)
    start = np.where(allowed & (weights == lightest), values, np.inf).argmin(axis=1)
    at, items = start.copy(), np.arange(len(start))
    slopes, found = np.full(len(start), np.inf), list[tuple[Ids, Ids, Numbers, Numbers, Numbers]]()
    while len(items):
        used = weights[items] - weights[items, at[items]][:, None]
        saved = values[items, at[items]][:, None] - values[items]
        better = allowed[items] & (used > 0) & (saved > 0)
        with np.errstate(all="ignore"):
            slope = np.where(better, saved / used, -1.0)
        best = slope.max(axis=1)
        options = np.where(better & (slope == best[:, None]), used, np.inf).argmin(axis=1)
        on = np.flatnonzero(better.any(axis=1))
        items, options = items[on], options[on]
        slopes[items] = np.minimum(slopes[items], best[on])  # convex in spite of rounding
        at[items] = options
        found.append((items, options, used[on, options], saved[on, options], slopes[items]))
    if not found:
        found.append((items, items, np.empty(0), np.empty(0), np.empty(0)))
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    order = np.lexsort((columns[0], -columns[4]))  # stable: an item's steps of equal slope stay in their order
    return start, _Steps(*(column[order] for column in columns[:4]))


def _fill(
    choice: Ids, steps: _Steps, taken: int, weights: Numbers, values: Numbers, limit: float, allowed: Mask
) -> None:
    """Use the room that is left after the first `taken` steps: later steps that fit, then any options that do."""
    items, moves = np.arange(len(choice)), list[tuple[int, int]]()

    def move(item: int, option: int) -> None:
        moves.append((item, int(choice[item])))
        choice[item] = option

    def room() -> float:
        return limit - math.fsum(weights[items, choice])

    left, stuck = room(), set[int]()
    for item, option, weight in zip(*(column[taken:].tolist() for column in steps[:3]), strict=True):
        if item not in stuck and weight <= left:
            move(item, option)
            left -= weight
        else:
            stuck.add(item)
    while room() >= 0:
        saved = values[items, choice][:, None] - values
        fits = allowed & (saved > 0) & (weights - weights[items, choice][:, None] <= room())
        item, option = divmod(int(np.where(fits, saved, 0.0).argmax()), saved.shape[1])
        if not fits[item, option]:
            return
        move(item, option)
    while room() < 0:  # sums of many numbers are rounded
        item, before = moves.pop()
        choice[item] = before
