"""Compiled arithmetic of the quantisers: what scales a format can store, and fitting them group by group.

A group's weight is scale * level + minimum, where levels are what the stored integers stand for, ascending in `table`.
All that a format asks for is in `spec`, int64: number of levels, columns of a group, whether it has minima, kind of
scales, lowest and highest integer of a scale, whether the levels are consecutive integers. Levels are float32 here, as
all else is. Rows are independent of each other; nothing takes threads or calls Python.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.quant.jit import inner, kernel

LEVELS, GROUP, HAS_MINIMUM, KIND, LOW, HIGH, UNIFORM = range(7)
HALF, TWO_LEVEL, POWER = range(3)  # kinds of scales
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
INFINITE = np.float32(np.inf)
_SPLIT = np.float32(8193.0)  # 2**13 + 1: leaves the 11 bits of a half float
_SMALL, _SMALL_STEPS = np.float32(2.0**-14), np.float32(2.0**24)  # below, half floats are multiples of 2**-24
_LARGEST = np.float32(65504.0)
_LEAST_POWER, _MOST_POWER = np.float32(-100), np.float32(120)
SINGULAR = np.float32(1e-5)  # of a determinant, relative to its first product


@inner
def _round_half(x: Any) -> Any:
    """The half float nearest to x (Veltkamp's splitting), as float32; at most the largest one."""
    if abs(x) >= _LARGEST:
        return _LARGEST if x > ZERO else -_LARGEST
    if abs(x) < _SMALL:
        return np.rint(x * _SMALL_STEPS) / _SMALL_STEPS
    wide = x * _SPLIT
    return wide - (wide - x)


@inner
def storable_scale(x: Any, above: Any, spec: Any) -> Any:
    """The scale nearest to x that the format can store under a super-scale."""
    if spec[KIND] == HALF:
        return _round_half(x)
    if spec[KIND] == TWO_LEVEL:
        if above == ZERO:
            return ZERO
        return above * min(max(np.rint(x / above), np.float32(spec[LOW])), np.float32(spec[HIGH]))
    if x <= ZERO:
        return np.float32(TWO**_LEAST_POWER)
    return np.float32(TWO ** min(max(np.rint(np.log2(x)), _LEAST_POWER), _MOST_POWER))


@inner
def storable_minimum(x: Any, below: Any, spec: Any) -> Any:
    """The minimum nearest to x that the format can store under a super-minimum."""
    if spec[KIND] == HALF:
        return _round_half(x)
    if below == ZERO:
        return ZERO
    return below * min(max(np.rint(x / below), ZERO), np.float32(spec[HIGH]))


@inner
def nearest_level(ratio: Any, spec: Any, table: Any) -> Any:
    """The level nearest to a weight's ratio to its scale."""
    if spec[UNIFORM]:
        return min(max(np.rint(ratio), table[0]), table[spec[LEVELS] - 1])
    best, level = abs(ratio - table[0]), table[0]
    for number in range(1, spec[LEVELS]):
        distance = abs(ratio - table[number])
        if distance < best:
            best, level = distance, table[number]
    return level


@inner
def inverse_of(scale: Any) -> Any:
    return ONE / scale if scale != ZERO else ZERO


@inner
def _sum(values: Any) -> Any:
    """The sum of values, whose number is a power of two; spoils them."""
    half = values.size
    while half > 1:
        half //= 2
        for i in range(half):
            values[i] += values[half + i]
    return values[0]


@inner
def _round_group(
    x: Any, importance: Any, scale: Any, minimum: Any, spec: Any, table: Any, levels: Any, work: Any
) -> Any:
    """Round a group's weights to levels; returns their weighted squared error."""
    inverse, lowest, highest = inverse_of(scale), table[0], table[spec[LEVELS] - 1]
    if spec[UNIFORM]:  # the loop that most time goes to, so without calls: it becomes vectors
        for i in range(x.size):
            level = min(max(np.rint((x[i] - minimum) * inverse), lowest), highest)
            difference = x[i] - (scale * level + minimum)
            levels[i], work[i] = level, importance[i] * difference * difference
    else:
        for i in range(x.size):
            levels[i] = nearest_level((x[i] - minimum) * inverse, spec, table)
            difference = x[i] - (scale * levels[i] + minimum)
            work[i] = importance[i] * difference * difference
    return _sum(work)


@inner
def _least_squares(x: Any, importance: Any, spec: Any, levels: Any, work: Any) -> Any:
    """Scale and minimum with the least weighted squared error for given levels."""
    for i in range(x.size):
        work[i] = importance[i] * levels[i] * levels[i]
    squares = _sum(work)
    for i in range(x.size):
        work[i] = importance[i] * levels[i] * x[i]
    products = _sum(work)
    if spec[HAS_MINIMUM]:
        for i in range(x.size):
            work[i] = importance[i] * levels[i]
        sums = _sum(work)
        for i in range(x.size):
            work[i] = importance[i] * x[i]
        total = _sum(work)
        for i in range(x.size):
            work[i] = importance[i]
        ones = _sum(work)
        determinant = ones * squares - sums * sums
        scale = (ones * products - sums * total) / determinant if determinant > SINGULAR * ones * squares else ZERO
        minimum = (total - sums * scale) / ones if ones > ZERO else ZERO
        if spec[KIND] != TWO_LEVEL or minimum <= ZERO:
            return scale, minimum
    return (products / squares if squares > ZERO else ZERO), ZERO


@inner
def _spanning(low: Any, high: Any, spec: Any, table: Any) -> Any:
    """Scale and minimum that span a group's range."""
    last = table[spec[LEVELS] - 1]
    if spec[HAS_MINIMUM]:
        low = min(low, ZERO) if spec[KIND] == TWO_LEVEL else low
        return (high - low) / last, low
    if spec[KIND] == POWER:
        return max(high, -low) / last, ZERO
    return (high if high > -low else low) / table[0], ZERO


@inner
def _candidate(low: Any, high: Any, step: Any, second: Any, n_steps: Any, spec: Any, table: Any) -> Any:
    """Scale and minimum number (step, second) to be tried for a group: its whole range, then narrower ones."""
    if spec[HAS_MINIMUM]:
        width = (high - low) / np.float32(2 * n_steps + 2)
        start, end = low + width * np.float32(step), high - width * np.float32(second)
        start = min(start, ZERO) if spec[KIND] == TWO_LEVEL else start
        return (end - start) / table[spec[LEVELS] - 1], start
    extreme = high if high > -low else low
    share = np.float32(step) / np.float32(n_steps)
    if spec[UNIFORM]:  # from slightly more than the range to half of it
        reach = table[0] * (ONE + share) + np.float32(0.5)
    else:
        reach = table[0] * (np.float32(0.9) + np.float32(0.6) * share)
    if spec[KIND] == POWER:
        return abs(extreme / reach), ZERO
    return (extreme if second else -extreme) / reach, ZERO


@inner
def _fit_group(
    x: Any,
    importance: Any,
    above: Any,
    below: Any,
    n_steps: Any,
    n_fits: Any,
    spec: Any,
    table: Any,
    levels: Any,
    work: Any,
) -> Any:
    """The best scale and minimum of a group among candidates, each improved by least squares n_fits times."""
    low, high = x[0], x[0]
    for i in range(1, x.size):
        low, high = min(low, x[i]), max(high, x[i])
    best, best_scale, best_minimum = INFINITE, ZERO, ZERO
    n_second = n_steps if spec[HAS_MINIMUM] else 2
    for number in range(-1, n_steps * n_second):
        if number < 0:
            scale, minimum = _spanning(low, high, spec, table)
        else:
            scale, minimum = _candidate(low, high, number // n_second, number % n_second, n_steps, spec, table)
        for _ in range(n_fits + 1):
            scale = storable_scale(scale, above, spec)
            minimum = storable_minimum(minimum, below, spec)
            error = _round_group(x, importance, scale, minimum, spec, table, levels, work)
            if error < best:
                best, best_scale, best_minimum = error, scale, minimum
            if n_fits:
                scale, minimum = _least_squares(x, importance, spec, levels, work)
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

    weights (n_out, n_in); scales, minima (n_out, n_groups) are written; above, below, of the same shape: the
    super-scales and super-minima that they have to fit. n_steps 0 spans the range, as round-to-nearest does.
    """
    n_out, n_in = weights.shape
    n = spec[GROUP]
    work = np.empty((4, n), np.float32)
    for row in range(n_out):
        for group in range(n_in // n):
            for i in range(n):
                work[0, i], work[1, i] = weights[row, group * n + i], importance[group * n + i]
            scales[row, group], minima[row, group] = _fit_group(
                work[0],
                work[1],
                above[row, group],
                below[row, group],
                n_steps,
                n_fits,
                spec,
                table,
                work[2],
                work[3],
            )


@kernel
def round_all(weights: Any, scales: Any, minima: Any, spec: Any, table: Any, levels: Any) -> None:
    """Round every weight to its group's nearest level: levels (n_out, n_in) are written."""
    n_out, n_in = weights.shape
    n = spec[GROUP]
    for row in range(n_out):
        for group in range(n_in // n):
            minimum, inverse = minima[row, group], inverse_of(scales[row, group])
            for column in range(group * n, group * n + n):
                levels[row, column] = nearest_level((weights[row, column] - minimum) * inverse, spec, table)
