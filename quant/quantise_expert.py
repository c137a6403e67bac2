"""Quantising one expert: its gate, up and down projection for the tokens that are routed to it.

The rows that down multiplies are computed here from those of gate and up. Knows nothing of models, files or routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from edgert.quant.formats import FORMATS, Format, Matrix
from edgert.quant.quantisers import Inputs, quantise
from edgert.quant.quantisers_inputs import half_products
from edgert.quant.reference import GELU_CUBE, GELU_SCALE, OSS_ALPHA, OSS_LIMIT
from edgert.types import Floats, Ids

_ERROR_ROWS = 512  # most rows on which the error of an expert's output is measured
_ERROR_OUTPUTS = 64  # most outputs of a projection that are quantised to learn the error of all
_FEWEST_KEPT = 32  # rows, to be kept back from the quantiser for that once and for all
_PROBE, _POWERS = FORMATS["int3"], (0.0, 0.125, 0.25, 0.5)


Biases = tuple[Floats, Floats]  # of gate and up, (d_expert,) each; that of down changes no error


@dataclass(frozen=True)
class _Units:
    """An expert's gated units: their activation, and what they add to the products of gate and up."""

    activation: str
    biases: Biases | None

    @property
    def is_linear(self) -> bool:
        """Whether units grow as the products of up do."""
        return self.activation != "swiglu-oss" and self.biases is None

    def some(self, units: Ids) -> _Units:
        """Some of the units."""
        if self.biases is None:
            return self
        return _Units(self.activation, (self.biases[0][units], self.biases[1][units]))

    def hidden(self, gate: Floats, up: Floats, states: Floats) -> Floats:
        """What gate and up make of the states, float32 (n_tokens, d_expert): what down multiplies."""
        rows = states.astype(np.float32, copy=False)
        return self.activate(rows @ gate.T, rows @ up.T)

    def activate(self, gate: Floats, up: Floats) -> Floats:
        """The gated units of quant.reference, rounded as NumPy does: many times as fast."""
        if self.biases is not None:
            gate, up = gate + self.biases[0], up + self.biases[1]
        with np.errstate(over="ignore"):  # e**-x is infinite below -88, and its inverse 0
            if self.activation == "silu":
                return gate / (1 + np.exp(-gate)) * up
            if self.activation == "gelu":
                inner = gate * (1 + GELU_CUBE * np.square(gate)) * GELU_SCALE
                return gate / (1 + np.exp(-inner)) * up
            gate, up = np.minimum(gate, OSS_LIMIT), np.clip(up, -OSS_LIMIT, OSS_LIMIT)
            return gate / (1 + np.exp(-OSS_ALPHA * gate)) * (up + 1)


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
    biases: Biases | None = None,
) -> ExpertQuantised:
    """Quantise gate, up (d_expert, d_model) and down (d_model, d_expert) to the formats given in this order.

    None leaves a projection as it is. With gptq, down also makes good what it can of the errors of gate and up; with
    awq, down's columns are scaled and up's rows take the inverse: so the matrices belong together. states (n_tokens,
    d_model): the expert's inputs; importance (n_tokens,): what its output is multiplied by; both may be empty. biases:
    what gate and up add before the units. Raises what `quantise` raises.
    """
    units = _Units(activation, biases)
    hidden = units.hidden(gate, up, states)
    if quantiser == "awq" and formats[1] and formats[2]:
        up, down, hidden = _balanced(up, down, hidden, importance, units)
    seen, weights = _inputs(states, importance), [gate, up, down]
    matrices: list[Matrix | None] = []
    for place, format in enumerate(formats):
        inputs = seen
        if place == 2:
            inputs = _inputs(hidden, importance)
            if quantiser == "gptq" and inputs.is_enough and any(matrices):
                made = units.hidden(weights[0], weights[1], states)
                inputs = _inputs(made, importance)
                weights[2] = _compensating(down, hidden, made, importance, inputs)
        matrix = None if format is None else quantise(weights[place], format, quantiser, inputs).matrix
        weights[place] = (gate, up, down)[place] if matrix is None else matrix.to_float()
        matrices.append(matrix)
    error = 0.0
    if len(states):
        rows = _spread(len(states))
        output = units.hidden(weights[0], weights[1], states[rows]) @ weights[2].T
        error = _mean_error(hidden[rows] @ down.T - output, importance[rows])
    return ExpertQuantised(tuple(matrices), error)


def _balanced(
    up: Floats, down: Floats, hidden: Floats, importance: Floats, units: _Units
) -> tuple[Floats, Floats, Floats]:
    """up, down and what up makes, with down's columns scaled by a power of what they multiply (AWQ, arXiv 2306.00978).

    That power is taken which leaves least error at 3 bits; what gate and up multiply cannot be scaled for one expert.
    """
    inputs = _inputs(hidden, importance)
    if not units.is_linear or not inputs.is_enough or down.shape[1] % _PROBE.block:
        return up, down, hidden
    size = np.sqrt(np.diagonal(inputs.shrunk))
    scales = [((size / np.exp(np.mean(np.log(size)))) ** power).astype(np.float32) for power in _POWERS]
    best = min(scales, key=lambda s: quantise(down * s, _PROBE, "awq", Inputs(hidden / s, importance)).error)
    return up / best[:, None], down * best, hidden / best


