"""The null device: no arithmetic, any model size. It counts calls and bytes, so that scheduling can be tested alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.devices.base import APART, CHUNK, ExpertGroup, ExpertWeights, LayerWeights, Linear, Norm, Routed, Table
from edgert.devices.routing import choose_reference, pairs_reference
from edgert.devices.states import WithoutStates
from edgert.quant.formats import Format, PackedPart
from edgert.types import Floats, Ids, ModelConfig


class NullCache(WithoutStates):
    """A cache that holds nothing."""

    def __init__(self, n_context: int) -> None:
        self.n_context, self.n_bytes = n_context, 0


class NullDevice:
    """Device that computes nothing; router scores come from a seeded generator, logits are zero.

    `calls` counts the calls of each method, `expert_bytes` the bytes of the experts that were computed.
    """

    name = "null"

    def __init__(self, config: ModelConfig, n_context: int, *, seed: int = 0, chunk: int = CHUNK) -> None:
        self.config, self.n_context, self.chunk = config, n_context, chunk
        self.calls: Counter[str] = Counter()
        self.expert_bytes = 0
        self.pairs: list[list[int]] = []  # slots computed in the layer in hand, expert by expert
        self._random = np.random.default_rng(seed)
        self._n_tokens = 0

    @staticmethod
    def kernels(
        formats: Iterable[Format], kv_type: str, activations: str, config: ModelConfig | None = None
    ) -> list[tuple[Any, int]]:
        """Nothing is compiled."""
        return []

    def add_layer(self, weights: LayerWeights) -> None:
        """Count it."""
        self.calls["add_layer"] += 1

    def set_head(self, norm: Norm, output: Linear) -> None:
        """Count it."""
        self.calls["set_head"] += 1

    def new_table(self, n_expert: int) -> Table:
        """Bytes of each expert."""
        return np.zeros(n_expert, np.int64)

    def pack_expert(self, weights: ExpertWeights) -> int:
        """The expert's size in bytes."""
        parts = (weights.gate, weights.up, weights.down)
        return sum(part.format.matrix_bytes(*part.shape) for part in parts)

    def new_cache(self, n_context: int, kv_type: str) -> NullCache:
        """A cache that holds nothing."""
        return NullCache(n_context)

    def place_expert(
        self, table: Table, expert: int, parts: tuple[PackedPart, ...], record: npt.NDArray[np.uint8]
    ) -> None:
        """The record's size in bytes."""
        table[expert] = len(record)

    def begin(self, embeddings: Floats) -> None:
        """Note the number of tokens."""
        assert 0 < len(embeddings) <= self.chunk
        self._n_tokens, self.n_used = len(embeddings), 0
        self._routed: dict[int, Routed] = {}

    def run_layers(
        self,
        tables: Sequence[Table | None],
        states: npt.NDArray[np.uint8] | None,
        cache: Any,
        start: int,
        first: int,
        *,
        every_layer: bool = False,
        n_ahead: int = 0,
    ) -> int:
        """Stops at the first layer, with routes of random scores."""
        self.calls["run_layers"] += 1
        router = self.config.router
        if router is None or first == self.config.n_layers:
            return self.config.n_layers
        shape = self._n_tokens, router.n_expert
        routes = choose_reference(self._random.standard_normal(shape, dtype=np.float32), router)
        self._routed[first] = Routed(routes, *pairs_reference(routes.ids, router.n_expert))
        self.n_used += len(np.unique(routes.ids))
        self.pairs, self._tables = [], tables
        return first

    def routed(self, layer: int) -> Routed:
        """The routes of the layer."""
        return self._routed[layer]

    def chosen(self, layer: int) -> tuple[Ids, Floats]:
        """Ids and weights of a layer that the step has run through."""
        return self._routed[layer].routes.ids, self._routed[layer].routes.weights

    def ahead(self, layer: int) -> list[Floats]:
        """Nothing is computed."""
        return []

    def inputs(self, layer: int) -> Floats:
        """Zeros."""
        return np.zeros((self._n_tokens, self.config.d_model), np.float32)

    def hidden(self, layer: int) -> Floats:
        """Zeros."""
        return np.zeros((self._routed[layer].slots.size, self.config.d_expert), np.float32)

    def experts(self, layer: int, group: ExpertGroup) -> None:
        """Count the group's bytes and note its pairs."""
        self.calls["experts"] += 1
        if group.phases & 2:
            table, routed = self._tables[layer], self._routed[layer]
            assert table is not None
            self.expert_bytes += int(table[group.ids].sum())
            for expert in group.ids.tolist():
                self.pairs.append(routed.slots[routed.first[expert] : routed.first[expert + 1]].tolist())

    def combine(self, layer: int) -> None:
        """Check that the groups covered every pair once, and beyond APART tokens in ascending id."""
        self.calls["combine"] += 1
        slots = [slot for pairs in self.pairs for slot in pairs]
        assert sorted(slots) == list(range(self._routed[layer].routes.ids.size)), self.pairs
        assert self._n_tokens <= APART or slots == self._routed[layer].slots.tolist(), "out of order"

    def head(self, first_row: int = 0) -> Floats:
        """Zeros."""
        self.calls["head"] += 1
        return np.zeros((self._n_tokens - first_row, self.config.n_vocab), np.float32)

    def close(self) -> None:
        """Count it."""
        self.calls["close"] += 1
