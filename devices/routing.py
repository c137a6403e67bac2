"""Compiled routing: from router scores to experts, weights and the list of (token, expert) pairs, expert by expert."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.quant import reference
from edgert.quant.functions import exp, sigmoid
from edgert.quant.jit import inner, kernel
from edgert.quant.simd import first_lane, splat
from edgert.types import Floats, Ids, RouterConfig, Routes

SMALLEST_SUM = np.float32(6.103515625e-5)  # normalisation divides by no less (the smallest normal half float)


@inner
def choose_row(
    scores: Any,
    softmax: bool,
    normalise: bool,
    scale: float,
    probabilities: Any,
    ids: Any,
    weights: Any,
    order: Any,
) -> None:
    """Fill ids, weights and order (top_k,) of one token from its scores (n_expert or more,).

    probabilities (n_expert,) is work space. Equal scores go to the lower id; order lists the choices by ascending id.
    """
    n_expert, top_k = len(probabilities), len(ids)
    largest = np.float32(-np.inf)
    for e in range(n_expert):
        largest = max(largest, scores[e])
    total = np.float32(0)
    for e in range(n_expert):
        if softmax:
            probabilities[e] = first_lane(exp(splat(scores[e] - largest)))
            total += probabilities[e]
        else:
            probabilities[e] = first_lane(sigmoid(splat(scores[e])))
    if softmax:
        for e in range(n_expert):
            probabilities[e] /= total
    chosen = np.float32(0)
    for k in range(top_k):
        best = -1
        for e in range(n_expert):
            taken = False
            for before in range(k):
                taken = taken or ids[before] == e
            if not taken and (best < 0 or probabilities[e] > probabilities[best]):
                best = e
        ids[k], weights[k] = best, probabilities[best]
        chosen += probabilities[best]
    for k in range(top_k):
        if normalise:
            weights[k] /= max(chosen, SMALLEST_SUM)
        weights[k] *= np.float32(scale)
        smaller = 0
        for other in range(top_k):
            smaller += ids[other] < ids[k]
        order[smaller] = k


@kernel
def sort_pairs(ids: Any, first: Any, tokens: Any, slots: Any) -> None:
    """List the pairs of ids (n_tokens, top_k) by expert, tokens ascending.

    Expert e has pairs first[e] to first[e + 1] of tokens and slots (n_tokens * top_k,); slot = token * top_k + k.
    """
    n_tokens, top_k = ids.shape
    n_expert = len(first) - 1
    first[:] = 0
    for t in range(n_tokens):
        for k in range(top_k):
            first[ids[t, k] + 1] += 1
    for e in range(n_expert):
        first[e + 1] += first[e]
    for t in range(n_tokens):
        for k in range(top_k):
            expert = ids[t, k]
            at = first[expert]
            tokens[at], slots[at] = t, t * top_k + k
            first[expert] += 1
    for e in range(n_expert, 0, -1):
        first[e] = first[e - 1]
    first[0] = 0


# ---- the same in NumPy -----------------------------------------------------------------------------------------------
def choose_reference(scores: Floats, config: RouterConfig) -> Routes:
    """The routes of tokens with these scores (n_tokens, n_expert)."""
    if config.gating == "softmax":
        shares = reference.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= np.add.accumulate(shares, axis=1, dtype=np.float32)[:, -1:]
    else:
        shares = reference.sigmoid(scores)
    ids = np.argsort(-shares, axis=1, kind="stable")[:, : config.top_k]
    weights = np.take_along_axis(shares, ids, axis=1)
    if config.normalise:
        weights /= np.maximum(np.add.accumulate(weights, axis=1, dtype=np.float32)[:, -1:], SMALLEST_SUM)
    weights *= np.float32(config.scale)
    return Routes(ids, weights, np.argsort(ids, axis=1))


def pairs_reference(ids: Ids, n_expert: int) -> tuple[Ids, Ids, Ids]:
    """first (n_expert + 1,), tokens and slots (n_tokens * top_k,): the pairs of ids (n_tokens, top_k) by expert."""
    slots = np.argsort(ids.reshape(-1), kind="stable")
    first = np.searchsorted(ids.reshape(-1)[slots], np.arange(n_expert + 1))
    return first, slots // ids.shape[1], slots
