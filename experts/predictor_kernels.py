"""The arithmetic of the predictors, compiled: it runs at every layer of a token, beside the reads that it is to begin.

Each predictor has a row of evidence of the log-odds kind about every expert of a layer; what each means is
predictors.py's.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from edgert.devices.base import ABSENT
from edgert.quant.jit import inner, kernel
from edgert.types import Floats, Ids

AHEAD = 2  # how many layers ahead guesses are made
ROUTER, PATH, PREVIOUS, FREQUENCY = range(4)
N_PREDICTORS = 4
_RATE = 0.02  # of learning
_LOWEST_SCORE = -4.0  # standard deviations below the last expert chosen
_PRIOR = 2.0  # visits that an unknown row of the path table counts for, with the layer's frequencies
_FULL = 64.0  # visits of a row at which older ones begin to count less
_PATH_KEEPS, _FREQUENCY_KEEPS = 0.98, 0.5 ** (1 / 64)  # of the shares, with each token
_N_RECENT = 4  # tokens that still count for PREVIOUS


class Knowledge(NamedTuple):
    """All that the predictors of a model know, and their guesses; L layers, E experts, K of them used."""

    used: Any  # (N_PREDICTORS,) bool
    weights: Floats  # (AHEAD, L, 1 + N_PREDICTORS): the bias first
    evidence: Floats  # (AHEAD, L, N_PREDICTORS, E): what the guesses rest on
    known: Any  # (AHEAD, L, N_PREDICTORS) bool: rows of it that say anything
    chances: Floats  # (AHEAD, L, E)
    guessed: Any  # (AHEAD, L) bool: chances that wait for the truth
    scores: Floats  # (AHEAD, E): of the next layers' routers
    n_scores: Ids  # (1,): rows of them that are there
    table: Floats  # (L, rows, E + 1): uses of each expert on a path, visits at the end; rows is E * E, 2 * E or 0
    path_shares: Floats  # (L, E)
    last: Ids  # (L, K): of the newest token; -1 before there was one
    recent: Floats  # (L, E)
    shares: Floats  # (L, E)


# ---- what routes teach -----------------------------------------------------------------------------------------------
@kernel
def learn(k: Knowledge, layer: int, ids: Any) -> None:
    """Take in a layer's routes ids (n_tokens, K), of which the last token is the newest."""
    n_tokens, top_k = ids.shape
    n_expert = k.chances.shape[2]
    newest = ids[n_tokens - 1]
    for d in range(AHEAD):
        if k.guessed[d, layer] and n_tokens == 1:
            wrong, weights = k.chances[d, layer], k.weights[d, layer]
            for i in range(top_k):
                wrong[newest[i]] -= np.float32(1)
            for e in range(n_expert):
                weights[0] -= np.float32(_RATE) * wrong[e]
            for row in range(N_PREDICTORS):
                if k.known[d, layer, row]:
                    total = np.float32(0)
                    for e in range(n_expert):
                        total += k.evidence[d, layer, row, e] * wrong[e]
                    weights[1 + row] -= np.float32(_RATE) * total
        k.guessed[d, layer] = False
    if k.used[PATH]:
        _learn_path(k, layer, newest)
    if k.used[PREVIOUS]:
        for t in range(max(0, n_tokens - _N_RECENT), n_tokens):
            _fade(k.recent[layer], 0.5, ids[t])
    if k.used[FREQUENCY]:
        for t in range(n_tokens):
            _fade(k.shares[layer], _FREQUENCY_KEEPS, ids[t])


@inner
def _fade(shares: Any, keep: float, ids: Any) -> None:
    """Let shares fade to `keep` and add the rest to the experts ids."""
    for e in range(len(shares)):
        shares[e] *= np.float32(keep)
    for i in range(len(ids)):
        shares[ids[i]] += np.float32(1.0 - keep)


