"""Compiled arithmetic of the quantisers: fitting of groups, error feedback over columns, refinement under a Hessian.

A group's weight is scale * level + minimum, where the level of a stored integer is table[integer]. All that a format
asks for is in `spec`, int64: number of integers, offset, columns of a group, whether it has minima, kind of scales,
lowest and highest integer of a scale, whether levels are evenly spaced. Everything is float32, rows are independent of
each other, and nothing here takes threads or calls Python.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.quant.jit import inner, kernel

LEVELS, OFFSET, GROUP, HAS_MINIMUM, KIND, LOW, HIGH, UNIFORM = range(8)
HALF, TWO_LEVEL, POWER = range(3)  # kinds of scales
_ZERO, _ONE = np.float32(0), np.float32(1)
_SPLIT = np.float32(8193.0)  # 2**13 + 1: leaves the 11 bits of a half float
_SMALL, _SMALL_STEPS = np.float32(2.0**-14), np.float32(2.0**24)  # below, half floats are multiples of 2**-24
_LARGEST = np.float32(65504.0)


@inner
def round_half(x: Any) -> Any:
    """The half float nearest to x (Veltkamp's splitting), as float32; at most the largest one."""
    if abs(x) >= _LARGEST:
        return np.float32(np.copysign(_LARGEST, x))
    if abs(x) < _SMALL:
        return np.float32(np.rint(x * _SMALL_STEPS) / _SMALL_STEPS)
    wide = x * _SPLIT
    return np.float32(wide - (wide - x))


@inner
def snap_scale(x: Any, above: Any, spec: Any) -> Any:
    """The scale nearest to x that the format can store under a super-scale."""
    if spec[KIND] == TWO_LEVEL:
        if above == _ZERO:
            return _ZERO
        level = np.rint(x / above)
        return np.float32(above * np.float32(min(max(level, spec[LOW]), spec[HIGH])))
    if spec[KIND] == POWER:
        if x <= _ZERO:
            return np.float32(2.0**-100)
        return np.float32(2.0 ** min(max(np.rint(np.log2(x)), -120.0), 120.0))
    return round_half(x)


@inner
def snap_minimum(x: Any, above: Any, spec: Any) -> Any:
    """The minimum nearest to x that the format can store under a super-minimum."""
    if not spec[HAS_MINIMUM]:
        return _ZERO
    if spec[KIND] == TWO_LEVEL:
        if above == _ZERO:
            return _ZERO
        return np.float32(above * np.float32(min(max(np.rint(x / above), 0.0), spec[HIGH])))
    return round_half(x)


@inner
def code_of(x: Any, scale: Any, minimum: Any, spec: Any, table: Any) -> Any:
    """The integer whose weight is nearest to x."""
    if scale == _ZERO:
        return np.int64(spec[OFFSET])
    ratio = (x - minimum) / scale
    if spec[UNIFORM]:
        return np.int64(min(max(np.rint(ratio) + spec[OFFSET], 0.0), spec[LEVELS] - 1.0))
    best, code = abs(ratio - table[0]), 0
    for other in range(1, spec[LEVELS]):
        distance = abs(ratio - table[other])
        if distance < best:
            best, code = distance, other
    return np.int64(code)


@inner
def _encode(x: Any, importance: Any, scale: Any, minimum: Any, spec: Any, table: Any, codes: Any) -> Any:
    """Integers of a group, written to codes, and their weighted squared error."""
    total = _ZERO
    for i in range(spec[GROUP]):
        code = code_of(x[i], scale, minimum, spec, table)
        codes[i] = code
        difference = x[i] - (scale * table[code] + minimum)
        total += importance[i] * difference * difference
    return total


@inner
def _least_squares(x: Any, importance: Any, spec: Any, table: Any, codes: Any) -> Any:
    """Scale and minimum with the least weighted squared error for given integers."""
    ones, levels, squares, sums, products = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
    for i in range(spec[GROUP]):
        weight, level = importance[i], table[codes[i]]
        ones += weight
        levels += weight * level
        squares += weight * level * level
        sums += weight * x[i]
        products += weight * level * x[i]
    if spec[HAS_MINIMUM]:
        determinant = ones * squares - levels * levels
        if determinant > np.float32(1e-6) * ones * squares:
            scale = (ones * products - levels * sums) / determinant
            minimum = (sums - levels * scale) / ones
            if spec[KIND] != TWO_LEVEL or minimum <= _ZERO:
                return scale, minimum
        elif spec[KIND] != TWO_LEVEL or sums <= _ZERO:
            return _ZERO, sums / ones
    return (products / squares if squares > _ZERO else _ZERO), _ZERO


@inner
def _start(low: Any, high: Any, step: Any, second: Any, n_steps: Any, spec: Any, table: Any) -> Any:
    """The candidate number (step, second) of a group's scale and minimum: the whole range, then narrower ones."""
    last = np.float32(spec[LEVELS] - 1)
    if spec[HAS_MINIMUM]:
        width = (high - low) / np.float32(2 * n_steps + 2)
        below, above = low + width * np.float32(step), high - width * np.float32(second)
        below = min(below, _ZERO) if spec[KIND] == TWO_LEVEL else below
        return (above - below) / last, below
    extreme = high if high > -low else low
    largest = max(abs(table[0]), abs(table[spec[LEVELS] - 1]))
    if spec[UNIFORM]:  # from slightly more than the range to half of it
        reach = largest - np.float32(0.5) + np.float32(step) * largest / np.float32(n_steps)
    else:
        reach = largest * (np.float32(0.9) + np.float32(0.6) * np.float32(step) / np.float32(n_steps))
    sign = _ONE if second else -_ONE
    return extreme / reach * (sign if spec[KIND] != POWER else np.float32(np.copysign(_ONE, extreme))), _ZERO


@inner
def _plain(low: Any, high: Any, spec: Any, table: Any) -> Any:
    """Scale and minimum that span a group's range."""
    if spec[HAS_MINIMUM]:
        low = min(low, _ZERO) if spec[KIND] == TWO_LEVEL else low
        return (high - low) / np.float32(spec[LEVELS] - 1), low
    extreme = high if high > -low else low
    return (abs(extreme) / abs(table[7]) if spec[KIND] == POWER else extreme / table[0]), _ZERO


@inner
def _fit_group(
    x: Any, importance: Any, above: Any, below: Any, n_steps: Any, n_fits: Any, spec: Any, table: Any, trial: Any
) -> Any:
    """The best scale and minimum of a group among candidates, each improved by least squares n_fits times."""
    low, high = x[0], x[0]
    for i in range(1, spec[GROUP]):
        low, high = min(low, x[i]), max(high, x[i])
    scale, minimum = _plain(low, high, spec, table)
    best_scale, best_minimum = snap_scale(scale, above, spec), snap_minimum(minimum, below, spec)
    best = _encode(x, importance, best_scale, best_minimum, spec, table, trial)
    n_second = n_steps if spec[HAS_MINIMUM] else 2
    for step in range(n_steps):
        for second in range(n_second):
            scale, minimum = _start(low, high, step, second, n_steps, spec, table)
            for _ in range(n_fits + 1):
                scale, minimum = snap_scale(scale, above, spec), snap_minimum(minimum, below, spec)
                error = _encode(x, importance, scale, minimum, spec, table, trial)
                if error < best:
                    best, best_scale, best_minimum = error, scale, minimum
                scale, minimum = _least_squares(x, importance, spec, table, trial)
    return best_scale, best_minimum


@kernel
def fit(
    weights: Any,
    importance: Any,
    above: Any,
    below: Any,
    n_steps: int,
    n_fits: int,
    spec: Any,
    table: Any,
    scales: Any,
    minima: Any,
) -> None:
    """Fit the scales and minima of all groups by the squared error, weighted by column: importance (n_in,).

    weights (n_out, n_in); scales, minima (n_out, n_groups) are written; above, below, of the same shape: super-scales
    and super-minima that they have to fit. n_steps 0 spans the range, as round-to-nearest does.
    """
    n_out, n_in = weights.shape
    width = spec[GROUP]
    trial = np.empty(width, np.int64)
    for row in range(n_out):
        for group in range(n_in // width):
            first = group * width
            scales[row, group], minima[row, group] = _fit_group(
                weights[row, first : first + width],
                importance[first : first + width],
                above[row, group],
                below[row, group],
                n_steps,
                n_fits,
                spec,
                table,
                trial,
            )


@kernel
def encode(weights: Any, scales: Any, minima: Any, spec: Any, table: Any, values: Any) -> None:
    """Round every weight to its group's nearest level: values uint8 (n_out, n_in) are written."""
    n_out, n_in = weights.shape
    for row in range(n_out):
        for column in range(n_in):
            group = column // spec[GROUP]
            values[row, column] = code_of(weights[row, column], scales[row, group], minima[row, group], spec, table)


@inner
def _decode(
    target: Any,
    lower: Any,
    scale: Any,
    minimum: Any,
    most: Any,
    spec: Any,
    table: Any,
    codes: Any,
    errors: Any,
    shares: Any,
) -> Any:
    """Round a group's columns from the last to the first, each making good what the errors so far cost.

    Writes codes and errors (target - weight), and returns errors' lower lower' errors, or anything not below `most`
    once it is certain to exceed that. (Babai's nearest plane; within a group it is what GPTQ does.)
    """
    total = _ZERO
    for i in range(target.size):
        shares[i] = _ZERO
    for j in range(target.size - 1, -1, -1):
        code = code_of(target[j] + shares[j] / lower[j, j], scale, minimum, spec, table)
        error = target[j] - (scale * table[code] + minimum)
        rest = lower[j, j] * error + shares[j]
        total += rest * rest
        if total >= most:
            return total
        codes[j], errors[j] = code, error
        for i in range(j):
            shares[i] += lower[j, i] * error
    return total


@inner
def _refit(
    metric: Any, scale: Any, minimum: Any, above: Any, below: Any, spec: Any, table: Any, codes: Any, errors: Any,
    along: Any, across: Any,
) -> Any:  # fmt: skip
    """The storable scale and minimum with the least error under a metric (n, n), for a group's integers as they are."""
    n = errors.size
    for i in range(n):
        along[i], across[i] = _ZERO, _ZERO
    for i in range(n):
        level = table[codes[i]]
        for j in range(n):
            along[j] += metric[i, j] * level
            across[j] += metric[i, j]
    squares, products, ones, by_level, by_one = _ZERO, _ZERO, _ZERO, _ZERO, _ZERO
    for i in range(n):
        squares += along[i] * table[codes[i]]
        products += along[i]
        ones += across[i]
        by_level += along[i] * errors[i]
        by_one += across[i] * errors[i]
    step = by_level / squares if squares > _ZERO else _ZERO
    if not spec[HAS_MINIMUM] or ones <= _ZERO:
        return snap_scale(scale + step, above, spec), minimum
    determinant = squares * ones - products * products
    if determinant > np.float32(1e-4) * squares * ones:
        step = (ones * by_level - products * by_one) / determinant
    new = snap_scale(scale + step, above, spec)
    return new, snap_minimum(minimum + (by_one - (new - scale) * products) / ones, below, spec)


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
    codes: Any,
    work: Any,
    trial: Any,
) -> Any:
    """The scale, minimum and integers of a group with the least error under a metric: lower lower' = metric.

    Tries the present scale times each of `factors`, then least squares for the best of them. What comes first is its
    error; where that is not below `most`, codes, scale and minimum are not better than those that were.
    """
    errors, found = work[0], work[1]
    middle = (table[0] + table[spec[LEVELS] - 1]) / np.float32(2)
    best_scale, best_minimum = scale, minimum
    for number in range(factors.size + n_fits):
        if number < factors.size:
            new = snap_scale(scale * factors[number], above, spec)
            rise = minimum
            if spec[HAS_MINIMUM]:
                rise = snap_minimum(minimum + (scale - new) * middle, below, spec)
        else:
            for i in range(target.size):
                found[i] = target[i] - (best_scale * table[codes[i]] + best_minimum)
            new, rise = _refit(
                metric, best_scale, best_minimum, above, below, spec, table, codes, found, work[2], work[3]
            )
        error = _decode(target, lower, new, rise, most, spec, table, trial, errors, work[4])
        if error < most:
            most, best_scale, best_minimum = error, new, rise
            for i in range(target.size):
                codes[i] = trial[i]
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
    values: Any,
    scales: Any,
    minima: Any,
    errors: Any,
) -> None:
    """Quantise one group of each row under a metric (n, n) = lower lower'.

    targets (n_out, n); above, below, scales, minima (n_out,): the last two are improved; writes values uint8 and errors
    (targets - quantised), both (n_out, n).
    """
    n_out, n = targets.shape
    codes, trial, work = np.empty(n, np.int64), np.empty(n, np.int64), np.empty((5, n), np.float32)
    for row in range(n_out):
        _, scale, minimum = _search(
            targets[row],
            metric,
            lower,
            scales[row],
            minima[row],
            above[row],
            below[row],
            np.float32(np.inf),
            factors,
            n_fits,
            spec,
            table,
            codes,
            work,
            trial,
        )
        scales[row], minima[row] = scale, minimum
        for i in range(n):
            values[row, i] = codes[i]
            errors[row, i] = targets[row, i] - (scale * table[codes[i]] + minimum)


