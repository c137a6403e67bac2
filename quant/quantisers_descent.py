"""Compiled arithmetic of the quantisers under a Hessian: error feedback within a group, and descent over a whole row.

See quantisers_kernels for what levels, `spec` and `table` are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.quant.jit import inner, kernel
from edgert.quant.quantisers_kernels import (
    GROUP,
    HAS_MINIMUM,
    INFINITE,
    LEVELS,
    SINGULAR,
    TWO,
    ZERO,
    inverse_of,
    nearest_level,
    storable_minimum,
    storable_scale,
)

_WORTH = np.float32(0.9999)  # of a group's error: what is not below does not pay


@inner
def _decode(
    target: Any,
    lower: Any,
    scale: Any,
    minimum: Any,
    most: Any,
    spec: Any,
    table: Any,
    levels: Any,
    errors: Any,
    shares: Any,
) -> Any:
    """Round a group's columns from the last to the first, each making good what the errors so far cost.

    Writes levels and errors (target - weight), and returns errors' lower lower' errors, or anything not below `most`
    once it is certain to exceed that. (Babai's nearest plane; within a group it is what GPTQ does.)
    """
    total, inverse = ZERO, inverse_of(scale)
    shares[:] = ZERO
    for j in range(target.size - 1, -1, -1):
        level = nearest_level((target[j] + shares[j] / lower[j, j] - minimum) * inverse, spec, table)
        error = target[j] - (scale * level + minimum)
        rest = lower[j, j] * error + shares[j]
        total += rest * rest
        if total >= most:
            return total
        levels[j], errors[j] = level, error
        for i in range(j):
            shares[i] += lower[j, i] * error
    return total


@inner
def _refit(
    metric: Any, scale: Any, minimum: Any, above: Any, below: Any, spec: Any, levels: Any, errors: Any, work: Any
) -> Any:
    """The storable scale and minimum with the least error under a metric (n, n), for a group's levels as they are."""
    n, along, across = errors.size, work[0], work[1]
    for i in range(n):
        along[i], across[i] = ZERO, ZERO
    for i in range(n):
        level = levels[i]
        for j in range(n):
            along[j] += metric[i, j] * level
            across[j] += metric[i, j]
    squares, products, ones, by_level, by_one = ZERO, ZERO, ZERO, ZERO, ZERO
    for i in range(n):
        squares += along[i] * levels[i]
        products += along[i]
        ones += across[i]
        by_level += along[i] * errors[i]
        by_one += across[i] * errors[i]
    step = by_level / squares if squares > ZERO else ZERO
    if not spec[HAS_MINIMUM] or ones <= ZERO:
        return storable_scale(scale + step, above, spec), minimum
    determinant = squares * ones - products * products
    if determinant > SINGULAR * squares * ones:
        step = (ones * by_level - products * by_one) / determinant
    new = storable_scale(scale + step, above, spec)
    return new, storable_minimum(minimum + (by_one - (new - scale) * products) / ones, below, spec)


@inner
def _search(
    target: Any,
    metric: Any,
    lower: Any,
    scale: Any,
    minimum: Any,
    above: Any,
    below: Any,
    most: Any,
    factors: Any,
    n_fits: Any,
    spec: Any,
    table: Any,
    levels: Any,
    work: Any,
) -> Any:
    """The error, scale, minimum and levels of a group that are best under a metric: lower lower' = metric.

    Tries the present scale times each of `factors`, then least squares for the best of them. Where the error is not
    below `most`, levels, scale and minimum are those that were.
    """
    trial, errors, found = work[0], work[1], work[2]
    middle = (table[0] + table[spec[LEVELS] - 1]) / TWO
    best_scale, best_minimum = scale, minimum
    for number in range(factors.size + n_fits):
        if number < factors.size:
            new, rise = storable_scale(scale * factors[number], above, spec), minimum
            if spec[HAS_MINIMUM]:
                rise = storable_minimum(minimum + (scale - new) * middle, below, spec)
        else:
            for i in range(target.size):
                found[i] = target[i] - (best_scale * levels[i] + best_minimum)
            new, rise = _refit(metric, best_scale, best_minimum, above, below, spec, levels, found, work[3:])
        error = _decode(target, lower, new, rise, most, spec, table, trial, errors, work[3])
        if error < most:
            most, best_scale, best_minimum = error, new, rise
            for i in range(target.size):
                levels[i] = trial[i]
        elif number >= factors.size:
            break
    return most, best_scale, best_minimum


@kernel
def quantise_group(
    targets: Any,
    metric: Any,
    lower: Any,
    above: Any,
    below: Any,
    factors: Any,
    n_fits: int,
    spec: Any,
    table: Any,
    levels: Any,
    scales: Any,
    minima: Any,
) -> None:
    """Quantise one group of each row under a metric (n, n) = lower lower'.

    targets (n_out, n); above, below, scales, minima (n_out,): the last two are improved; writes levels (n_out, n).
    """
    n_out, n = targets.shape
    work = np.empty((5, n), np.float32)
    for row in range(n_out):
        _, scales[row], minima[row] = _search(
            targets[row],
            metric,
            lower,
            scales[row],
            minima[row],
            above[row],
            below[row],
            INFINITE,
            factors,
            n_fits,
            spec,
            table,
            levels[row],
            work,
        )


@inner
def _take(gradient: Any, hessian: Any, column: Any, change: Any) -> None:
    """A weight rose by `change`: the gradient of the row follows."""
    for i in range(gradient.size):
        gradient[i] -= change * hessian[column, i]


@inner
def _descend(gradient: Any, hessian: Any, scales: Any, minima: Any, spec: Any, table: Any, levels: Any) -> Any:
    """Move each integer of a row to its best value given all others; returns how many moved."""
    moved, n = 0, spec[GROUP]
    for group in range(gradient.size // n):
        scale = scales[group]
        inverse = inverse_of(scale)
        for column in range(group * n, group * n + n):
            level = nearest_level(levels[column] + gradient[column] / hessian[column, column] * inverse, spec, table)
            if level != levels[column] and scale != ZERO:
                _take(gradient, hessian, column, scale * (level - levels[column]))
                levels[column] = level
                moved += 1
    return moved


@inner
def _solve(lower: Any, x: Any) -> None:
    """Replace x by the solution y of lower lower' y = x."""
    for i in range(x.size):
        total = x[i]
        for j in range(i):
            total -= lower[i, j] * x[j]
        x[i] = total / lower[i, i]
    for i in range(x.size - 1, -1, -1):
        x[i] /= lower[i, i]
        value = x[i]
        for j in range(i):
            x[j] -= lower[i, j] * value


@inner
def _improve_group(
    gradient: Any,
    hessian: Any,
    first: Any,
    metric: Any,
    lower: Any,
    scale: Any,
    minimum: Any,
    above: Any,
    below: Any,
    factors: Any,
    spec: Any,
    table: Any,
    levels: Any,
    work: Any,
) -> Any:
    """Search the group at column `first` again, all other groups as they are; returns its scale and minimum."""
    n, target, found = spec[GROUP], work[5], work[6]
    for i in range(n):
        target[i] = gradient[first + i]
    _solve(lower, target)
    present = ZERO
    for i in range(n):
        present += target[i] * gradient[first + i]
        target[i] += scale * levels[first + i] + minimum
        found[i] = levels[first + i]
    present *= _WORTH
    error, new, rise = _search(
        target,
        metric,
        lower,
        scale,
        minimum,
        above,
        below,
        present,
        factors,
        2,
        spec,
        table,
        found,
        work,
    )
    if error >= present:
        return scale, minimum
    for i in range(n):
        change = (new * found[i] + rise) - (scale * levels[first + i] + minimum)
        if change != ZERO:
            _take(gradient, hessian, first + i, change)
        levels[first + i] = found[i]
    return new, rise


@kernel
def refine(
    gradients: Any,
    hessian: Any,
    metrics: Any,
    lowers: Any,
    above: Any,
    below: Any,
    factors: Any,
    n_sweeps: int,
    spec: Any,
    table: Any,
    levels: Any,
    scales: Any,
    minima: Any,
) -> None:
    """Coordinate descent on the error under a Hessian, in turn by groups and by integers (those: arXiv 2309.01885).

    gradients (n_out, n_in): (weights - quantised) @ hessian, spoilt; metrics, lowers (n_groups, n, n): the Hessian's
    diagonal blocks and their Cholesky factors; above, below, scales, minima (n_out, n_groups). levels, scales and
    minima are improved; the error never rises but for rounding.
    """
    n_out, n_in = levels.shape
    n = spec[GROUP]
    work = np.empty((7, n), np.float32)
    for row in range(n_out):
        gradient = gradients[row]
        for _ in range(n_sweeps):
            for group in range(n_in // n):
                scales[row, group], minima[row, group] = _improve_group(
                    gradient,
                    hessian,
                    group * n,
                    metrics[group],
                    lowers[group],
                    scales[row, group],
                    minima[row, group],
                    above[row, group],
                    below[row, group],
                    factors,
                    spec,
                    table,
                    levels[row],
                    work,
                )
            if not _descend(gradient, hessian, scales[row], minima[row], spec, table, levels[row]):
                break
