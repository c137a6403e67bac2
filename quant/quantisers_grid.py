"""The scales and minima of a matrix while its quantiser seeks them, and the matrix that they and the integers make.

All are floats that the format can store: half floats, powers of two, or integers under a super-scale.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.quant import quantisers_kernels as kernels
from edgert.quant.formats import SUPER_GROUP, Format, Matrix
from edgert.quant.quantisers_inputs import Feedback
from edgert.types import Floats

Codes = npt.NDArray[np.uint8]


class Grid:
    """scales, minima and the super-scales `above` and super-minima `below` them, float32 (n_out, n_groups)."""

    def __init__(self, format: Format, n_out: int, n_in: int) -> None:
        kind = kernels.TWO_LEVEL if format.scale_bits else kernels.POWER if format.is_e8m0 else kernels.HALF
        low, high = -format.scale_offset, (1 << format.scale_bits) - 1 - format.scale_offset
        n_levels = 1 << format.bits
        fields = (n_levels, format.offset, format.group, format.has_minimum, kind, low, high, not format.table)
        self.format, self.spec = format, np.array(fields, np.int64)
        levels = format.table or tuple(range(-format.offset, n_levels - format.offset))
        self.table = np.array(levels, np.float32)
        shape = (n_out, n_in // format.group)
        self.scales, self.minima, self.above, self.below = (np.zeros(shape, np.float32) for _ in range(4))

    def fit(self, weights: Floats, importance: Floats, n_steps: int, n_fits: int) -> None:
        """Fit scales and minima; of two-level formats first as if they were free, then as integers."""
        spec = self.spec.copy()
        if self.format.scale_bits:
            spec[kernels.KIND] = kernels.HALF
            self._fit(spec, weights, importance, n_steps, n_fits)
            np.minimum(self.minima, 0.0, out=self.minima)
            self._set_levels()
        self._fit(self.spec, weights, importance, n_steps, n_fits)

    def _fit(self, spec: Any, weights: Floats, importance: Floats, n_steps: int, n_fits: int) -> None:
        kernels.fit(
            weights, importance, self.above, self.below, n_steps, n_fits, spec, self.table, self.scales, self.minima
        )

    def _set_levels(self) -> None:
        """Super-scales and super-minima that span the present scales and minima."""
        low, high = int(self.spec[kernels.LOW]), int(self.spec[kernels.HIGH])
        n_groups = SUPER_GROUP // self.format.group
        blocks = self.scales.reshape(len(self.scales), -1, n_groups)
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
        lowest = self.minima.reshape(blocks.shape).min(axis=2)
        self.above[:] = np.repeat((extreme / (low or high)).astype(np.float16), n_groups, axis=1)
        self.below[:] = np.repeat((lowest / high).astype(np.float16), n_groups, axis=1)

    def encode(self, weights: Floats) -> Codes:
        """Each weight's nearest integer."""
        values = np.empty(weights.shape, np.uint8)
        kernels.encode(weights, self.scales, self.minima, self.spec, self.table, values)
        return values

    def feed_back(self, weights: Floats, feedback: Feedback, factors: Floats, n_sweeps: int) -> Codes:
        """Quantise group by group, errors made good by later groups, then refine in at most n_sweeps; see Feedback.

        Scales are sought among those found before times `factors`.
        """
        tables = [
            np.ascontiguousarray(t.T[feedback.groups]) for t in (self.scales, self.minima, self.above, self.below)
        ]
        scales, minima, above, below = tables  # (n_groups, n_out)
        sources = np.ascontiguousarray(weights[:, feedback.columns])
        rest, values = sources.copy(), np.empty(weights.shape, np.uint8)
        n, spec, table = self.format.group, self.spec, self.table
        for group in range(len(scales)):
            part, later = slice(group * n, (group + 1) * n), slice((group + 1) * n, None)
            targets = np.ascontiguousarray(rest[:, part])
            codes, errors = np.empty(targets.shape, np.uint8), np.empty_like(targets)
            metric, lower = feedback.metrics[group], feedback.lowers[group]
            kernels.quantise_group(
                targets, metric, lower, above[group], below[group], factors, 2, spec, table, codes, scales[group],
                minima[group], errors,
            )  # fmt: skip
            values[:, part] = codes
            rest[:, later] -= errors @ feedback.shares[part, later]
        scales, minima, above, below = (np.ascontiguousarray(t.T) for t in (scales, minima, above, below))
        gradients = (sources - self._floats(values, scales, minima)) @ feedback.hessian
        kernels.refine(
            gradients, feedback.hessian, feedback.blocks, above, below, factors, n_sweeps, spec, table, values, scales,
            minima,
        )  # fmt: skip
        self.scales[:, feedback.groups], self.minima[:, feedback.groups] = scales, minima
        found = np.empty_like(values)
        found[:, feedback.columns] = values
        return found

    def to_float(self, values: Codes) -> Floats:
        """The weights that integers stand for."""
        return self._floats(values, self.scales, self.minima)

    def _floats(self, values: Codes, scales: Floats, minima: Floats) -> Floats:
        group = self.format.group
        return np.repeat(scales, group, axis=1) * self.table[values] + np.repeat(minima, group, axis=1)

    def matrix(self, values: Codes) -> Matrix:
        """The matrix as it is stored."""
        format = self.format
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


def _integers(table: Floats, above: Floats, offset: int) -> Codes:
    """Scales or minima as the integers under their super-scales."""
    ratio = np.divide(table, above, out=np.zeros_like(table), where=above != 0)
    return (np.rint(ratio) + offset).astype(np.uint8)
