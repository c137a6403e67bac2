"""Which experts are in RAM, and how the engine gets at them.

`acquire` yields groups of experts that are ready to compute; together they cover every pair of the layer once. Here
every expert is resident and there is one group; edgert.experts.streamed has the one whose experts lie on flash.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgert.devices.base import Device, ExpertGroup, Routed, Table
from edgert.types import ExpertCounts


class Residency(Protocol):
    """Gives out experts, and counts what it does."""

    tables: Sequence[Table | None]  # of each layer

    @property
    def states(self) -> npt.NDArray[np.uint8] | None:
        """The state of each expert, (n_layers * n_expert,); None: all are READY for good."""

    @property
    def counts(self) -> ExpertCounts:
        """What was done so far."""

    @property
    def every_layer(self) -> bool:
        """Whether to be asked in every layer, not only where an expert is away."""

    @property
    def n_ahead(self) -> int:
        """How many layers' routers shall look ahead."""

    def between_requests(self) -> None:
        """An answer begins: nobody waits, so this is the time to change what is held."""

    def begin(self, n_tokens: int) -> None:
        """A step of n_tokens begins; what an earlier one left that failed is cleared away."""

    def acquire(self, layer: int, routed: Routed) -> Iterator[ExpertGroup]:
        """Groups of experts that cover all routes, released when the next one is asked for."""

    def finish(self) -> None:
        """The step is done."""

    def check(self) -> list[str]:
        """What is wrong, one line each; empty if nothing is."""


class AllResident:
    """Every expert of every layer is in RAM."""

    every_layer, n_ahead, states = False, 0, None

    def __init__(self, device: Device, tables: Sequence[Table | None]) -> None:
        self.tables: Sequence[Table | None] = tables
        self._device, self._hits = device, 0

    @property
    def counts(self) -> ExpertCounts:
        """Hits alone."""
        return ExpertCounts(expert_hits=self._hits)

    def between_requests(self) -> None:
        """Nothing changes."""

    def begin(self, n_tokens: int) -> None:
        """Nothing is to be prepared."""

    def acquire(self, layer: int, routed: Routed) -> Iterator[ExpertGroup]:
        """One group: all experts that any token chose."""
        yield ExpertGroup(np.flatnonzero(routed.first[1:] > routed.first[:-1]))

    def finish(self) -> None:
        """Count what was used."""
        self._hits += self._device.n_used

    def check(self) -> list[str]:
        """Nothing can go wrong: no expert ever leaves."""
        return []
