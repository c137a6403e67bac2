"""Quantising one expert: its gate, up and down projection for the tokens that are routed to it.

The rows that down multiplies are computed here from those of gate and up. Knows nothing of models, files or routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from edgert.quant.formats import Format, Matrix
from edgert.quant.quantisers import Inputs, quantise
from edgert.quant.reference import GELU_CUBE, GELU_SCALE, OSS_ALPHA, OSS_LIMIT
from edgert.types import Floats, Ids

_ERROR_ROWS = 512  # most rows on which the error of an expert's output is measured


class ExpertQuantised(NamedTuple):
    """A quantised expert, and what it costs."""

    matrices: tuple[Matrix | None, ...]  # gate, up, down; None where that was not asked for
    error: float  # of the expert's output: mean over its rows of importance**2 * its squared error, summed


def quantise_expert(
    gate: Floats,
    up: Floats,
    down: Floats,
    formats: Sequence[Format | None],
    quantiser: str,
    states: Floats,
    importance: Floats,
    activation: str = "silu",
) -> ExpertQuantised:
    """Quantise gate, up (d_expert, d_model) and down (d_model, d_expert) to the formats given in this order.

    None leaves a projection as it is.

    states (n_tokens, d_model): the expert's inputs; importance (n_tokens,): what its output is multiplied by; both may
    be empty. Raises what `quantise` raises.
    """
    hidden = _hidden(gate, up, states, activation)
    seen, made = _inputs(states, importance), _inputs(hidden, importance)
    matrices = tuple(
        None if format is None else quantise(weights, format, quantiser, inputs).matrix
        for weights, format, inputs in zip((gate, up, down), formats, (seen, seen, made), strict=True)
    )
    floats = [
        weights if matrix is None else matrix.to_float()
        for weights, matrix in zip((gate, up, down), matrices, strict=True)
    ]
    error = 0.0
    if len(states):
        rows = _spread(len(states))
        target = hidden[rows] @ down.T
        output = _hidden(floats[0], floats[1], states[rows], activation) @ floats[2].T
        error = _mean_error(target - output, importance[rows])
    return ExpertQuantised(matrices, error)


def option_errors(
    gate: Floats,
    up: Floats,
    down: Floats,
    formats: Sequence[Format],
    quantiser: str,
    states: Floats,
    importance: Floats,
    activation: str = "silu",
) -> Floats:
    """What each format costs each projection, float32 (3, n_formats), the other two projections left as they are.

    The error is the mean over (at most 512 of) the expert's rows of importance**2 * the squared error of its output,
    summed over the output. Infinite where a projection's columns do not fit a format, zero where there are no rows.
    """
    errors = np.zeros((3, len(formats)), np.float32)
    if not len(states):
        return errors
    rows = _spread(len(states))
    hidden = _hidden(gate, up, states, activation)
    seen, made = _inputs(states, importance), _inputs(hidden, importance)
    few, weight = states[rows].astype(np.float32), importance[rows]
    gates, ups = few @ gate.T, few @ up.T  # (n_rows, d_expert)
    for option, format in enumerate(formats):
        for projection, (weights, inputs) in enumerate(((gate, seen), (up, seen), (down, made))):
            if weights.shape[1] % format.block:
                errors[projection, option] = np.inf
                continue
            found = quantise(weights, format, quantiser, inputs).matrix.to_float()
            if projection == 2:
                difference = hidden[rows] @ (down - found).T
            elif projection == 1:
                difference = (hidden[rows] - _activate(gates, few @ found.T, activation)) @ down.T
            else:
                difference = (hidden[rows] - _activate(few @ found.T, ups, activation)) @ down.T
            errors[projection, option] = _mean_error(difference, weight)
    return errors


def _hidden(gate: Floats, up: Floats, states: Floats, activation: str) -> Floats:
    """What gate and up make of the states, float32 (n_tokens, d_expert)."""
    rows = states.astype(np.float32, copy=False)
    return _activate(rows @ gate.T, rows @ up.T, activation)


def _activate(gate: Floats, up: Floats, activation: str) -> Floats:
    """The gated units of quant.reference, rounded as NumPy does: many times as fast."""
    with np.errstate(over="ignore"):  # e**-x is infinite below -88, and its inverse 0
        if activation == "silu":
            return gate / (1 + np.exp(-gate)) * up
        if activation == "gelu":
            inner = gate * (1 + GELU_CUBE * np.square(gate)) * GELU_SCALE
            return gate / (1 + np.exp(-inner)) * up
        gate, up = np.minimum(gate, OSS_LIMIT), np.clip(up, -OSS_LIMIT, OSS_LIMIT)
        return gate / (1 + np.exp(-OSS_ALPHA * gate)) * (up + 1)


def _inputs(rows: Floats, importance: Floats) -> Inputs:
    return Inputs(rows, importance) if len(rows) else Inputs(None)


def _spread(n_rows: int) -> Ids:
    """Numbers of at most 512 rows, evenly spread."""
    n = min(n_rows, _ERROR_ROWS)
    return np.arange(n) * n_rows // n


def _mean_error(difference: Floats, importance: Floats) -> float:
    per_row = np.sum(np.square(difference), axis=1, dtype=np.float64)
    return float(np.mean(per_row * np.square(importance, dtype=np.float64)))
