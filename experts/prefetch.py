"""Reading experts before they are asked for: which to try, and what became of those that were.

Keys are `layer * n_expert + expert`. The residency asks at each layer of a token and does the reading; whether it pays
is the controller's word. While that is off nothing here is called and nothing learnt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from edgert.devices.base import ABSENT, READING, READY
from edgert.experts.predictors import AHEAD, DEFAULT, Combined, Primed, prepare
from edgert.experts.prefetch_control import Controller
from edgert.types import Floats, Ids

_LEAST_CHANCE = 0.05


class Prefetcher:
    """Guesses the experts of the next layers. At each layer of one token, in this order: settle, routed, choose.

    record_bytes: (n_layers, n_expert), 0 where a layer has no experts.
    """

    def __init__(
        self,
        top_k: int,
        record_bytes: Ids,
        controller: Controller,
        predictors: Sequence[str] = DEFAULT,
        primed: Primed | None = None,
    ) -> None:
        self._n_layers, self._n_expert = record_bytes.shape
        self._top_k = top_k
        self._sizes = record_bytes.reshape(-1)
        self._has_experts: npt.NDArray[np.bool_] = np.array([sizes.any() for sizes in record_bytes])
        self._keys, self._chances = np.zeros(2 * AHEAD * top_k, np.int64), np.zeros(2 * AHEAD * top_k, np.float32)
        prepare()
        self._combined = Combined(self._n_layers, self._n_expert, top_k, predictors, primed)
        self._asked: list[list[int]] = [[] for _ in range(self._n_layers)]  # keys read ahead, by layer
        self._ahead_bytes = 0
        self.controller = controller

    def decide_by(self, controller: Controller) -> None:
        """Let another controller decide from now on; what was read ahead for the last one is booked by nobody."""
        self.controller = controller
        for asked in self._asked:
            asked.clear()

    @property
    def enabled(self) -> bool:
        """The controller's present word; changes between tokens only."""
        return self.controller.enabled

    @property
    def n_ahead(self) -> int:
        """How many layers' router scores `routed` wants."""
        return AHEAD if self.enabled else 0

    def settle(self, layer: int, ids: Ids, state: npt.NDArray[np.uint8]) -> list[int]:
        """Book what became of a layer's reads, now that its routes are known; returns keys whose reads to cancel.

        ids: experts of the layer that are needed, any shape. state: (n_layers * n_expert,) of ABSENT, READING, READY.
        To be called for every layer that was read ahead for, also when the controller has turned off since.
        """
        asked = self._asked[layer]
        if not asked:
            return []
        needed, outcome, stale = set((ids + layer * self._n_expert).reshape(-1).tolist()), self.controller.outcome, []
        for key in asked:
            size, at = int(self._sizes[key]), state[key]
            if at == ABSENT:
                outcome("evicted", size)
            elif key in needed:
                outcome("useful" if at == READY else "late", size)
            else:
                outcome("wasted", size)
                if at == READING:
                    stale.append(key)
        asked.clear()
        return stale

    def routed(self, layer: int, ids: Ids, lookahead: Sequence[Floats]) -> None:
        """Learn the routes ids (n_tokens, top_k) of a layer.

        lookahead[d]: scores (n_expert or more,) by the router of layer + 1 + d, given this layer's hidden state of the
        last token; may be empty.
        """
        self._combined.routed(layer, ids, lookahead)

    def guesses(self, layer: int, state: npt.NDArray[np.uint8]) -> list[tuple[int, float]]:
        """(key, probability) of absent experts of the layers after `layer`, nearer layers first, then the likelier.

        The layers after the last are the next token's first.
        """
        n = self._combined.list_absent(layer, state, self._has_experts, _LEAST_CHANCE, self._keys, self._chances)
        return list(zip(self._keys[:n].tolist(), self._chances[:n].tolist(), strict=True))

    def choose(self, layer: int, state: npt.NDArray[np.uint8], urgent: bool, ahead_bytes: int) -> Iterator[int]:
        """Keys to read now, best first; the caller confirms each with submitted(), or stops.

        urgent: whether reads for this layer are under way. ahead_bytes: of those for later ones.
        """
        self._ahead_bytes = ahead_bytes
        full = 0  # the layer for which nothing more is accepted: its other guesses are less likely
        for key, chance in self.guesses(layer, state):
            distance = (key // self._n_expert - layer) % self._n_layers or self._n_layers
            if distance == full or state[key] != ABSENT:  # it may have been read since
                continue
            if self.controller.accepts(int(self._sizes[key]), chance, distance, urgent, self._ahead_bytes):
                yield key
            else:
                full = distance

    def submitted(self, key: int) -> None:
        """The read of a chosen key has been asked for."""
        size = int(self._sizes[key])
        self._ahead_bytes += size
        self._asked[key // self._n_expert].append(key)
