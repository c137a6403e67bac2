"""Rings of blocks of keys and values, for layers that see only the last positions: what is further back is given up.

Block number b lies at b modulo the ring's length. A ring holds all that a step needs; older blocks are written over, so
that a text cannot always go back: as states do (see states.py), it goes back to a position whose blocks were kept.
Knows blocks as bytes, not what is in them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgert.types import LayerConfig

BLOCK = 64  # positions; attention_blocks.BLOCK is the same number
KEPT = 2  # earlier positions that are kept: see Engine.prompt

Blocks = npt.NDArray[np.uint8]


class Length(NamedTuple):
    """How many blocks a layer keeps of each head: of keys and values, and aside for each position that is kept."""

    n_blocks: int
    n_kept: int  # 0: it has room for all positions, and nothing need be kept


def reach_of(layer: LayerConfig) -> int:
    """The most positions that a token attends to, its own the last; 0: all."""
    return min((n for n in (layer.window, layer.span) if n), default=0)


def length_of(layer: LayerConfig, n_context: int, chunk: int | None) -> Length:
    """How much a layer keeps of n_context positions where a step has at most `chunk` tokens; None: all.

    All of them too where a ring, with what is kept aside, would be no shorter.
    """
    whole, reach = -(-n_context // BLOCK), reach_of(layer)
    if reach and chunk is not None:
        ring = Length(_touched(reach - 1 + chunk), _touched(reach - 1))
        if ring.n_blocks + KEPT * ring.n_kept < whole:
            return ring
    return Length(whole, 0)


def _touched(n: int) -> int:
    """The most blocks that n positions in a row lie in, and at least one."""
    return (n + BLOCK - 2) // BLOCK + 1


class Ring(NamedTuple):
    """One layer's: positions that a token attends to, blocks (n_kv_heads, n_blocks, block_bytes), and those aside
    (KEPT, n_kv_heads, n_kept, block_bytes)."""

    reach: int
    blocks: Blocks
    kept: Blocks

    def runs(self, position: int) -> Iterator[tuple[slice, slice]]:
        """Where the blocks lie that a token at `position` sees before itself: in the ring, and in what is kept."""
        first, end = max(0, position - self.reach + 1) // BLOCK, -(-position // BLOCK)
        length, block = self.blocks.shape[1], first
        while block < end:
            place, n = block % length, min(end - block, length - block % length)
            yield slice(place, place + n), slice(block - first, block - first + n)
            block += n


class Rings:
    """The rings of one sequence. `back`: from here on any position can be come back to, and so can 0."""

    def __init__(self, rings: Sequence[Ring] = ()) -> None:
        self._rings = rings
        self._lengths = {(ring.reach, ring.blocks.shape[1]) for ring in rings}
        self.back = 0

    def __bool__(self) -> bool:
        return bool(self._rings)

    def write(self, end: int) -> None:
        """Positions up to `end` are written; where their blocks lie, others were before."""
        for reach, length in self._lengths:
            first = (end - 1) // BLOCK + 1 - length  # block that is still there
            if first > 0:
                self.back = max(self.back, first * BLOCK + reach - 1)

    def keep(self, place: int, position: int) -> None:
        """Copy what tokens from `position` on see before it; from `back` on it is there."""
        for ring in self._rings:
            for here, aside in ring.runs(position):
                ring.kept[place, :, aside] = ring.blocks[:, here]

    def restore(self, place: int, position: int) -> None:
        """Copy back what keep() has copied. Broken off, only restore() and clear() make the rings good again."""
        self.back = sys.maxsize
        for ring in self._rings:
            for here, aside in ring.runs(position):
                ring.blocks[:, here] = ring.kept[place, :, aside]
        self.back = position

    def clear(self) -> None:
        """Begin a text anew."""
        self.back = 0
