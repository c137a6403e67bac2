"""Routed experts in two places: in a GPU's own memory as many as fit, and on the CPU all others; both work at a time.

Where an expert is, is settled before it is packed, and answers depend on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.devices.base import ExpertGroup, ExpertWeights, Routed, Table
from edgert.devices.split import ExpertPart, on_host
from edgert.errors import OptionError
from edgert.quant.formats import Format, PackedPart
from edgert.types import Floats, Ids, ModelConfig


@dataclass(eq=False)
class _Expert:
    """A row of one of the two parts' tables."""

    hot: bool
    row: Any


class HotExperts:
    """See devices.split.ExpertPart."""

    def __init__(self, config: ModelConfig, hot: ExpertPart, cold: ExpertPart, is_hot: npt.NDArray[np.bool_]) -> None:
        """is_hot: which experts (n_layers, n_expert) are the hot part's."""
        assert config.router is not None
        self._parts, self._hot_ones, self.layer = {True: hot, False: cold}, is_hot, 0
        self.name, self._config = hot.name, config
        self.settings: Sequence[Any] = [*hot.settings, *cold.settings]
        n_expert = config.router.n_expert
        self._tables = {which: part.new_table(n_expert) for which, part in self._parts.items()}
        self._pool = ThreadPoolExecutor(1, "edgert-hot")
        self._n_packed = 0  # of the layer

    def kernels(
        self, formats: Iterable[Format], kv_type: str, activations: str, config: ModelConfig | None = None
    ) -> list[tuple[Any, int]]:
        """What the cold part needs compiled."""
        return self._parts[False].kernels(formats, kv_type, activations, config)

    def new_table(self, n_expert: int) -> Table:
        """One _Expert per expert; those that are packed next are its rows, in ascending id."""
        self._n_packed = 0
        return np.empty(n_expert, object)

    def pack_expert(self, weights: ExpertWeights) -> _Expert:
        """The next expert of a layer, in its place."""
        hot = bool(self._hot_ones[self.layer, self._n_packed])
        self._n_packed += 1
        self._parts[hot].layer = self.layer
        return _Expert(hot, self._parts[hot].pack_expert(weights))

    def place_expert(
        self, table: Table, expert: int, parts: tuple[PackedPart, ...], record: npt.NDArray[np.uint8]
    ) -> None:
        """Refused: what comes from flash is gone again before a GPU's memory pays."""
        raise OptionError(
            f"device={self.name!r} keeps experts for good, and these come from flash: give more --memory, or split the "
            "model with --device attention=NAME,experts=cpu"
        )

    # ---- a layer -----------------------------------------------------------------------------------------------------
    def start(self, table: Table, inputs: Any, routed: Routed) -> None:
        """Begin a layer on both parts; to each, what the other's experts make weighs nothing."""
        used = np.flatnonzero(np.diff(routed.first))
        self._is_hot = np.zeros(len(table), np.bool_)
        for expert in used.tolist():
            self._is_hot[expert] = table[expert].hot
            self._tables[table[expert].hot][expert] = table[expert].row
        self._used = {which: used[self._is_hot[used] == which] for which in (True, False)}
        for which, part in self._parts.items():
            if not len(self._used[which]):
                continue
            own = np.where(self._is_hot[routed.routes.ids] == which, routed.routes.weights, np.float32(0))
            part.layer = self.layer
            rows = inputs if which else on_host(inputs)
            part.start(self._tables[which], rows, replace(routed, routes=replace(routed.routes, weights=own)))
        self._routed = routed

    def experts(self, group: ExpertGroup) -> None:
        """Run a group of experts, the hot ones beside the others."""
        hot, cold = (self._of(group.ids, which) for which in (True, False))
        running = self._pool.submit(self._parts[True].experts, replace(group, ids=hot)) if len(hot) else None
        if len(cold):
            self._parts[False].experts(replace(group, ids=cold))
        if running is not None:
            running.result()

    def _of(self, ids: Ids, which: bool) -> Ids:
        return ids[self._is_hot[ids] == which]

    def hidden(self) -> Floats:
        """What gate and up made of each pair, (n_pairs, d_expert)."""
        of_pair = np.repeat(self._is_hot, np.diff(self._routed.first))
        found = np.zeros((len(of_pair), self._config.d_expert), np.float32)
        for which, part in self._parts.items():
            if len(self._used[which]):
                found[of_pair == which] = part.hidden()[of_pair == which]
        return found

    def total(self) -> Any:
        """The weighted sum (n_tokens, d_model) of what both parts made."""
        totals = [part.total() for which, part in self._parts.items() if len(self._used[which])]
        return totals[0] if len(totals) == 1 else on_host(totals[0]) + on_host(totals[1])

    def close(self) -> None:
        """Give back threads and memory."""
        self._pool.shutdown()
        for part in self._parts.values():
            part.close()
