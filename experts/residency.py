"""Which experts are in RAM, and how the engine gets at them.

`acquire` yields groups of experts that are ready to compute, with the (token, expert) pairs they serve; together the
groups cover every pair once, in any order. Here every expert is resident and there is one group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from edgert.devices import routing
from edgert.devices.base import ExpertGroup, Table
from edgert.types import Ids, Routes


class Residency(Protocol):
    """Gives out experts and counts: hits and misses in experts, bytes read from flash."""

    hits: int
    misses: int
    bytes_read: int
    tables: Sequence[Table | None] | None  # of each layer, if every expert is in RAM for good

    def acquire(self, layer: int, routes: Routes) -> Iterator[ExpertGroup]:
        """Groups of resident experts that cover all routes, released when the next one is asked for."""

    def check(self) -> list[str]:
        """What is wrong, one line each; empty if nothing is."""


def sort_pairs(routes: Routes, n_expert: int) -> tuple[Ids, Ids, Ids]:
    """first (n_expert + 1,), tokens and slots (n_tokens * top_k,): the pairs of `routes`, expert by expert."""
    n_pairs = routes.ids.size
    first, tokens, slots = np.empty(n_expert + 1, np.int64), np.empty(n_pairs, np.int64), np.empty(n_pairs, np.int64)
    routing.sort_pairs(routes.ids, first, tokens, slots)
    return first, tokens, slots


class AllResident:
    """Every expert of every layer is in RAM."""

    def __init__(self, tables: Sequence[Table | None]) -> None:
        self.tables: Sequence[Table | None] | None = tables
        self.hits, self.misses, self.bytes_read = 0, 0, 0

    def acquire(self, layer: int, routes: Routes) -> Iterator[ExpertGroup]:
        """One group: all experts that any token chose."""
        table = self.tables[layer] if self.tables else None
        assert table is not None, f"layer {layer} has no experts"
        first, tokens, slots = sort_pairs(routes, len(table))
        used = np.flatnonzero(first[1:] > first[:-1])
        self.hits += len(used)
        yield ExpertGroup(table[used], np.append(first[used], len(tokens)), tokens, slots)

    def check(self) -> list[str]:
        """Nothing can go wrong: no expert ever leaves."""
        return []
