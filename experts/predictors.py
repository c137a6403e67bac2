"""Guesses at the experts of a coming layer, each from one kind of evidence, and their combination to probabilities.

A wrong guess costs time and never changes an answer. Everything is learnt while it runs, from routes alone; nothing
here knows of flash, slots or time. The kinds of evidence:

- router: the coming layer's own router, given the hidden state of the layer routed last. It needs no training.
- path: EdgeMoE's path table, what followed when the two layers before chose these experts. Where a table of pairs would
  be larger than `_PAIRS_BYTES`, each of the two layers' experts votes for itself; where that would be larger than
  `_MOST_BYTES`, nothing is known.
- previous: experts of the same layer at the last tokens, each counting half of the one after it.
- frequency: how often the layer's experts are chosen, with a half-life of 64 tokens.

The combination is a logistic regression for each layer and distance, which starts from weights that fit a real model
and goes on learning.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.experts.predictor_kernels import AHEAD as AHEAD
from edgert.experts.predictor_kernels import N_PREDICTORS, Knowledge, guess, learn, list_guesses
from edgert.quant import jit
from edgert.types import Floats, Ids

PREDICTORS = ("router", "path", "previous", "frequency")  # in the order of the kernels' rows
DEFAULT = ("router", "path", "frequency")  # "previous" adds 0.2 points of recall to these, not worth its time
# Bias and weights of all predictors in that order, one and two layers ahead: the mean over the layers of the embedded
# model after 5,000 tokens.
_START = ((1.0, 2.5, 1.0, 0.5, 0.1), (0.5, 2.0, 0.0, 0.5, 0.6))
_PAIRS_BYTES, _MOST_BYTES = 4 << 20, 8 << 20
_MOST_VISITS = 48  # of a row of a primed table: as many as it has, on average, when much was learnt


def _n_table_rows(n_layers: int, n_expert: int) -> int:
    """Rows of a layer's path table."""
    for n_rows, most in ((n_expert**2, _PAIRS_BYTES), (2 * n_expert, _MOST_BYTES)):
        if 4 * n_layers * n_rows * (n_expert + 1) <= most:
            return n_rows
    return 0


class Primed(NamedTuple):
    """What routes taught before: shares of tokens (n_layers, n_expert), a path table (n_layers, rows, n_expert + 1).

    What does not fit the model it is given to is not used.
    """

    shares: Floats
    table: npt.NDArray[np.uint8]


