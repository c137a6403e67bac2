"""The router's choice: from scores to expert ids and weights, compiled, the same on every device."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.devices import routing
from edgert.quant import reference
from edgert.quant.jit import JIT_ENABLED
from edgert.types import Floats, RouterConfig, Routes


class Router:
    """Chooses experts for the tokens of one layer. Not thread-safe: its work space is its own."""

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self._probabilities = np.zeros(config.n_expert, np.float32)

    def choose(self, scores: Floats) -> Routes:
        """Routes for scores (n_tokens, n_expert or more columns of padding)."""
        shape = scores.shape[0], self.config.top_k
        routes = Routes(np.empty(shape, np.int64), np.empty(shape, np.float32), np.empty(shape, np.int64))
        fill = routing.choose if JIT_ENABLED else choose_reference
        fill(
            scores,
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
    softmax: bool,
    normalise: bool,
    scale: float,
    probabilities: Floats,
    ids: Any,
    weights: Any,
    order: Any,
) -> None:
    """The same in NumPy."""
    scores = scores[:, : len(probabilities)]
    if softmax:
        shares = reference.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= np.add.accumulate(shares, axis=1, dtype=np.float32)[:, -1:]
    else:
        shares = reference.sigmoid(scores)
    ids[:] = np.argsort(-shares, axis=1, kind="stable")[:, : ids.shape[1]]
    weights[:] = np.take_along_axis(shares, ids, axis=1)
    if normalise:
        weights /= np.maximum(np.add.accumulate(weights, axis=1, dtype=np.float32)[:, -1:], routing.SMALLEST_SUM)
    weights *= np.float32(scale)
    order[:] = np.argsort(ids, axis=1)
