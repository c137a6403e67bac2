"""Compiled routing: from router scores to experts, weights and the list of (token, expert) pairs, expert by expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.quant import reference
from edgert.quant.functions import exp, sigmoid
from edgert.quant.jit import inner, kernel
from edgert.quant.records import at, record
from edgert.quant.simd import first_lane, splat
from edgert.quant.simd_memory import load_float
from edgert.types import Floats, Ids, RouterConfig, Routes

SMALLEST_SUM = np.float32(6.103515625e-5)  # normalisation divides by no less (the smallest normal half float)


# How experts are chosen, as RouterConfig says it: flags, numbers of groups, and the weights' scale.
ROUTER = record("softmax normalise late n_groups n_groups_used", floats="scale")


def router_record(config: RouterConfig) -> npt.NDArray[Any]:
    """ROUTER (1,)."""
    fields = (config.gating == "softmax", config.normalise, config.late, config.n_groups, config.n_groups_used)
    return np.array([(*fields, config.scale)], ROUTER)


@inner
def _gate(scores: Any, softmax: bool, out: Any) -> None:
    """Probabilities of some scores into `out`, which may be the same."""
    n = len(out)
    if not softmax:
        for i in range(n):
            out[i] = first_lane(sigmoid(splat(scores[i])))
        return
    largest, total = np.float32(-np.inf), np.float32(0)
    for i in range(n):
        largest = max(largest, scores[i])
    for i in range(n):
        out[i] = first_lane(exp(splat(scores[i] - largest)))
        total += out[i]
    for i in range(n):
        out[i] /= total


@inner
def _keep_groups(choices: Any, n_groups: int, n_used: int, totals: Any) -> None:
    """Give experts outside of the best groups no chance. totals (n_groups or more,): work space."""
    size = len(choices) // n_groups
    for group in range(n_groups):
        first, second = np.float32(-np.inf), np.float32(-np.inf)
        for e in range(group * size, (group + 1) * size):
            if choices[e] > first:
                first, second = choices[e], first
            elif choices[e] > second:
                second = choices[e]
        totals[group] = first + second if size > 1 else first
    for group in range(n_groups):
        better = 0
        for other in range(n_groups):
            better += totals[other] > totals[group] or (totals[other] == totals[group] and other < group)
        if better >= n_used:
            for e in range(group * size, (group + 1) * size):
                choices[e] = np.float32(-np.inf)


@inner
def choose_row(scores: Any, router: int, bias: int, work: Any, ids: Any, weights: Any, order: Any) -> None:
    """Fill ids, weights and order (top_k,) of one token from its scores (n_expert or more,).

    router: address of ROUTER; bias: of n_expert floats that count for the choice alone, or 0. work (3 n_expert,) is
    work space. Equal scores go to the lower id; order lists the choices by ascending id.
    """
    r, n_expert, top_k = at(router, ROUTER), len(work) // 3, len(ids)
    probabilities, choices = work[:n_expert], work[n_expert : 2 * n_expert]
    if r.late:
        for e in range(n_expert):
            probabilities[e] = scores[e]
    else:
        _gate(scores, r.softmax != 0, probabilities)
    for e in range(n_expert):
        choices[e] = probabilities[e]
        if bias:
            choices[e] += load_float(bias + 4 * e)
    if r.n_groups > 1:
        _keep_groups(choices, r.n_groups, r.n_groups_used, work[2 * n_expert :])
    for k in range(top_k):
        best = -1
        for e in range(n_expert):
            taken = False
            for before in range(k):
                taken = taken or ids[before] == e
            if not taken and (best < 0 or choices[e] > choices[best]):
                best = e
        ids[k], weights[k] = best, probabilities[best]
    if r.late:
        _gate(weights, r.softmax != 0, weights)
    chosen = np.float32(0)
    for k in range(top_k):
        chosen += weights[k]
    for k in range(top_k):
        if r.normalise:
            weights[k] /= max(chosen, SMALLEST_SUM)
        weights[k] *= np.float32(r.scale)
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
def choose_reference(scores: Floats, config: RouterConfig, bias: Floats | None = None) -> Routes:
    """The routes of tokens with these scores (n_tokens, n_expert). bias (n_expert,): for the choice alone."""
    shares = scores if config.late else _gate_reference(scores, config)
    choice = shares if bias is None else shares + bias
    if config.n_groups > 1:
        groups = choice.reshape(len(choice), config.n_groups, -1)  # (n_tokens, n_groups, experts)
        best = np.sort(groups, axis=2)[:, :, : -3 if groups.shape[2] > 2 else None : -1]
        totals = np.add.accumulate(best, axis=2, dtype=np.float32)[:, :, -1]
        kept = np.argsort(-totals, axis=1, kind="stable")[:, : config.n_groups_used]
        inside = (kept[:, :, None] == np.arange(config.n_groups)).any(axis=1)[:, :, None]
        choice = np.where(inside, groups, -np.inf).reshape(choice.shape)
    ids = np.argsort(-choice, axis=1, kind="stable")[:, : config.top_k]
    weights = np.take_along_axis(shares, ids, axis=1)
    if config.late:
        weights = _gate_reference(weights, config)
    if config.normalise:
        weights /= np.maximum(np.add.accumulate(weights, axis=1, dtype=np.float32)[:, -1:], SMALLEST_SUM)
    weights *= np.float32(config.scale)
    return Routes(ids, weights, np.argsort(ids, axis=1))


def _gate_reference(scores: Floats, config: RouterConfig) -> Floats:
    """Probabilities of scores, row by row."""
    if config.gating == "sigmoid":
        return reference.sigmoid(scores)
    shares = reference.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= np.add.accumulate(shares, axis=1, dtype=np.float32)[:, -1:]
    return shares


def pairs_reference(ids: Ids, n_expert: int) -> tuple[Ids, Ids, Ids]:
    """first (n_expert + 1,), tokens and slots (n_tokens * top_k,): the pairs of ids (n_tokens, top_k) by expert."""
    slots = np.argsort(ids.reshape(-1), kind="stable")
    first = np.searchsorted(ids.reshape(-1)[slots], np.arange(n_expert + 1))
    return first, slots // ids.shape[1], slots