def _compensating(down: Floats, hidden: Floats, made: Floats, importance: Floats, inputs: Inputs) -> Floats:
    """The down projection with which the rows `made` give most nearly what the rows `hidden` give with `down`.

    hidden, made (n_tokens, d_expert); inputs: of made. Least squares: down (1 + C S^-1), where C is the mean of
    (hidden - made) made' and S that of made made'. As much of it is taken as serves rows that it was not found on.
    """
    missing = half_products(hidden - made, made, importance)
    inverse, square = np.linalg.inv(inputs.shrunk.astype(np.float64)), (down.T @ down).astype(np.float64)
    gain, cost = 0.0, 0.0
    for mine, others, moments in zip(missing, missing[::-1], inputs.halves[::-1], strict=True):
        found = mine @ inverse / (inputs.n_tokens / 2)
        gain += float(np.sum((square @ others) * found))
        cost += float(np.sum((square @ found @ moments) * found))
    share = min(max(gain / cost, 0.0), 1.0) if cost > 0 else 0.0
    found = (missing[0] + missing[1]) @ inverse / inputs.n_tokens
    return (down + share * (down @ found)).astype(np.float32)


def option_errors(
    gate: Floats,
    up: Floats,
    down: Floats,
    formats: Sequence[Format],
    quantiser: str,
    states: Floats,
    importance: Floats,
    activation: str = "silu",
    biases: Biases | None = None,
) -> Floats:
    """What each format costs each projection, float32 (3, n_formats), the other two projections left as they are.

    The error is the mean over (at most 512 of) the expert's rows of importance**2 * the squared error of its output,
    summed over the output; over rows kept back from the quantiser, as it errs up to four times less on its own. At most
    64 outputs of a projection are quantised and stand for the others. Infinite where a projection's columns do not fit
    a format, zero where there are no rows.
    """
    errors = np.zeros((3, len(formats)), np.float64)
    if not len(states):
        return errors.astype(np.float32)
    expert = _Units(activation, biases)
    hidden = expert.hidden(gate, up, states)
    if quantiser == "awq":
        up, down, hidden = _balanced(up, down, hidden, importance, expert)
    units, share = _sample_units(np.square(hidden * importance[:, None]).mean(axis=0) * np.square(down).sum(axis=0))
    outputs = _spread(len(down), _ERROR_OUTPUTS)
    sample = gate[units], up[units], down[outputs]
    sampled = expert.some(units)
    through = (down[:, units] * np.sqrt(share)).T  # (n_units, d_model)
    folds = _folds(len(states))
    for fitted, kept in folds:
        seen, made = (_inputs(rows[fitted], importance[fitted]) for rows in (states, hidden))
        few, weight, used = states[kept].astype(np.float32), importance[kept], hidden[kept]
        gates, ups = few @ sample[0].T, few @ sample[1].T  # (n_rows, n_units)
        for option, format in enumerate(formats):
            for projection, (weights, inputs) in enumerate(zip(sample, (seen, seen, made), strict=True)):
                if weights.shape[1] % format.block:
                    errors[projection, option] = np.inf
                    continue
                found = quantise(weights, format, quantiser, inputs).matrix.to_float()
                if projection == 2:
                    difference = used @ (weights - found).T * np.sqrt(len(down) / len(outputs))
                elif projection == 1:
                    difference = (used[:, units] - sampled.activate(gates, few @ found.T)) @ through
                else:
                    difference = (used[:, units] - sampled.activate(few @ found.T, ups)) @ through
                errors[projection, option] += _mean_error(difference, weight) * len(kept)
    return (errors / sum(len(kept) for _, kept in folds)).astype(np.float32)


def _sample_units(size: Floats) -> tuple[Ids, Floats]:
    """At most 64 of an expert's hidden units, and for how many like it each stands.

    size (n_units,): what each adds to the output. Half are the largest, which stand for themselves, for a few make most
    of the error; half are evenly spread over the others.
    """
    order, half = np.argsort(-size, kind="stable"), _ERROR_OUTPUTS // 2
    if len(order) <= _ERROR_OUTPUTS:
        return np.arange(len(order)), np.ones(len(order), np.float32)
    rest = order[half:]
    few = rest[_spread(len(rest), half)]
    like = size[rest].sum() / max(float(size[few].sum()), 1e-30)
    return np.concatenate([order[:half], few]), np.repeat(np.array([1.0, like], np.float32), half)


def _folds(n_rows: int) -> list[tuple[Ids, Ids]]:
    """Rows for the quantiser with those to measure on, which it does not see; of few, in turn one half and the other.

    Neighbours, which are of one text, stay together. Those to measure on are at most 512.
    """
    rows = np.arange(n_rows)
    is_kept = rows * 16 // n_rows % 4 == 1
    if np.count_nonzero(is_kept) >= _FEWEST_KEPT:
        kept = rows[is_kept]
        return [(rows[~is_kept], kept[_spread(len(kept))])]
    is_second = rows * 8 // n_rows % 2 == 1
    halves = rows[~is_second], rows[is_second]
    return [(fitted, kept) for fitted, kept in (halves, halves[::-1]) if len(kept)]


def _inputs(rows: Floats, importance: Floats) -> Inputs:
    return Inputs(rows, importance) if len(rows) else Inputs(None)


def _spread(n: int, most: int = _ERROR_ROWS) -> Ids:
    """At most so many of n numbers, evenly spread."""
    few = min(n, most)
    return np.arange(few) * n // few


def _mean_error(difference: Floats, importance: Floats) -> float:
    per_row = np.sum(np.square(difference), axis=1, dtype=np.float64)
    return float(np.mean(per_row * np.square(importance, dtype=np.float64)))
