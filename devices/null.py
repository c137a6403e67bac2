"""The null device: no arithmetic, any model size. It counts calls and bytes, so that scheduling can be tested alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from edgert.devices.base import CHUNK, ExpertGroup, ExpertWeights, LayerWeights, Linear, Table
from edgert.quant.formats import Format
from edgert.types import Floats, ModelConfig, Routes


class NullCache:
    """A cache that holds nothing."""

    def __init__(self, n_context: int) -> None:
        self.n_context, self.n_bytes = n_context, 0


class NullDevice:
    """Device that computes nothing; router scores come from a seeded generator, logits are zero.

    `calls` counts the calls of each method, `expert_calls` how often each (layer, token, slot) pair was computed.
    """

    name = "null"

    def __init__(self, config: ModelConfig, n_context: int, *, seed: int = 0) -> None:
        self.config, self.n_context = config, n_context
        self.calls: Counter[str] = Counter()
        self.expert_bytes = 0
        self.pairs: list[list[int]] = []  # slots computed since the last attend, group by group
        self._random = np.random.default_rng(seed)
        self._n_tokens = 0

    @staticmethod
    def kernels(formats: Iterable[Format], kv_type: str, activations: str) -> list[tuple[Any, int]]:
        """Nothing is compiled."""
        return []

    def add_layer(self, weights: LayerWeights) -> None:
        """Count it."""
        self.calls["add_layer"] += 1

    def set_head(self, norm: Floats, output: Linear) -> None:
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

    def begin(self, embeddings: Floats) -> None:
        """Note the number of tokens."""
        assert 0 < len(embeddings) <= CHUNK
        self._n_tokens = len(embeddings)

    def run_layers(self, tables: Sequence[Table | None], cache: Any, start: int) -> None:
        """Not here: layer by layer is what this device is for."""

    def attend(self, layer: int, cache: Any, start: int) -> Floats | None:
        """Random router scores."""
        self.calls["attend"] += 1
        self.pairs = []
        if self.config.router is None:
            return None
        return self._random.standard_normal((self._n_tokens, self.config.router.n_expert), dtype=np.float32)

    def experts(self, layer: int, group: ExpertGroup | None, *, with_shared: bool) -> None:
        """Count the group's bytes and note its pairs."""
        self.calls["experts"] += 1
        if group is not None:
            self.expert_bytes += int(np.sum(group.experts))
            self.pairs.append(group.slots.tolist())

    def combine(self, layer: int, routes: Routes | None) -> None:
        """Check that the groups covered every pair once."""
        self.calls["combine"] += 1
        n_pairs = 0 if routes is None else routes.ids.size
        assert sorted(slot for group in self.pairs for slot in group) == list(range(n_pairs)), self.pairs

    def head(self, first_row: int = 0) -> Floats:
        """Zeros."""
        self.calls["head"] += 1
        return np.zeros((self._n_tokens - first_row, self.config.n_vocab), np.float32)

    def close(self) -> None:
        """Count it."""
        self.calls["close"] += 1
