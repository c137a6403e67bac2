"""Guesses at the experts of a coming layer, each from one kind of evidence, and their combination to probabilities.

A wrong guess costs time and never changes an answer. Everything is learnt while it runs, from routes alone; nothing
here knows of flash, slots or time. The evidence is of the log-odds kind: the combination is a logistic regression for
each layer and distance, which starts from weights that fit a real model and goes on learning.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from edgert.types import Floats, Ids

AHEAD = 2  # how many layers ahead guesses are made


class Predictor(Protocol):
    """One kind of evidence."""

    name: str

    def routed(self, layer: int, ids: Ids, lookahead: Sequence[Floats]) -> None:
        """Learn the routes ids (n_tokens, top_k) of a layer; see Prefetcher.routed for `lookahead`."""

    def evidence(self, target: int, distance: int, out: Floats) -> bool:
        """For each expert of layer `target`, `distance` layers after the one routed last: out (n_expert,).

        False where nothing is known; `out` is then left as it is.
        """


class NextRouter:
    """The target's own router, given the hidden state of the layer routed last: needs no training.

    Its scores count from the top_k-th best on, in standard deviations: that is what layers have in common.
    """

    name = "router"

    def __init__(self, n_layers: int, n_expert: int, top_k: int) -> None:
        self._n_layers, self._n_expert, self._top_k = n_layers, n_expert, top_k
        self._lookahead: Sequence[Floats] = ()

    def routed(self, layer: int, ids: Ids, lookahead: Sequence[Floats]) -> None:
        """See Predictor."""
        self._lookahead = lookahead if layer + 1 < self._n_layers else ()

    def evidence(self, target: int, distance: int, out: Floats) -> bool:
        """See Predictor."""
        if not 0 < distance <= min(len(self._lookahead), target):
            return False
        scores, n = self._lookahead[distance - 1][: self._n_expert], self._n_expert
        mean = float(np.add.reduce(scores)) / n
        spread = max(float(scores @ scores) / n - mean * mean, 1e-12) ** 0.5  # NaN stays NaN
        out[:] = scores
        out.partition(n - self._top_k)
        np.subtract(scores, out[n - self._top_k], out=out)
        out *= 1.0 / spread
        np.maximum(out, -4.0, out=out)
        return math.isfinite(spread)


class Path:
    """EdgeMoE's path table: what followed when the two layers before chose these experts.

    Where a table of pairs would be larger than `_PAIRS_BYTES`, each of the two layers' experts votes for itself; where
    that would be larger than `_MOST_BYTES`, nothing is known.
    """

    name = "path"
    _PAIRS_BYTES, _MOST_BYTES = 4 << 20, 8 << 20
    _PRIOR = 2.0  # visits that an unknown row counts for, with the layer's frequencies
    _FULL = 64.0  # visits of a row at which older ones begin to count less

    def __init__(self, n_layers: int, n_expert: int, top_k: int) -> None:
        self._n_layers, self._n_expert = n_layers, n_expert
        n_rows = self._n_table_rows(n_layers, n_expert)
        self._pairs, self._is_known = n_rows == n_expert**2, n_rows > 0
        self._table = np.zeros((n_layers, n_rows, n_expert + 1), np.float32)  # uses of each expert, visits at the end
        self._shares = np.full((n_layers, n_expert), top_k / n_expert, np.float32)
        self._newest = np.full(top_k + 1, n_expert)  # columns that a route adds to: its experts, and the visits
        self._last: list[Ids] = [np.zeros(0, np.int64)] * n_layers  # of the newest token
        self._rows: list[Ids | None] = [None] * n_layers  # of the table, that the two layers before lead to

    @classmethod
    def _n_table_rows(cls, n_layers: int, n_expert: int) -> int:
        for n_rows, most in ((n_expert**2, cls._PAIRS_BYTES), (2 * n_expert, cls._MOST_BYTES)):
            if 4 * n_layers * n_rows * (n_expert + 1) <= most:
                return n_rows
        return 0

    @classmethod
    def table_bytes(cls, n_layers: int, n_expert: int) -> int:
        """What the table takes."""
        return 4 * n_layers * cls._n_table_rows(n_layers, n_expert) * (n_expert + 1)

    def _rows_to(self, target: int) -> Ids:
        """Rows of the target's table that the two layers before it lead to."""
        rows = self._rows[target]
        if rows is None:
            before, last = (self._last[(target - d) % self._n_layers] for d in (2, 1))
            if not self._is_known:
                rows = np.zeros(0, np.int64)
            elif self._pairs:
                rows = (before[:, None] * self._n_expert + last).reshape(-1)
            else:
                rows = np.concatenate((before, last + self._n_expert))
            self._rows[target] = rows
        return rows

    def routed(self, layer: int, ids: Ids, lookahead: Sequence[Floats]) -> None:
        """See Predictor. Of a chunk only the last token is learnt."""
        newest = ids[-1]
        rows, table = self._rows_to(layer), self._table[layer]
        if len(rows):
            self._newest[:-1] = newest
            table[rows[:, None], self._newest] += 1.0
            if table[rows[0], -1] >= self._FULL:
                table[rows] *= 0.5
        shares = self._shares[layer]
        shares *= 0.98
        shares[newest] += 0.02
        self._last[layer] = newest
        self._rows[(layer + 1) % self._n_layers] = self._rows[(layer + 2) % self._n_layers] = None

    def evidence(self, target: int, distance: int, out: Floats) -> bool:
        """See Predictor."""
        rows = self._rows_to(target)
        if distance != 1 or not len(rows):
            return False
        uses = np.add.reduce(self._table[target].take(rows, axis=0, mode="clip"))  # (n_expert + 1,)
        np.multiply(self._shares[target], self._PRIOR, out=out)
        out += uses[:-1]
        out *= 1.0 / (uses[-1] + self._PRIOR)
        _log_odds(out)
        return True


