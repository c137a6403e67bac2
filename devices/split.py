"""A device of two parts: attention, routing and head on one, routed experts on another, or both on the same.

A part says what it computes; the order of things, and what the engine sees of a step, is here. Rows pass between parts
as the device has them: as an array, or as something whose `read` copies them to the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgert.devices.base import READY, Cache, ExpertGroup, ExpertWeights, LayerWeights, Linear, Norm, Routed, Table
from edgert.devices.routing import pairs_reference
from edgert.quant.formats import Format, PackedPart
from edgert.types import Floats, Ids, ModelConfig, Routes


class AttentionPart(Protocol):
    """All of a model but its routed experts. Methods not described here are those of devices.base.Device."""

    name: str
    chunk: int
    settings: Sequence[Any]  # how its sessions are made, if it has any

    def kernels(
        self, formats: Iterable[Format], kv_type: str, activations: str, config: ModelConfig | None = None
    ) -> list[tuple[Any, int]]: ...
    def add_layer(self, weights: LayerWeights) -> None: ...
    def set_head(self, norm: Norm, output: Linear) -> None: ...
    def new_cache(self, n_context: int, kv_type: str) -> Cache: ...
    def begin(self, embeddings: Floats) -> None: ...

    def attend(self, layer: int, cache: Any, start: int, n_ahead: int) -> Routes | None:
        """Run a layer up to its experts; the routes of its tokens, valid until the next, or None without experts."""

    def inputs(self) -> Any:
        """What the experts of that layer are given, (n_tokens, d_model)."""

    def look_ahead(self, layer: int) -> list[Floats]:
        """What the routers of n_ahead next layers made of the last token's state in that layer, each (n_expert,)."""

    def take(self, total: Any) -> None:
        """Take the weighted sum (n_tokens, d_model) of that layer's experts, to be added to the residual stream."""

    def state(self) -> Floats:
        """A copy of the residual stream (n_tokens, d_model); whether a layer's shared expert is in it before `take`
        is the part's affair."""

    def head(self, first_row: int = 0) -> Floats: ...
    def close(self) -> None: ...


class ExpertPart(Protocol):
    """Routed experts. Methods not described here are those of devices.base.Device."""

    name: str
    settings: Sequence[Any]
    layer: int  # whose experts are packed, or run, at the moment

    def kernels(
        self, formats: Iterable[Format], kv_type: str, activations: str, config: ModelConfig | None = None
    ) -> list[tuple[Any, int]]: ...
    def new_table(self, n_expert: int) -> Table: ...
    def pack_expert(self, weights: ExpertWeights) -> Any: ...
    def place_expert(
        self, table: Table, expert: int, parts: tuple[PackedPart, ...], record: npt.NDArray[np.uint8]
    ) -> None: ...

    def start(self, table: Table, inputs: Any, routed: Routed) -> None:
        """Begin a layer: rows (n_tokens, d_model), and which experts they go to."""

    def experts(self, group: ExpertGroup) -> None: ...
    def hidden(self) -> Floats: ...

    def total(self) -> Any:
        """The weighted sum (n_tokens, d_model) of what the layer's experts made, once all were run."""

    def close(self) -> None: ...


def on_host(rows: Any) -> Floats:
    """Rows that a part handed out, as an array."""
    found: Floats = rows if isinstance(rows, np.ndarray) else rows.read()
    return found


@dataclass
class Seen:
    """What a layer made of a step's rows, (n_tokens, d_model) each. before and after: the residual stream, the second
    without what routed experts add; inputs, routes and total, what they add, are None where there are none."""

    before: Floats
    after: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    inputs: Floats | None = None
    routes: Routes | None = None
    total: Floats | None = None


