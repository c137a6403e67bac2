"""The router's choice: from scores to expert ids and weights, compiled, the same on every device."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.quant import reference
from edgert.quant.functions import exp, sigmoid
from edgert.quant.jit import JIT_ENABLED, kernel
from edgert.quant.simd import first_lane, splat
from edgert.types import Floats, RouterConfig, Routes

SMALLEST_SUM = np.float32(6.103515625e-5)  # normalisation divides by no less (the smallest normal half float)


@kernel
def _choose(
    scores: Any,
    n_expert: int,
    softmax: bool,
    normalise: bool,
    scale: float,
    probabilities: Any,
    ids: Any,
    weights: Any,
    order: Any,
) -> None:
    """Fill ids, weights and order (n_tokens, top_k) from scores (n_tokens, at least n_expert)."""
    n_tokens, top_k = ids.shape
    for t in range(n_tokens):
        largest = np.float32(-np.inf)
        for e in range(n_expert):
            largest = max(largest, scores[t, e])
        total = np.float32(0)
        for e in range(n_expert):
            if softmax:
                probabilities[e] = first_lane(exp(splat(scores[t, e] - largest)))
                total += probabilities[e]
            else:
                probabilities[e] = first_lane(sigmoid(splat(scores[t, e])))
        if softmax:
            for e in range(n_expert):
                probabilities[e] /= total
        chosen = np.float32(0)
        for k in range(top_k):
            best = -1
            for e in range(n_expert):
                taken = False
                for before in range(k):
                    taken = taken or ids[t, before] == e
                if not taken and (best < 0 or probabilities[e] > probabilities[best]):
                    best = e
            ids[t, k], weights[t, k] = best, probabilities[best]
            chosen += probabilities[best]
        for k in range(top_k):
            if normalise:
                weights[t, k] /= max(chosen, SMALLEST_SUM)
            weights[t, k] *= np.float32(scale)
            smaller = 0
            for other in range(top_k):
                smaller += ids[t, other] < ids[t, k]
            order[t, smaller] = k


class Router:
    """Chooses experts for the tokens of one layer. Not thread-safe: its work space is its own."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self._probabilities = np.zeros(config.n_expert, np.float32)

    def choose(self, scores: Floats) -> Routes:
        """Routes for scores (n_tokens, n_expert or more columns of padding)."""
        shape = scores.shape[0], self.config.top_k
        routes = Routes(np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(shape, np.int64))
        fill = _choose if JIT_ENABLED else choose_reference
        fill(
            scores,
            self.config.n_expert,
            self.config.gating == "softmax",
            self.config.normalise,
            self.config.scale,
            self._probabilities,
            routes.ids,
            routes.weights,
            routes.order,
        )
        return routes


def choose_reference(
    scores: Floats,
    n_expert: int,
    softmax: bool,
    normalise: bool,
    scale: float,
    probabilities: Floats,
    ids: Any,
    weights: Any,
    order: Any,
) -> None:
    """The same in NumPy."""
    scores = scores[:, :n_expert]
    if softmax:
        shares = reference.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= np.add.accumulate(shares, axis=1, dtype=np.float32)[:, -1:]
    else:
        shares = reference.sigmoid(scores)
    ids[:] = np.argsort(-shares, axis=1, kind="stable")[:, : ids.shape[1]]
    weights[:] = np.take_along_axis(shares, ids, axis=1)
    if normalise:
        weights /= np.maximum(np.add.accumulate(weights, axis=1, dtype=np.float32)[:, -1:], SMALLEST_SUM)
    weights *= np.float32(scale)
    order[:] = np.argsort(ids, axis=1)
