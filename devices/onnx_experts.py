"""Routed experts through ONNX Runtime: a session for each expert that is in RAM, several of them at work at a time.

A session holds an expert's weights in the form that the provider multiplies fastest. Of an expert that lies in a record
it is made when the expert is first used, and dropped when another takes its record's place.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.devices.base import ExpertGroup, ExpertWeights, Routed, Table
from edgert.devices.onnx_graphs import expert_graph, sum_graph
from edgert.devices.onnx_runtime import Buffer, Call, Settings, View, session
from edgert.quant.formats import Format, PackedPart
from edgert.quant.unpacking import PackedMatrix
from edgert.types import Floats, ModelConfig


@dataclass(eq=False)
class _Expert:
    """A row of a table: where the weights lie, if they lie in a record, and the session that has them, if there is one."""

    parts: tuple[PackedPart, ...] = ()
    record: npt.NDArray[np.uint8] | None = None
    call: Call | None = None


class _Places:
    """Experts whose sessions were made from records, by the memory that these take."""

    def __init__(self) -> None:
        self._starts: list[int] = []  # ascending; no two overlap
        self._experts: list[_Expert] = []

    def add(self, expert: _Expert) -> None:
        assert expert.record is not None
        start = expert.record.ctypes.data
        at = bisect.bisect(self._starts, start)
        self._starts.insert(at, start)
        self._experts.insert(at, expert)

    def drop(self, record: npt.NDArray[np.uint8]) -> None:
        """Drop the sessions of experts whose records overlap this one."""
        start = record.__array_interface__["data"][0]
        first = max(bisect.bisect(self._starts, start) - 1, 0)
        last = bisect.bisect_left(self._starts, start + len(record))
        gone = []
        for at in range(first, last):
            own = self._experts[at].record
            assert own is not None
            if self._starts[at] + len(own) > start:
                gone.append(at)
        for at in reversed(gone):
            self._experts[at].call = None
            del self._starts[at], self._experts[at]


class OnnxExperts:
    """See devices.split.ExpertPart."""

    def __init__(self, config: ModelConfig, settings: Settings, *, chunk: int) -> None:
        c, memory = config, settings.provider.memory
        self.name, self._config, self._settings = settings.name, config, settings
        self._places = _Places()
        self._shared_threads = settings.threads if memory == "cpu" else 1  # experts that run side by side
        self._pool: ThreadPoolExecutor | None = None
        top_k = c.router.top_k if c.router else 0
        pairs = chunk * top_k
        self._tokens = Buffer((pairs,), np.int64)
        self._places_of, self._weights = Buffer((chunk, top_k), np.int64), Buffer((chunk, top_k), np.float32)
        self._hidden = Buffer((pairs, c.d_expert), np.float32)
        self._outputs, self._total = (Buffer((rows, c.d_model), np.float32, memory) for rows in (pairs, chunk))
        self._inputs = Buffer((chunk, c.d_model), np.float32)  # that come from elsewhere
        self._sum = Call(session(sum_graph(c), replace(settings, threads=1))) if c.router else None

    def kernels(self, formats: Iterable[Format], kv_type: str, activations: str) -> list[tuple[Any, int]]:
        """Nothing is compiled by numba."""
        return []

    # ---- loading -----------------------------------------------------------------------------------------------------
    def new_table(self, n_expert: int) -> Table:
        """One _Expert per expert."""
        return np.empty(n_expert, object)

    def pack_expert(self, weights: ExpertWeights) -> _Expert:
        """An expert with a session of its own."""
        return _Expert(call=self._call(weights))

    def place_expert(
        self, table: Table, expert: int, parts: tuple[PackedPart, ...], record: npt.NDArray[np.uint8]
    ) -> None:
        """Make an expert of a table the record in a buffer; its session is made when it is first used."""
        self._places.drop(record)
        table[expert] = _Expert(parts, record)

    def _call(self, weights: ExpertWeights) -> Call:
        settings = replace(self._settings, threads=1)
        return Call(session(expert_graph(self._config, weights, exact=settings.exact), settings))

    # ---- a layer -----------------------------------------------------------------------------------------------------
    def start(self, table: Table, inputs: Any, routed: Routed) -> None:
        """Begin a layer: rows (n_tokens, d_model), and which experts they go to."""
        self._table, self._routed = table, routed
        n_pairs, (n, top_k) = len(routed.tokens), routed.routes.ids.shape
        self._tokens.rows(0, n_pairs).read()[:] = routed.tokens
        places = self._places_of.rows(0, n).read()
        places.reshape(-1)[routed.slots] = np.arange(n_pairs)
        self._weights.rows(0, n).read()[:] = routed.routes.weights
        if isinstance(inputs, View):
            self._rows = inputs
        else:
            self._rows = self._inputs.rows(0, n)
            self._rows.read()[:] = inputs

    def experts(self, group: ExpertGroup) -> None:
        """Run a group of experts; all of it when down's weights are there."""
        if not group.phases & 2:
            return
        rows = [self._ready(self._table[expert]) for expert in group.ids.tolist()]
        work = list(zip(group.ids.tolist(), rows, strict=True))
        n_lanes = min(self._shared_threads, len(work))
        if n_lanes > 1:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._shared_threads - 1, "edgert-onnx")
            others = [self._pool.submit(self._run, work[lane::n_lanes]) for lane in range(1, n_lanes)]
            self._run(work[::n_lanes])
            for other in others:
                other.result()
        else:
            self._run(work)

    def _ready(self, expert: _Expert) -> Call:
        """The session of an expert, made now if it lies in a record."""
        if expert.call is None:
            assert expert.record is not None
            expert.call = self._call(ExpertWeights(*(PackedMatrix(part, expert.record) for part in expert.parts)))
            self._places.add(expert)
        return expert.call

    def _run(self, work: list[tuple[int, Call]]) -> None:
        first = self._routed.first
        for expert, call in work:
            start, count = int(first[expert]), int(first[expert + 1] - first[expert])
            call(
                {"normed": self._rows, "tokens": self._tokens.rows(start, count)},
                {"hidden": self._hidden.rows(start, count), "out": self._outputs.rows(start, count)},
            )

    def hidden(self) -> Floats:
        """What gate and up made of each pair, (n_pairs, d_expert)."""
        return self._hidden.rows(0, len(self._routed.tokens)).read()

    def total(self) -> View:
        """The weighted sum (n_tokens, d_model) of the experts' outputs."""
        assert self._sum is not None
        n, n_pairs = len(self._routed.routes.ids), len(self._routed.tokens)
        total = self._total.rows(0, n)
        inputs = {"outputs": self._outputs.rows(0, n_pairs), "places": self._places_of.rows(0, n)}
        self._sum(inputs | {"weights": self._weights.rows(0, n)}, {"total": total})
        return total

    def close(self) -> None:
        """Give back threads and memory."""
        if self._pool is not None:
            self._pool.shutdown()
        self._places = _Places()
        self._table = np.empty(0, object)
