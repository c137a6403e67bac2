"""What a matrix multiplies, as its quantiser wants it: moments, Hessian, and factors for error feedback.

Everything is computed when it is first asked for, kept, and shared by all formats that are tried.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgert.types import Floats, Ids

Doubles = npt.NDArray[np.float64]
_SLAB = 1024  # rows that are multiplied at a time
_PARTS = 8  # runs of rows, of which every other makes one half
_FLOOR = 1e-4  # of the mean of the Hessian's diagonal, added to it
_FEWEST_ROWS = 32  # below, a Hessian says no more than its diagonal


@dataclass(frozen=True)
class Feedback:
    """How errors of one group of columns are made good by later ones, groups of one width.

    columns (n_in,): the order of treatment, group by group; groups (n_groups,): the same of groups. hessian (n_in,
    n_in): shrunk, in that order; blocks and block_lowers (n_groups, n, n): its diagonal blocks and their Cholesky
    factors; metrics and lowers: the same of what an error costs once all later columns have made good what they can;
    shares (n_in, n_in): what later columns take of a group's errors.
    """

    columns: Ids
    groups: Ids
    hessian: Floats
    blocks: Floats
    block_lowers: Floats
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
        first, second = self.halves
        return ((first + second) / self.n_tokens).astype(np.float32)

    @functools.cached_property
    def halves(self) -> tuple[Doubles, Doubles]:
        """Sums of x x' over every other eighth of the rows, and over the others; see `half_products`."""
        assert self._rows is not None
        return half_products(self._rows, self._rows, self._importance)

    @functools.cached_property
    def shrunk(self) -> Floats:
        """The Hessian that is to be expected of rows not seen, float32 (n_in, n_in), positive definite.

        Small eigenvalues of a Hessian of few rows are too small, and error feedback would run into them. So each half
        of the rows gives directions, the other half the mean squares along them, and both ways are averaged (Lam 2016,
        "Nonparametric eigenvalue-regularized precision or covariance matrix estimator"). Needs no damping.
        Directions that a half has no rows in are no directions: there only the columns' own squares count.
        """
        total = np.zeros((len(self.moments),) * 2)
        if self.is_enough:
            first, second = self.halves
            total = (_to_be_expected(first, second) + _to_be_expected(second, first)) / self.n_tokens
        else:
            total[np.diag_indices(len(total))] = self.moments
        mean = float(np.mean(np.diagonal(total)))
        total[np.diag_indices(len(total))] += _FLOOR * mean if mean > 0 else 1.0
        return total.astype(np.float32)

    def feedback(self, width: int) -> Feedback:
        """How errors are fed back between groups of so many columns."""
        if width not in self._feedback:
            self._feedback[width] = _feedback(self.shrunk, width)
        return self._feedback[width]


def half_products(first: Floats, second: Floats, importance: Floats | None) -> tuple[Doubles, Doubles]:
    """Sums of importance**2 * x y' over every other eighth of the rows, and over the others; x of first, y of second.

    first (n, n_first), second (n, n_second), importance (n,) or None. Neighbours are of one text: they stay together.
    """
    n, sums = len(first), np.zeros((2, first.shape[1], second.shape[1]))
    for part in range(_PARTS):
        end = (part + 1) * n // _PARTS
        for start in range(part * n // _PARTS, end, _SLAB):
            rows = slice(start, min(start + _SLAB, end))
            x, y = first[rows].astype(np.float32, copy=False), second[rows].astype(np.float32, copy=False)
            if importance is not None:
                x = x * np.square(importance[rows, None])
            sums[part % 2] += x.T @ y
    return sums[0], sums[1]


def _to_be_expected(seen: Doubles, unseen: Doubles) -> Doubles:
    """Mean squares of the unseen rows along the directions of the seen ones.

    Where those are fewer than columns, any basis of the rest is an eigenbasis, and which one it is depends on the
    machine. So the rest gets the diagonal of the unseen rows, projected: the same for all bases, with the same trace.
    """
    values, directions = np.linalg.eigh(seen)
    along = np.sum(directions * (unseen @ directions), axis=0)
    unknown = values <= values[-1] * len(values) * np.finfo(np.float32).eps
    rest = directions[:, unknown]
    inside = rest.T @ (np.diagonal(unseen)[:, None] * rest)
    trace, wanted = float(np.trace(inside)), float(along[unknown].sum())
    along[unknown] = 0.0
    found: Doubles = (directions * along) @ directions.T
    if trace > 0:
        found += rest @ (inside * (wanted / trace)) @ rest.T
    return found


def _factor(hessian: Doubles) -> Doubles:
    """The upper Cholesky factor of the inverse of a Hessian."""
    inverse = np.linalg.inv(hessian)
    return np.ascontiguousarray(np.linalg.cholesky((inverse + inverse.T) / 2).T)


def _feedback(expected: Floats, width: int) -> Feedback:
    """Groups in falling order of their diagonal; within each the columns rise, as they are rounded last to first."""
    diagonal = np.diagonal(expected).reshape(-1, width)
    groups = np.argsort(-diagonal.sum(axis=1), kind="stable")
    within = np.argsort(diagonal[groups], axis=1, kind="stable")
    columns = (groups[:, None] * width + within).ravel()
    hessian = np.ascontiguousarray(expected[np.ix_(columns, columns)])
    factor, n_groups = _factor(hessian.astype(np.float64)), len(groups)
    blocks, block_lowers, metrics, lowers = (np.empty((n_groups, width, width), np.float32) for _ in range(4))
    shares = np.zeros_like(hessian)
    for number in range(n_groups):
        part, later = slice(number * width, (number + 1) * width), slice((number + 1) * width, None)
        inverse = np.linalg.inv(factor[part, part])
        metric = inverse @ inverse.T
        metrics[number], lowers[number] = metric, np.linalg.cholesky((metric + metric.T) / 2)
        blocks[number] = hessian[part, part]
        block_lowers[number] = np.linalg.cholesky(hessian[part, part].astype(np.float64))
        shares[part, later] = inverse @ factor[part, later]
    return Feedback(columns, groups, hessian, blocks, block_lowers, metrics, lowers, shares)