class PreviousToken:
    """Experts of the same layer at the last tokens, each counting half of the one after it."""

    name = "previous"

    def __init__(self, n_layers: int, n_expert: int, top_k: int) -> None:
        self._recent = np.zeros((n_layers, n_expert), np.float32)

    def routed(self, layer: int, ids: Ids, lookahead: Sequence[Floats]) -> None:
        """See Predictor."""
        recent = self._recent[layer]
        for token in ids[-4:]:
            recent *= 0.5
            recent[token] += 0.5  # each expert once: a token's are all different

    def evidence(self, target: int, distance: int, out: Floats) -> bool:
        """See Predictor."""
        out[:] = self._recent[target]
        return True


class Frequency:
    """How often the target's experts are chosen, with a half-life of 64 tokens."""

    name = "frequency"
    _KEEP = 0.5 ** (1 / 64)

    def __init__(self, n_layers: int, n_expert: int, top_k: int) -> None:
        self._shares = np.full((n_layers, n_expert), top_k / n_expert, np.float32)

    def routed(self, layer: int, ids: Ids, lookahead: Sequence[Floats]) -> None:
        """See Predictor."""
        n, shares = len(ids), self._shares[layer]
        keep = self._KEEP**n
        shares *= keep
        if n == 1:
            shares[ids[0]] += 1.0 - keep
        else:
            counts = np.bincount(ids.reshape(-1), minlength=len(shares))
            shares += counts * ((1.0 - keep) / n)

    def evidence(self, target: int, distance: int, out: Floats) -> bool:
        """See Predictor."""
        out[:] = self._shares[target]
        _log_odds(out)
        return True


def _log_odds(shares: Floats) -> None:
    """Shares to log(p / (1 - p)), in place, between -7 and 7. (np.clip takes as long as all of this.)"""
    np.maximum(shares, 1e-3, out=shares)
    np.minimum(shares, 1.0 - 1e-3, out=shares)
    shares /= 1.0 - shares
    np.log(shares, out=shares)


PREDICTORS: dict[str, Callable[[int, int, int], Predictor]] = {
    predictor.name: predictor for predictor in (NextRouter, Path, PreviousToken, Frequency)
}
DEFAULT = ("router", "path", "frequency")  # "previous" adds 0.2 points of recall to these, not worth its time
# Bias and weights of all predictors in that order, one and two layers ahead: the mean over the layers of the embedded
# model after 5,000 tokens.
_START = {1: (1.0, 2.5, 1.0, 0.5, 0.1), 2: (0.5, 2.0, 0.0, 0.5, 0.6)}


def predictor_bytes(n_layers: int, n_expert: int) -> int:
    """What all predictors and their combination take for a model."""
    rows = AHEAD * (len(PREDICTORS) + 2) + len(PREDICTORS)  # of evidence and chances, and of what predictors keep
    return Path.table_bytes(n_layers, n_expert) + 4 * n_layers * n_expert * rows


class Combined:
    """Calibrated probabilities from several kinds of evidence: logistic regression, learning from every route."""

    _RATE = 0.02  # of learning

    def __init__(self, n_layers: int, n_expert: int, top_k: int, names: Sequence[str] = DEFAULT) -> None:
        self._n_layers, self._n_expert = n_layers, n_expert
        self.predictors = [PREDICTORS[name](n_layers, n_expert, top_k) for name in names]
        columns = [0, *(1 + list(PREDICTORS).index(name) for name in names)]
        start = [[_START[distance][column] for column in columns] for distance in range(1, AHEAD + 1)]
        self._weights = np.repeat(np.array(start, np.float32)[:, None], n_layers, axis=1)  # (AHEAD, n_layers, n)
        self._evidence = np.zeros((AHEAD, n_layers, len(columns), n_expert), np.float32)
        self._evidence[:, :, 0] = 1.0
        self._chances = np.zeros((AHEAD, n_layers, n_expert), np.float32)
        self._guessed = np.zeros((AHEAD, n_layers), bool)  # whether a guess waits for the truth

    def routed(self, layer: int, ids: Ids, lookahead: Sequence[Floats]) -> None:
        """Learn from ids (n_tokens, top_k); guesses for the layers after it then rest on it."""
        for distance in range(AHEAD):
            if self._guessed[distance, layer] and len(ids) == 1:
                self._learn(distance, layer, ids[0])
            self._guessed[distance, layer] = False
        for predictor in self.predictors:
            predictor.routed(layer, ids, lookahead)

    def _learn(self, distance: int, layer: int, ids: Ids) -> None:
        """One step towards what was chosen."""
        wrong = self._chances[distance, layer]
        wrong[ids] -= 1.0
        self._weights[distance, layer] -= self._RATE * (self._evidence[distance, layer] @ wrong)

    def chances(self, target: int, distance: int) -> Floats:
        """The probability that the newest token, or the next one, uses each expert of `target`: (n_expert,).

        distance: how many layers `target` comes after the one routed last, 1 or 2. Valid until its routes are known.
        """
        evidence, chances = self._evidence[distance - 1, target], self._chances[distance - 1, target]
        for row, predictor in enumerate(self.predictors, 1):
            if not predictor.evidence(target, distance, evidence[row]):
                evidence[row] = 0.0
        np.dot(self._weights[distance - 1, target], evidence, out=chances)
        np.negative(chances, out=chances)
        np.minimum(chances, 15.0, out=chances)
        np.exp(chances, out=chances)
        chances += 1.0
        np.reciprocal(chances, out=chances)
        self._guessed[distance - 1, target] = True
        return chances