def path_table(texts: Sequence[npt.NDArray[Any]], has_experts: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """The path table of texts, ids (n_layers, n_tokens, top_k) each, as learning from them would have left it about.

    has_experts: (n_layers, n_expert). Older visits of a row do not count less here.
    """
    n_layers, n_expert = has_experts.shape
    n_rows = _n_table_rows(n_layers, n_expert)
    there: npt.NDArray[np.bool_] = np.any(has_experts, axis=1)
    table = np.zeros((n_layers, n_rows, n_expert + 1), np.float32)
    for layer in range(n_layers):
        before, last = (layer - 2) % n_layers, (layer - 1) % n_layers
        if not n_rows or not there[[before, last, layer]].all():
            continue
        for ids in texts:
            n_tokens, uses = ids.shape[1], table[layer].reshape(-1)
            targets = ids[layer].astype(np.int64)
            paths = [np.roll(ids[at], int(at >= layer), axis=0).astype(np.int64) for at in (before, last)]
            if n_rows == n_expert**2:
                rows = (paths[0][:, :, None] * n_expert + paths[1][:, None]).reshape(n_tokens, -1)
            else:
                rows = np.concatenate((paths[0], paths[1] + n_expert), axis=1)
            rows = rows[1:] * (n_expert + 1)  # the first token has no path through the one before
            uses += np.bincount((rows[:, :, None] + targets[1:, None]).reshape(-1), minlength=len(uses))
            uses += np.bincount(rows.reshape(-1) + n_expert, minlength=len(uses))
    visits = table[:, :, -1:]
    return np.rint(table * (_MOST_VISITS / np.maximum(visits, _MOST_VISITS))).astype(np.uint8)


def table_bytes(n_layers: int, n_expert: int) -> int:
    """What the path table takes."""
    return 4 * n_layers * _n_table_rows(n_layers, n_expert) * (n_expert + 1)


def predictor_bytes(n_layers: int, n_expert: int) -> int:
    """What all predictors and their combination take for a model."""
    rows = AHEAD * (N_PREDICTORS + 2) + N_PREDICTORS  # of evidence and chances, and of what predictors keep
    return table_bytes(n_layers, n_expert) + 4 * n_layers * n_expert * rows


def _nothing_known(n_layers: int, n_expert: int, top_k: int, names: Sequence[str]) -> Knowledge:
    shape, rows = (n_layers, n_expert), (AHEAD, n_layers, N_PREDICTORS)
    share = top_k / n_expert
    return Knowledge(
        used=np.array([name in names for name in PREDICTORS]),
        weights=np.repeat(np.array(_START, np.float32)[:, None], n_layers, axis=1),
        evidence=np.zeros((*rows, n_expert), np.float32),
        known=np.zeros(rows, np.bool_),
        chances=np.zeros((AHEAD, *shape), np.float32),
        guessed=np.zeros((AHEAD, n_layers), np.bool_),
        scores=np.zeros((AHEAD, n_expert), np.float32),
        n_scores=np.zeros(1, np.int64),
        table=np.zeros((n_layers, _n_table_rows(*shape), n_expert + 1), np.float32),
        path_shares=np.full(shape, share, np.float32),
        last=np.full((n_layers, top_k), -1),
        recent=np.zeros(shape, np.float32),
        shares=np.full(shape, share, np.float32),
    )


def is_compiled() -> bool:
    """Whether prepare() only has to load."""
    return all(map(jit.is_compiled, (learn, list_guesses)))


@functools.cache
def prepare() -> None:
    """Compile now, or load what was compiled, so that no token waits for it."""
    combined = Combined(1, 1, 1)
    combined.routed(0, np.zeros((1, 1), np.int64), ())
    keys, found = np.zeros(AHEAD, np.int64), np.zeros(AHEAD, np.float32)
    combined.list_absent(0, np.zeros(1, np.uint8), np.ones(1, np.bool_), 0.0, keys, found)


class Combined:
    """Calibrated probabilities from several kinds of evidence, named as in PREDICTORS."""

    def __init__(
        self,
        n_layers: int,
        n_expert: int,
        top_k: int,
        names: Sequence[str] = DEFAULT,
        primed: Primed | None = None,
    ) -> None:
        self._knowledge = known = _nothing_known(n_layers, n_expert, top_k, names)
        if primed is not None and primed.shares.shape == known.shares.shape and primed.table.shape == known.table.shape:
            known.shares[:], known.path_shares[:], known.table[:] = primed.shares, primed.shares, primed.table

    def routed(self, layer: int, ids: Ids, lookahead: Sequence[Floats]) -> None:
        """Learn from ids (n_tokens, top_k); guesses for the layers after it then rest on it.

        lookahead[d]: scores (n_expert or more,) by the router of layer + 1 + d, given this layer's hidden state of the
        last token; may be empty.
        """
        knowledge = self._knowledge
        assert ids.shape[1:] == knowledge.last.shape[1:] and ids.dtype == np.int64 and ids.flags.c_contiguous
        for row, scores in zip(knowledge.scores, lookahead, strict=False):
            row[:] = scores[: len(row)]
        knowledge.n_scores[0] = len(lookahead)
        learn(knowledge, layer, ids)

    def chances(self, target: int, distance: int) -> Floats:
        """The probability that the newest token, or the next one, uses each expert of `target`: (n_expert,).

        distance: how many layers `target` comes after the one routed last, 1 or 2. Valid until its routes are known.
        """
        guess(self._knowledge, target, distance)
        return self._knowledge.chances[distance - 1, target]

    def evidence(self, target: int, distance: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """What the last chances of `target` rest on: (4, n_expert) as in PREDICTORS, and which rows say anything."""
        return self._knowledge.evidence[distance - 1, target], self._knowledge.known[distance - 1, target]

    def list_absent(
        self,
        layer: int,
        state: npt.NDArray[np.uint8],
        has_experts: npt.NDArray[np.bool_],
        least: float,
        keys: Ids,
        found: Floats,
    ) -> int:
        """Fill in what is likely to be used after `layer` and absent; see predictor_kernels.list_guesses."""
        n_layers, n_expert = self._knowledge.chances.shape[1:]
        assert state.shape == (n_layers * n_expert,) and has_experts.shape == (n_layers,)
        assert keys.shape == found.shape and len(keys) % AHEAD == 0
        return int(list_guesses(self._knowledge, layer, state, has_experts, least, keys, found))
