"""What a matrix multiplies, as its quantiser wants it: moments, Hessian, damping, and factors for error feedback.

Everything is computed when it is first asked for, kept, and shared by all formats that are tried.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.types import Floats, Ids

Doubles = npt.NDArray[np.float64]
_SLAB = 1024  # rows that are multiplied at a time
_PARTS = 8  # runs of rows, every other of which judges a damping
_DAMPINGS = (0.001, 0.01, 0.1, 0.3, 1.0)  # shares of the mean of the Hessian's diagonal
_FIRST_TRIED = 2
_FEWEST_ROWS = 64  # below, a Hessian says less than its diagonal


@dataclass(frozen=True)
class Feedback:
    """How errors of one group of columns are made good by later ones, groups of one width.

    columns (n_in,): the order of treatment, group by group; groups (n_groups,): the same of groups. hessian (n_in,
    n_in): damped, in that order; blocks (n_groups, n, n): Cholesky factors of its diagonal blocks; metrics and lowers
    (n_groups, n, n): what an error in a group costs once all later columns have made good what they can, and its
    Cholesky factors; shares (n_in, n_in): what later columns take of a group's errors.
    """

    columns: Ids
    groups: Ids
    hessian: Floats
    blocks: Floats
    metrics: Floats
    lowers: Floats
    shares: Floats


class Inputs:
    """Rows (n_tokens, n_in) that a matrix multiplies, each weighing importance**2.

    rows None: nothing is known. importance (n_tokens,): what the outputs are multiplied by later; None: 1.
    """

    def __init__(self, rows: Floats | None, importance: Floats | None = None) -> None:
        self._rows, self._importance = rows, importance
        self.n_tokens = 0 if rows is None else len(rows)
        self._feedback: dict[int, Feedback] = {}

    @property
    def is_enough(self) -> bool:
        """Whether there are rows enough for a Hessian."""
        return self.n_tokens >= _FEWEST_ROWS

    @functools.cached_property
    def moments(self) -> Floats:
        """Weighted mean squares of the columns, float32 (n_in,); an empty array where there are no rows."""
        return np.ascontiguousarray(np.diagonal(self.hessian())) if self.n_tokens else np.zeros(0, np.float32)

    def hessian(self) -> Floats:
        """Weighted mean of x x', float32 (n_in, n_in); there must be rows."""
        return self._hessian

    @functools.cached_property
    def _hessian(self) -> Floats:
        first, second = self._halves
        return ((first + second) / self.n_tokens).astype(np.float32)

    @functools.cached_property
    def _halves(self) -> tuple[Doubles, Doubles]:
        """Sums of x x' over every other eighth of the rows, and over the others: neighbours are of one text."""
        assert self._rows is not None
        halves = [np.zeros((self._rows.shape[1],) * 2), np.zeros((self._rows.shape[1],) * 2)]
        for part in range(_PARTS):
            for slab in self._slabs(part * self.n_tokens // _PARTS, (part + 1) * self.n_tokens // _PARTS):
                halves[part % 2] += slab.T @ slab
        return halves[0], halves[1]

    def _slabs(self, first: int, end: int) -> Iterator[Floats]:
        """The rows times their importance, some at a time."""
        assert self._rows is not None
        for start in range(first, end, _SLAB):
            slab = self._rows[start : min(start + _SLAB, end)].astype(np.float32)
            if self._importance is not None:
                slab *= self._importance[start : min(start + _SLAB, end), None]
            yield slab

    @functools.cached_property
    def damping(self) -> float:
        """The share of the mean diagonal that, added to the Hessian of half the rows, serves the other half best."""
        if not self.is_enough:
            return _DAMPINGS[-1]
        seen, unseen = self._halves
        at, tried = _FIRST_TRIED, {}

        def cost(number: int) -> float:
            if number not in tried:
                damped = _damp(seen, _DAMPINGS[number])
                tried[number] = _expected_error(damped, unseen)
            return tried[number]

        while True:
            near = [number for number in (at - 1, at, at + 1) if 0 <= number < len(_DAMPINGS)]
            best = min(near, key=cost)
            if best == at:
                return _DAMPINGS[at]
            at = best

    @functools.cached_property
    def damped(self) -> Floats:
        """The Hessian with damping, float32 (n_in, n_in)."""
        return _damp(self.hessian().astype(np.float64), self.damping).astype(np.float32)

    def feedback(self, width: int) -> Feedback:
        """How errors are fed back between groups of so many columns."""
        if width not in self._feedback:
            self._feedback[width] = _feedback(self.damped, width)
        return self._feedback[width]


def _damp(hessian: Doubles, share: float) -> Doubles:
    damped, mean = hessian.copy(), float(np.mean(np.diagonal(hessian)))
    damped[np.diag_indices(len(hessian))] += share * mean if mean > 0 else 1.0
    return damped


def _factor(hessian: Doubles) -> Doubles:
    """The upper Cholesky factor of the inverse of a damped Hessian."""
    inverse = np.linalg.inv(hessian)
    return np.ascontiguousarray(np.linalg.cholesky((inverse + inverse.T) / 2).T)


def _expected_error(damped: Doubles, other: Doubles) -> float:
    """What rounding under a damped Hessian costs under another, but for a factor.

    Column j is rounded with an error e_j, evenly spread whatever came before, and its later columns then take the share
    U[j] / U[j, j] of it (U: see _factor): the weights' error is the sum of e_j U[j] / U[j, j].
    """
    order = np.argsort(-np.diagonal(damped), kind="stable")
    factor = _factor(damped[np.ix_(order, order)])
    factor /= np.diagonal(factor)[:, None]
    return float(np.sum((factor @ other[np.ix_(order, order)]) * factor))


def _feedback(damped: Floats, width: int) -> Feedback:
    """Groups in falling order of their diagonal; within each the columns rise, as they are rounded last to first."""
    diagonal = np.diagonal(damped).reshape(-1, width)
    groups = np.argsort(-diagonal.sum(axis=1), kind="stable")
    within = np.argsort(diagonal[groups], axis=1, kind="stable")
    columns = (groups[:, None] * width + within).ravel()
    hessian = np.ascontiguousarray(damped[np.ix_(columns, columns)])
    factor, n_groups = _factor(hessian.astype(np.float64)), len(groups)
    blocks, metrics, lowers = (np.empty((n_groups, width, width), np.float32) for _ in range(3))
    shares = np.zeros_like(hessian)
    for number in range(n_groups):
        part, later = slice(number * width, (number + 1) * width), slice((number + 1) * width, None)
        inverse = np.linalg.inv(factor[part, part])
        metric = inverse @ inverse.T
        metrics[number], lowers[number] = metric, np.linalg.cholesky((metric + metric.T) / 2)
        blocks[number] = np.linalg.cholesky(hessian[part, part].astype(np.float64))
        shares[part, later] = inverse @ factor[part, later]
    return Feedback(columns, groups, hessian, blocks, metrics, lowers, shares)
