"""The search for the smallest bits that keep a bound, by what bundles of one expected loss and another really lose.

Expected losses are only in proportion to measured ones. So the one that keeps the bound is looked for between the
largest that kept it and the smallest that missed it. Nothing here quantises, packs or runs a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from edgert.allocating import Solution
from edgert.divergence import Rise
from edgert.errors import OptionError

_ATTEMPTS = 6
_CLOSE = 0.85  # of the bound: nearer than that, nothing smaller is sought
_CAUTION = 0.95  # of the expected loss that a measurement points to
_MOST_RAISED, _MOST_LOWERED = 4.0, 20.0  # factors from one attempt to the next
_SIGNIFICANT = 2.0  # standard errors: a smaller rise may as well be so large, and is taken for that to go further
_NARROW = 1.05  # a bracket of expected losses that is not worth another attempt


@dataclass(frozen=True)
class Tried:
    """One attempt."""

    solution: Solution
    expected: float  # its loss, nats a token, or what was asked for where that is less
    rise: Rise  # measured

    @property
    def worst(self) -> float:
        """The rise and one standard error, which are to stay within the bound."""
        return self.rise.increase + self.rise.standard_error

    @property
    def sure(self) -> float:
        """What the rise is surely not above: where it is lost in its error, that says how far one may go."""
        return max(self.worst, _SIGNIFICANT * self.rise.standard_error)


class Search:
    """Attempts so far; go() makes them. solve: the best solution within an expected loss, or OptionError."""

    def __init__(
        self,
        solve: Callable[[float], Solution],
        largest: Solution,
        smallest: Solution,
        measure: Callable[[Solution], Rise],
    ) -> None:
        self._solve, self._largest, self._smallest, self._measure = solve, largest, smallest, measure
        self.tried: list[Tried] = []

    def go(self, bound: float, most: float = math.inf) -> Solution | None:
        """The smallest, or where time is counted the fastest, of those that keep the bound; None if none does.

        most: what it may be expected to lose, whatever is measured, but for the largest, which may always be taken.
        """
        expected, passed, missed = min(math.log1p(bound), most), 0.0, most
        kept: list[Solution] = []
        for left in reversed(range(_ATTEMPTS)):
            found = self._largest if not left and not kept else self._within(expected)
            expected = min(expected, found.loss)  # else what misses far above its own loss is tried again and again
            tried = Tried(found, expected, self._measure(found))
            self.tried.append(tried)
            if tried.worst <= bound:
                kept.append(found)
                passed = max(passed, expected)
                if tried.sure >= _CLOSE * bound or found.n_bytes <= self._smallest.n_bytes:
                    break
            elif found.n_bytes >= self._largest.n_bytes:
                break
            else:
                missed = min(missed, expected)
            if missed < _NARROW * passed:
                break
            expected = _next(tried, bound, passed, missed)
        return min(kept, key=_cost, default=None)

    def _within(self, expected: float) -> Solution:
        try:
            return self._solve(expected)
        except OptionError:  # less than any choice is expected to lose
            return self._largest


def _cost(found: Solution) -> tuple[float, int]:
    return (math.inf if found.seconds is None else found.seconds), found.n_bytes


def _next(tried: Tried, bound: float, passed: float, missed: float) -> float:
    """The expected loss to try next: in proportion, and within the bracket."""
    known = tried.worst if tried.worst > bound else tried.sure
    factor = _CAUTION * math.log1p(bound) / max(math.log1p(known), 1e-9)
    expected = tried.expected * min(max(factor, 1 / _MOST_LOWERED), _MOST_RAISED)
    if passed < expected < missed:
        return expected
    return math.sqrt(passed * missed)