class SplitDevice:
    """Device made of parts; see devices.base.Device."""

    def __init__(self, config: ModelConfig, attention: AttentionPart, experts: ExpertPart) -> None:
        self.config, self._attention, self._experts = config, attention, experts
        same = attention.name == experts.name
        self.name = attention.name if same else f"attention={attention.name},experts={experts.name}"
        self.settings = [*attention.settings, *experts.settings]  # of the sessions, where there are any
        self.chunk, self.n_used, self._n_layers = attention.chunk, 0, 0
        self.witness: list[Seen] | None = None  # where to note what the layers of a step make, if anybody wants it
        self.set_head, self.new_cache = attention.set_head, attention.new_cache
        self.new_table, self.pack_expert = experts.new_table, experts.pack_expert
        self.place_expert, self.head = experts.place_expert, attention.head

    def kernels(
        self, formats: Iterable[Format], kv_type: str, activations: str, config: ModelConfig | None = None
    ) -> list[tuple[Any, int]]:
        """What the parts need compiled."""
        known, found = list(formats), dict[int, tuple[Any, int]]()
        for part in (self._attention, self._experts):
            found |= {id(kernel): (kernel, n) for kernel, n in part.kernels(known, kv_type, activations, config)}
        return list(found.values())

    def add_layer(self, weights: LayerWeights) -> None:
        """Take the hot weights of the next layer; the experts that are packed from now on are its own."""
        self._attention.add_layer(weights)
        self._experts.layer, self._n_layers = self._n_layers, self._n_layers + 1

    def begin(self, embeddings: Floats) -> None:
        """Make `embeddings` the residual stream of a chunk."""
        assert 0 < len(embeddings) <= self.chunk, len(embeddings)
        self._attention.begin(embeddings)
        self._chosen: dict[int, tuple[Ids, Floats]] = {}
        self._ahead: dict[int, list[Floats]] = {}
        self.n_used = 0

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
        """Layers from `first` on, up to one that lacks an expert; see devices.base.Device."""
        for layer in range(first, self.config.n_layers):
            seen = None if self.witness is None else Seen(self._attention.state())
            routes = self._attention.attend(layer, cache, start, n_ahead)
            if self.witness is not None and seen is not None:
                seen.after = self._attention.state()
                self.witness.append(seen)
            if routes is None:
                continue
            if seen is not None:
                seen.inputs = on_host(self._attention.inputs()).copy()
                seen.routes = Routes(routes.ids.copy(), routes.weights.copy(), routes.order)
            table = tables[layer]
            assert table is not None, f"layer {layer} has routes but no experts"
            self._routed = Routed(routes, *pairs_reference(routes.ids, len(table)))
            used = np.flatnonzero(self._routed.first[1:] > self._routed.first[:-1])
            self._chosen[layer] = routes.ids.copy(), routes.weights.copy()
            self.n_used += len(used)
            if n_ahead:
                self._ahead[layer] = self._attention.look_ahead(layer)
            self._experts.layer = layer
            self._experts.start(table, self._attention.inputs(), self._routed)
            if every_layer or (states is not None and (states[used + layer * len(table)] != READY).any()):
                return layer
            self.experts(layer, ExpertGroup(used))
            self.combine(layer)
        return self.config.n_layers

    def routed(self, layer: int) -> Routed:
        """The routes of the layer that run_layers stopped at."""
        return self._routed

    def chosen(self, layer: int) -> tuple[Ids, Floats]:
        """Ids and weights of a layer that the step has run through."""
        assert self.config.router is not None
        shape = len(self._attention.state()), self.config.router.top_k
        return self._chosen.get(layer, (np.zeros(shape, np.int64), np.zeros(shape, np.float32)))

    def ahead(self, layer: int) -> list[Floats]:
        """What the routers of the next layers made of a layer's state."""
        return self._ahead.get(layer, [])

    def inputs(self, layer: int) -> Floats:
        """What the experts of the layer that was stopped at are given, (n_tokens, d_model)."""
        return on_host(self._attention.inputs())

    def hidden(self, layer: int) -> Floats:
        """What down takes of each pair, (n_pairs, d_expert)."""
        return self._experts.hidden()

    def experts(self, layer: int, group: ExpertGroup) -> None:
        """Run a group of experts of the layer that was stopped at."""
        self._experts.experts(group)

    def combine(self, layer: int) -> None:
        """Add the weighted expert outputs, and the shared one, to the residual stream."""
        total = self._experts.total()
        if self.witness is not None:
            self.witness[-1].total = on_host(total).copy()
        self._attention.take(total)

    def state(self) -> Floats:
        """A copy of the residual stream, (n_tokens, d_model)."""
        return self._attention.state()

    def close(self) -> None:
        """Give back threads and memory."""
        self._attention.close()
        self._experts.close()