@inner
def _take(gradient: Any, hessian: Any, column: Any, change: Any) -> None:
    """A weight's error fell by `change`: the gradient of the row follows."""
    for i in range(gradient.size):
        gradient[i] -= change * hessian[column, i]


@inner
def _descend(gradient: Any, hessian: Any, scales: Any, minima: Any, spec: Any, table: Any, codes: Any) -> Any:
    """Move each integer of a row to its best value given all others; returns how many moved."""
    moved = 0
    for column in range(gradient.size):
        group = column // spec[GROUP]
        scale, minimum = scales[group], minima[group]
        now = scale * table[codes[column]] + minimum
        code = code_of(now + gradient[column] / hessian[column, column], scale, minimum, spec, table)
        if code != codes[column] and scale != _ZERO:
            _take(gradient, hessian, column, scale * (table[code] - table[codes[column]]))
            codes[column] = code
            moved += 1
    return moved


@inner
def _solve(lower: Any, right: Any, out: Any) -> None:
    """out = the solution x of lower lower' x = right."""
    n = out.size
    for i in range(n):
        out[i] = right[i]
    for i in range(n):  # lower y = right
        for j in range(i):
            out[i] -= lower[i, j] * out[j]
        out[i] /= lower[i, i]
    for i in range(n - 1, -1, -1):  # lower' x = y
        out[i] /= lower[i, i]
        for j in range(i):
            out[j] -= lower[i, j] * out[i]


