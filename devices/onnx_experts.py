"""Routed experts through ONNX Runtime, several of them at work at a time.

Each has its weights in the form that the provider multiplies fastest. Of an expert that lies in a record that form is
made when the expert is first used, and dropped when another is placed where the record lay.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.devices.base import ExpertGroup, ExpertWeights, Routed, Table
from edgert.devices.onnx_builder import Size
from edgert.devices.onnx_forms import ROWS, Forms, Run
from edgert.devices.onnx_graphs import sum_graph
from edgert.devices.onnx_quantised import Ranges
from edgert.devices.onnx_runtime import Buffer, Call, Settings, View, session
from edgert.quant.formats import Format, PackedPart
from edgert.quant.unpacking import PackedMatrix
from edgert.types import Floats, ModelConfig


@dataclass(eq=False)
class _Expert:
    """A row of a table: where the weights lie, if they lie in a record, and what runs them, once that is made."""

    parts: tuple[PackedPart, ...] = ()
    record: npt.NDArray[np.uint8] | None = None
    run: Run | None = None


class _Places:
    """Experts that were made from records, by the memory that these take."""

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
        """Drop what was made of experts whose records overlap this one."""
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
            self._experts[at].run = None
            del self._starts[at], self._experts[at]


class OnnxExperts:
    """See devices.split.ExpertPart."""

    def __init__(self, config: ModelConfig, settings: Settings, *, chunk: int, ranges: Ranges | None = None) -> None:
        """ranges: where graphs round to them."""
        c, memory = config, settings.provider.memory
        self.name, self._config, self._settings = settings.name, config, settings
        self.settings: Sequence[Settings] = (settings,)
        self._places, self._forms, self._ranges = _Places(), Forms(config, settings, chunk), ranges
        self.layer = 0
        self._block = ROWS if settings.static else 1  # an expert is given a multiple of so many rows
        self._n_lanes = settings.threads if memory == "cpu" else 1  # experts that run side by side
        self._pool: ThreadPoolExecutor | None = None
        top_k = c.router.top_k if c.router else 0
        n_expert = c.router.n_expert if c.router else 0
        pairs = chunk * top_k + (self._block - 1) * min(n_expert, chunk * top_k)
        self._chunk = chunk
        self._tokens = Buffer((pairs,), np.int64)
        self._places_of, self._weights = Buffer((chunk, top_k), np.int64), Buffer((chunk, top_k), np.float32)
        self._hidden = Buffer((pairs, c.d_expert), np.float32)
        self._outputs, self._total = (Buffer((rows, c.d_model), np.float32, memory) for rows in (pairs, chunk))
        self._inputs = Buffer((chunk, c.d_model), np.float32)  # that come from elsewhere
        alone = replace(settings, threads=1)
        sizes: dict[int, tuple[Size, Size]] = {0: ("n", "pairs")}
        if settings.static:
            sizes = {n: (n, pairs) for n in sorted({1, chunk})}
        self._sums = {key: Call(session(sum_graph(c, *size), alone)) for key, size in sizes.items() if c.router}

    def kernels(
        self, formats: Iterable[Format], kv_type: str, activations: str, config: ModelConfig | None = None
    ) -> list[tuple[Any, int]]:
        """Nothing is compiled by numba."""
        return []

    # ---- loading -----------------------------------------------------------------------------------------------------
    def new_table(self, n_expert: int) -> Table:
        """One _Expert per expert."""
        return np.empty(n_expert, object)

    def pack_expert(self, weights: ExpertWeights) -> _Expert:
        """An expert in the provider's form."""
        return _Expert(run=self._made(weights))

    def place_expert(
        self, table: Table, expert: int, parts: tuple[PackedPart, ...], record: npt.NDArray[np.uint8]
    ) -> None:
        """Make an expert of a table the record in a buffer; the provider's form is made when it is first used."""
        self._places.drop(record)
        table[expert] = _Expert(parts, record)

    # ---- a layer -----------------------------------------------------------------------------------------------------
    def start(self, table: Table, inputs: Any, routed: Routed) -> None:
        """Begin a layer: rows (n_tokens, d_model), and which experts they go to."""
        self._table, self._routed = table, routed
        counts, n = np.diff(routed.first), len(routed.routes.ids)
        ends = np.cumsum(-(-counts // self._block) * self._block)
        self._first = np.concatenate(([0], ends))  # rows of each expert's outputs, padding at their end
        self._rows_of = np.arange(len(routed.tokens)) + np.repeat(self._first[:-1] - routed.first[:-1], counts)
        tokens = self._tokens.rows(0, max(int(ends[-1]), 1)).read()
        tokens[:] = 0
        tokens[self._rows_of] = routed.tokens
        places = self._places_of.rows(0, n).read()
        places.reshape(-1)[routed.slots] = self._rows_of
        self._weights.rows(0, n).read()[:] = routed.routes.weights
        if isinstance(inputs, View):
            self._rows = inputs
        else:
            self._rows = self._inputs.rows(0, n)
            self._rows.read()[:] = inputs
        if self._block > 1:
            self._rows = self._rows.buffer.rows(0, self._chunk)

    def experts(self, group: ExpertGroup) -> None:
        """Run a group of experts; all of it when down's weights are there."""
        if not group.phases & 2:
            return
        work = [(expert, self._ready(self._table[expert])) for expert in group.ids.tolist()]
        n_lanes = min(self._n_lanes if self._forms.own else 1, len(work))
        if n_lanes > 1 and self._pool is None:
            self._pool = ThreadPoolExecutor(self._n_lanes - 1, "edgert-onnx")
        lanes = [work[lane::n_lanes] for lane in range(n_lanes)]
        others = [self._pool.submit(self._run, lane) for lane in lanes[1:]] if self._pool else []
        self._run(lanes[0] if lanes else [])
        for other in others:
            other.result()

    def _made(self, weights: ExpertWeights) -> Run:
        return self._forms.make(weights, self._ranges.experts[self.layer] if self._ranges else None)

    def _ready(self, expert: _Expert) -> Run:
        """What runs an expert, made now if it lies in a record."""
        if expert.run is None:
            assert expert.record is not None
            expert.run = self._made(ExpertWeights(*(PackedMatrix(part, expert.record) for part in expert.parts)))
            self._places.add(expert)
        return expert.run

    def _run(self, work: list[tuple[int, Run]]) -> None:
        for expert, run in work:
            start, end = int(self._first[expert]), int(self._first[expert + 1])
            step = self._block if self._block > 1 else end - start
            for at in range(start, end, step):
                run(
                    {"normed": self._rows, "tokens": self._tokens.rows(at, step)},
                    {"hidden": self._hidden.rows(at, step), "out": self._outputs.rows(at, step)},
                )

    def hidden(self) -> Floats:
        """What gate and up made of each pair, (n_pairs, d_expert)."""
        found: Floats = self._hidden.rows(0, int(self._first[-1])).read()[self._rows_of]
        return found

    def total(self) -> View:
        """The weighted sum (n_tokens, d_model) of the experts' outputs."""
        n, rows, key, n_pairs = len(self._routed.routes.ids), len(self._routed.routes.ids), 0, int(self._first[-1])
        if self._block > 1:
            rows = key = n if n == 1 else self._chunk
            n_pairs = self._outputs.shape[0]
        inputs = {"outputs": self._outputs.rows(0, n_pairs), "places": self._places_of.rows(0, rows)}
        self._sums[key](inputs | {"weights": self._weights.rows(0, rows)}, {"total": self._total.rows(0, rows)})
        return self._total.rows(0, n)

    def close(self) -> None:
        """Give back threads and memory."""
        if self._pool is not None:
            self._pool.shutdown()
        self._places = _Places()
        self._table = np.empty(0, object)
