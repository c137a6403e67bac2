"""The scales and minima of a matrix while its quantiser seeks them, and the matrix that they and the levels make.

All are floats that the format can store: half floats, powers of two, or integers under a super-scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.quant import quantisers_descent as descent
from edgert.quant import quantisers_kernels as kernels
from edgert.quant.formats import SUPER_GROUP, Format, Matrix
from edgert.quant.quantisers_inputs import Feedback
from edgert.types import Floats


class Grid:
    """scales, minima and the super-scales `above` and super-minima `below` them, float32 (n_out, n_groups)."""

    def __init__(self, format: Format, n_out: int, n_in: int) -> None:
        kind = kernels.TWO_LEVEL if format.scale_bits else kernels.POWER if format.is_e8m0 else kernels.HALF
        low, high = -format.scale_offset, (1 << format.scale_bits) - 1 - format.scale_offset
        levels = format.table or tuple(range(-format.offset, (1 << format.bits) - format.offset))
        fields = (len(levels), format.group, format.has_minimum, kind, low, high, not format.table)
        self.format, self.spec = format, np.array(fields, np.int64)
        self.table = np.sort(np.array(levels, np.float32))
        shape = (n_out, n_in // format.group)
        self.scales, self.minima, self.above, self.below = (np.zeros(shape, np.float32) for _ in range(4))

    def fit(self, weights: Floats, importance: Floats, n_steps: int, n_fits: int) -> None:
        """Fit scales and minima; of two-level formats first as if they were free, then as integers."""
        spec = self.spec.copy()
        if self.format.scale_bits:
            spec[kernels.KIND] = kernels.HALF
            self._fit(spec, weights, importance, n_steps, n_fits)
            low, high = int(spec[kernels.LOW]), int(spec[kernels.HIGH])
            self.above = self._super(self.scales, low or high)
            self.below = self._super(np.minimum(self.minima, 0.0), high)
        self._fit(self.spec, weights, importance, n_steps, n_fits)

    def _fit(self, spec: Any, weights: Floats, importance: Floats, n_steps: int, n_fits: int) -> None:
        kernels.fit(
            weights, importance, self.above, self.below, n_steps, n_fits, spec, self.table, self.scales, self.minima
        )

    def _super(self, table: Floats, furthest: int) -> Floats:
        """The super-scales (or super-minima) whose multiples up to `furthest` span the scales, for each group."""
        n_groups = SUPER_GROUP // self.format.group
        blocks = table.reshape(len(table), -1, n_groups)
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
        return np.repeat((extreme / furthest).astype(np.float16).astype(np.float32), n_groups, axis=1)

    def round(self, weights: Floats) -> Floats:
        """Each weight's nearest level, float32 (n_out, n_in)."""
        levels = np.empty_like(weights)
        kernels.round_all(weights, self.scales, self.minima, self.spec, self.table, levels)
        return levels

    def keep_gain(self, weights: Floats, levels: Floats, importance: Floats) -> None:
        """Scale everything so that the matrix keeps all of its weights' own direction.

        The least squares of a fit keep less: 0.86 of it at 2 bits, and gate, up and down multiply that.
        """
        kept = float(np.sum(importance * weights * self.to_float(levels), dtype=np.float64))
        whole = float(np.sum(importance * np.square(weights), dtype=np.float64))
        if self.format.is_e8m0 or kept <= 0.5 * whole:
            return
        factor = np.float32(whole / kept)
        if not self.format.scale_bits:
            self.scales, self.minima = (_halves(table * factor) for table in (self.scales, self.minima))
            return
        for table, above in ((self.scales, self.above), (self.minima, self.below)):
            integers = np.rint(np.divide(table, above, out=np.zeros_like(table), where=above != 0))
            above[:] = _halves(above * factor)
            np.multiply(above, integers, out=table)

    def feed_back(self, weights: Floats, feedback: Feedback, factors: Floats, n_sweeps: int) -> Floats:
        """Levels, group by group, errors made good by later groups, then refined in at most n_sweeps; see Feedback.

        Scales are sought among those found before times `factors`.
        """
        n, spec, table, groups = self.format.group, self.spec, self.table, feedback.groups
        tables = (self.scales, self.minima, self.above, self.below)
        scales, minima, above, below = (np.ascontiguousarray(t.T[groups]) for t in tables)  # (n_groups, n_out)
        sources = np.ascontiguousarray(weights[:, feedback.columns])
        rest, levels = sources.copy(), np.empty_like(sources)
        for group in range(len(groups)):
            part, later = slice(group * n, (group + 1) * n), slice((group + 1) * n, None)
            targets, found = np.ascontiguousarray(rest[:, part]), np.empty((len(rest), n), np.float32)
            metric, lower = feedback.metrics[group], feedback.lowers[group]
            descent.quantise_group(
                targets, metric, lower, above[group], below[group], factors, 2, spec, table, found, scales[group],
                minima[group],
            )  # fmt: skip
            errors = targets - (scales[group, :, None] * found + minima[group, :, None])
            rest[:, later] -= errors @ feedback.shares[part, later]
            levels[:, part] = found
        scales, minima, above, below = (np.ascontiguousarray(t.T) for t in (scales, minima, above, below))
        gradients = (sources - self._floats(levels, scales, minima)) @ feedback.hessian
        descent.refine(
            gradients, feedback.hessian, feedback.blocks, feedback.block_lowers, above, below, factors, n_sweeps, spec,
            table, levels, scales, minima,
        )  # fmt: skip
        self.scales[:, groups], self.minima[:, groups] = scales, minima
        found = np.empty_like(levels)
        found[:, feedback.columns] = levels
        return found

    def to_float(self, levels: Floats) -> Floats:
        """The weights that levels stand for."""
        return self._floats(levels, self.scales, self.minima)

    def _floats(self, levels: Floats, scales: Floats, minima: Floats) -> Floats:
        group = self.format.group
        return np.repeat(scales, group, axis=1) * levels + np.repeat(minima, group, axis=1)

    def matrix(self, levels: Floats) -> Matrix:
        """The matrix as it is stored."""
        format = self.format
        if format.table:
            order = np.argsort(format.table, kind="stable").astype(np.uint8)
            values = order[np.searchsorted(self.table, levels)]
        else:
            values = (levels + np.float32(format.offset)).astype(np.uint8)
        if format.is_e8m0:
            return Matrix(format, values, (np.rint(np.log2(self.scales)) + 128).astype(np.uint8))
        if not format.scale_bits:
            minima = self.minima.astype(np.float16) if format.has_minimum else None
            return Matrix(format, values, self.scales.astype(np.float16), minima)
        scales = _integers(self.scales, self.above, format.scale_offset)
        first = slice(None, None, SUPER_GROUP // format.group)
        above, below = (t[:, first].astype(np.float16) for t in (self.above, self.below))
        if not format.has_minimum:
            return Matrix(format, values, scales, None, above)
        return Matrix(format, values, scales, _integers(self.minima, self.below, 0), above, below)


def _halves(table: Floats) -> Floats:
    """Floats that half floats hold."""
    halves: Floats = table.astype(np.float16).astype(np.float32)
    return halves


def _integers(table: Floats, above: Floats, offset: int) -> npt.NDArray[np.uint8]:
    """Scales or minima as the integers under their super-scales."""
    ratio = np.divide(table, above, out=np.zeros_like(table), where=above != 0)
    return (np.rint(ratio) + offset).astype(np.uint8)