@inner
def _improve_group(
    gradient: Any,
    hessian: Any,
    first: Any,
    lower: Any,
    scale: Any,
    minimum: Any,
    above: Any,
    below: Any,
    factors: Any,
    spec: Any,
    table: Any,
    codes: Any,
    work: Any,
    found: Any,
    trial: Any,
) -> Any:
    """Search the group at column `first` again, all other groups as they are; returns its scale and minimum."""
    n, target = found.size, work[5]
    _solve(lower, gradient[first : first + n], target)
    present = _ZERO
    for i in range(n):
        present += target[i] * gradient[first + i]
        target[i] += scale * table[codes[first + i]] + minimum
        found[i] = codes[first + i]
    error, new, rise = _search(
        target,
        hessian[first : first + n, first : first + n],
        lower,
        scale,
        minimum,
        above,
        below,
        present * np.float32(0.9999),
        factors,
        2,
        spec,
        table,
        found,
        work,
        trial,
    )
    if error >= present * np.float32(0.9999):
        return scale, minimum
    for i in range(n):
        change = (new * table[found[i]] + rise) - (scale * table[codes[first + i]] + minimum)
        if change != _ZERO:
            _take(gradient, hessian, first + i, change)
        codes[first + i] = found[i]
    return new, rise


@kernel
def refine(
    gradients: Any,
    hessian: Any,
    lowers: Any,
    above: Any,
    below: Any,
    factors: Any,
    n_sweeps: int,
    spec: Any,
    table: Any,
    values: Any,
    scales: Any,
    minima: Any,
) -> None:
    """Coordinate descent on the error under a Hessian, in turn by groups and by integers (those: arXiv 2309.01885).

    gradients (n_out, n_in): (weights - quantised) @ hessian, spoilt; lowers (n_groups, n, n): the Cholesky factors of
    the Hessian's blocks; above, below, scales, minima (n_out, n_groups). values, scales and minima are improved; the
    error never rises but for rounding.
    """
    n_out, n_in = values.shape
    n = spec[GROUP]
    codes, found, trial = np.empty(n_in, np.int64), np.empty(n, np.int64), np.empty(n, np.int64)
    work = np.empty((6, n), np.float32)
    for row in range(n_out):
        for column in range(n_in):
            codes[column] = values[row, column]
        gradient = gradients[row]
        for _ in range(n_sweeps):
            for group in range(n_in // n):
                scales[row, group], minima[row, group] = _improve_group(
                    gradient,
                    hessian,
                    group * n,
                    lowers[group],
                    scales[row, group],
                    minima[row, group],
                    above[row, group],
                    below[row, group],
                    factors,
                    spec,
                    table,
                    codes,
                    work,
                    found,
                    trial,
                )
            if not _descend(gradient, hessian, scales[row], minima[row], spec, table, codes):
                break
        for column in range(n_in):
            values[row, column] = codes[column]
