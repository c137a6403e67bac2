"""Quantisers: from float weights to a low-bit matrix, each with the error it makes on the rows that the matrix sees.

rtn rounds to nearest; hqq fits scales and minima; awq clips them by what the inputs weigh; gptq feeds each group's
error back to the others under the Hessian of the inputs, then improves integers and scales in turn. Pure functions on
one core; what an expert is, and which rows reach it, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from edgert.errors import OptionError
from edgert.quant.formats import Format, Matrix
from edgert.quant.quantisers_grid import Grid
from edgert.quant.quantisers_inputs import Inputs as Inputs  # what callers hand over
from edgert.types import Floats

QUANTISERS = ("rtn", "hqq", "awq", "gptq")
_SWEEPS = 2  # of refinement; more of them gain less than 0.5 % of the error
_STEPS = {False: 16, True: 6}  # of a search for scales, without and with minima: tried are 2 * 16 and 6 * 6,
_FEW_STEPS = {False: 8, True: 4}  # and where gptq goes on from what was found 2 * 8 and 4 * 4
# What gptq then tries to multiply scales by; more bits ask for less.
_FACTORS = {
    2: (1.0, 0.86, 1.15, 0.93, 1.07, 0.78, 1.26),
    3: (1.0, 0.91, 1.1, 0.96, 1.045),
    4: (1.0, 0.96, 1.04),
}


class Quantised(NamedTuple):
    """A quantised matrix, and the mean over calibration rows of the squared error of its outputs, summed over them."""

    matrix: Matrix
    error: float  # without inputs: the mean squared error of the weights, times n_in
    quantiser: str  # that was used: gptq and awq become hqq where there are too few rows


def quantise(weights: Floats, format: Format, quantiser: str = "gptq", inputs: Inputs | None = None) -> Quantised:
    """Quantise weights (n_out, n_in) to an integer format for what `inputs` says of the rows they multiply.

    Raises OptionError for an unknown quantiser, a format without integers, columns that are no multiple of the
    format's block, and weights or inputs that are not finite.
    """
    n_out, n_in = _checked(weights, format, quantiser)
    inputs = Inputs(None) if inputs is None else inputs
    if inputs.n_tokens and not np.isfinite(inputs.moments).all():
        raise OptionError("the inputs of a matrix are not finite; look for damaged weights in the layers before it")
    used = quantiser if quantiser in ("rtn", "hqq") or inputs.is_enough else "hqq"
    grid = Grid(format, n_out, n_in)
    weights = np.ascontiguousarray(weights, np.float32)
    levels = _FUNCTIONS[used](weights, grid, inputs)
    difference = weights - grid.to_float(levels)
    if not inputs.n_tokens:
        error = float(np.mean(np.square(difference), dtype=np.float64)) * n_in
    else:
        error = float(np.sum((difference @ inputs.hessian()) * difference, dtype=np.float64))
    return Quantised(grid.matrix(levels), error, used)


def _checked(weights: Floats, format: Format, quantiser: str) -> tuple[int, int]:
    if quantiser not in QUANTISERS:
        raise OptionError(f"quantiser={quantiser!r} is not known; known are {', '.join(QUANTISERS)}")
    if not format.is_integer:
        raise OptionError(f"format {format.name} holds no integers to quantise to; take one such as int4")
    n_out, n_in = weights.shape
    if n_in % format.block:
        raise OptionError(f"{n_in} columns are no multiple of {format.block}, the block of {format.name}")
    if not np.isfinite(weights).all():
        raise OptionError("weights that are not finite cannot be quantised; the model's file is damaged")
    return n_out, n_in


def _importance(inputs: Inputs, n_in: int) -> Floats:
    """What each column's squared error weighs: the moments of the inputs, as they are to be expected, or 1."""
    return np.ascontiguousarray(np.diagonal(inputs.shrunk)) if inputs.n_tokens else np.ones(n_in, np.float32)


def _rtn(weights: Floats, grid: Grid, inputs: Inputs) -> Floats:
    grid.fit(weights, np.ones(weights.shape[1], np.float32), 0, 0)
    return grid.round(weights)


def _hqq(weights: Floats, grid: Grid, inputs: Inputs) -> Floats:
    return _fitted(weights, grid, inputs, 2)


def _awq(weights: Floats, grid: Grid, inputs: Inputs) -> Floats:
    return _fitted(weights, grid, inputs, 0)


def _fitted(weights: Floats, grid: Grid, inputs: Inputs, n_fits: int) -> Floats:
    importance = _importance(inputs, weights.shape[1])
    grid.fit(weights, importance, _STEPS[grid.format.has_minimum], n_fits)
    levels = grid.round(weights)
    grid.keep_gain(weights, levels, importance)
    return levels


def _gptq(weights: Floats, grid: Grid, inputs: Inputs) -> Floats:
    grid.fit(weights, _importance(inputs, weights.shape[1]), _FEW_STEPS[grid.format.has_minimum], 1)
    factors = np.array(_FACTORS.get(grid.format.bits, (1.0,)), np.float32)
    return grid.feed_back(weights, inputs.feedback(grid.format.group), factors, _SWEEPS)


_FUNCTIONS: dict[str, Callable[[Floats, Grid, Inputs], Floats]] = {"rtn": _rtn, "hqq": _hqq, "awq": _awq, "gptq": _gptq}