@inner
def _path_row(k: Knowledge, layer: int, step: int) -> int:
    """Row number `step` of those that the two layers before lead to; -1 after the last, or if the path is unknown."""
    n_layers, top_k = k.last.shape
    n_expert = k.chances.shape[2]
    before, last = k.last[(layer - 2) % n_layers], k.last[(layer - 1) % n_layers]
    n_rows = k.table.shape[1]
    if n_rows == 0 or before[0] < 0 or last[0] < 0:
        return -1
    if n_rows == n_expert * n_expert:
        return before[step // top_k] * n_expert + last[step % top_k] if step < top_k * top_k else -1
    if step < top_k:
        return before[step]
    return n_expert + last[step - top_k] if step < 2 * top_k else -1


@inner
def _learn_path(k: Knowledge, layer: int, newest: Any) -> None:
    n_expert = k.chances.shape[2]
    step = 0
    while True:
        row = _path_row(k, layer, step)
        if row < 0:
            break
        uses = k.table[layer, row]
        for i in range(len(newest)):
            uses[newest[i]] += np.float32(1)
        uses[n_expert] += np.float32(1)
        if uses[n_expert] >= _FULL:
            for e in range(n_expert + 1):
                uses[e] *= np.float32(0.5)
        step += 1
    _fade(k.path_shares[layer], _PATH_KEEPS, newest)
    for i in range(len(newest)):
        k.last[layer, i] = newest[i]


# ---- guesses ---------------------------------------------------------------------------------------------------------
@inner
def _log_odds(share: float) -> float:
    share = min(max(share, 1e-3), 1.0 - 1e-3)
    return math.log(share / (1.0 - share))


@inner
def _next_best(values: Any, before: int) -> int:
    """The place of the largest value after that at `before` (-1: of all); equal ones in ascending order. -1 if none."""
    best = -1
    for e in range(len(values)):
        later = before < 0 or values[e] < values[before] or (values[e] == values[before] and e > before)
        if later and (best < 0 or values[e] > values[best]):
            best = e
    return best


@inner
def _router_evidence(scores: Any, top_k: int, out: Any) -> bool:
    """Scores from the top_k-th best on, in standard deviations: that is what the layers have in common."""
    n = len(scores)
    total, squares = 0.0, 0.0
    for e in range(n):
        total += scores[e]
        squares += scores[e] * scores[e]
    spread = math.sqrt(max(squares / n - (total / n) ** 2, 1e-12))
    if not math.isfinite(squares):
        return False
    last = -1
    for _ in range(top_k):
        last = _next_best(scores, last)
    for e in range(n):
        out[e] = max((scores[e] - scores[last]) / spread, _LOWEST_SCORE)
    return True


@inner
def _path_evidence(k: Knowledge, target: int, out: Any) -> bool:
    n_expert = len(out)
    if _path_row(k, target, 0) < 0:
        return False
    visits = _PRIOR
    for e in range(n_expert):
        out[e] = k.path_shares[target, e] * np.float32(_PRIOR)
    step = 0
    while True:
        row = _path_row(k, target, step)
        if row < 0:
            break
        uses = k.table[target, row]
        for e in range(n_expert):
            out[e] += uses[e]
        visits += uses[n_expert]
        step += 1
    for e in range(n_expert):
        out[e] = _log_odds(out[e] / visits)
    return True


@kernel
def guess(k: Knowledge, target: int, distance: int) -> None:
    """Fill evidence and chances of a layer that comes `distance` layers after the one whose routes were learnt last."""
    d, n_expert = distance - 1, k.chances.shape[2]
    known, evidence, chances = k.known[d, target], k.evidence[d, target], k.chances[d, target]
    known[:] = False
    if k.used[ROUTER] and distance <= k.n_scores[0] and distance <= target:
        known[ROUTER] = _router_evidence(k.scores[d], k.last.shape[1], evidence[ROUTER])
    if k.used[PATH] and distance == 1:
        known[PATH] = _path_evidence(k, target, evidence[PATH])
    if k.used[PREVIOUS]:
        known[PREVIOUS] = True
        for e in range(n_expert):
            evidence[PREVIOUS, e] = k.recent[target, e]
    if k.used[FREQUENCY]:
        known[FREQUENCY] = True
        for e in range(n_expert):
            evidence[FREQUENCY, e] = _log_odds(k.shares[target, e])
    weights = k.weights[d, target]
    for e in range(n_expert):
        odds = weights[0]
        for row in range(N_PREDICTORS):
            if known[row]:
                odds += weights[1 + row] * evidence[row, e]
        chances[e] = 1.0 / (1.0 + math.exp(-max(odds, np.float32(-15))))
    k.guessed[d, target] = True


@kernel
def list_guesses(k: Knowledge, layer: int, state: Any, has_experts: Any, least: float, keys: Any, found: Any) -> int:
    """Guess at the layers after `layer` and list absent experts that are likelier than `least`; returns how many.

    state (L * E,) and has_experts (L,) say what is absent. keys and found (n,) take keys, layer * E + expert, and
    probabilities: nearer layers first, then the likelier.
    """
    n_layers, n_expert = k.chances.shape[1:]
    n, most = 0, len(keys) // AHEAD
    for distance in range(1, min(AHEAD, n_layers) + 1):  # no layer twice
        target = (layer + distance) % n_layers
        if not has_experts[target]:
            continue
        guess(k, target, distance)
        chances, best, last = k.chances[distance - 1, target], -1, n + most
        for _ in range(n_expert):
            best = _next_best(chances, best)
            if n == last or not chances[best] > least:
                break
            if state[target * n_expert + best] == ABSENT:
                keys[n], found[n] = target * n_expert + best, chances[best]
                n += 1
    return n
