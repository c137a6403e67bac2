"""The two forms in which a provider can have an expert's weights, and which of them it multiplies faster.

As constants of a session of their own, which the provider may put into an order of its own; or as inputs of a session
that all experts of a shape share. Measured on the CPU's provider (an expert of 6.3 million weights in 4 bits, one row):
0.2 ms as constants and 50 ms as inputs, for only constants are put into order; a session takes 25 to 45 ms to make, so
that constants win even for an expert that is used once. OpenVINO refuses such inputs. Weights that are floats multiply
as fast as inputs, and no copy is made of them. A GPU may well prefer inputs: there both are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from edgert.devices.base import ExpertWeights
from edgert.devices.onnx_graphs import expert_graph
from edgert.devices.onnx_quantised import Rounding
from edgert.devices.onnx_runtime import Buffer, Call, Settings, View, session
from edgert.errors import DeviceError
from edgert.types import Floats, ModelConfig

Run = Callable[[Mapping[str, View], Mapping[str, View]], None]  # of an expert, from inputs to outputs
_SLOWER = 1.5  # times that the shared form may take: it is there at once and takes no session's memory
_TURNS = 3
ROWS = 8  # of an expert at a time, where shapes are fixed: what a token needs is padded to it, weights are there once


class Forms:
    """Makes experts of one model; the first one decides the form of all. NPUs are given constants unasked."""

    def __init__(self, config: ModelConfig, settings: Settings, chunk: int = 0) -> None:
        """chunk: rows that experts are given to gather theirs from, where shapes are fixed."""
        self._config, self._settings, self._chunk = config, replace(settings, threads=1), chunk
        self._shared: dict[bytes, Call] = {}  # by their graphs
        # whether each expert has a session of its own; None: not decided yet
        self.own: bool | None = True if settings.static else None

    def make(self, weights: ExpertWeights, ranges: Floats | None = None) -> Run:
        """An expert; ranges: of its places, where the graph rounds to them."""
        if self.own is None:
            self.own = self._decide(weights)
        return self.with_own(weights, self._settings, ranges) if self.own else self.sharing(weights, self._settings)

    def with_own(self, weights: ExpertWeights, settings: Settings, ranges: Floats | None = None) -> Run:
        """An expert with a session of its own."""
        rounding = None if ranges is None else Rounding(ranges, settings.provider.inputs)
        n, rows = (self._chunk, ROWS) if settings.static else ("n", "rows")
        graph = expert_graph(self._config, weights, exact=settings.exact, n=n, rows=rows, rounding=rounding)
        return Call(session(graph, settings))

    def sharing(self, weights: ExpertWeights, settings: Settings) -> Run:
        """An expert whose weights are inputs of the session of its shape."""
        model = expert_graph(self._config, weights, exact=settings.exact, open_weights=True)
        memory = settings.provider.memory
        bound = {name: Buffer.of(array, memory).whole() for name, array in model.weights.items()}
        if model.graph not in self._shared:
            self._shared[model.graph] = Call(session(replace(model, weights={}), settings))
        call = self._shared[model.graph]
        return lambda inputs, outputs: call({**inputs, **bound}, outputs)

    def _decide(self, weights: ExpertWeights) -> bool:
        """Whether an expert with a session of its own is so much faster that it is worth one.

        In the host's memory that is known, and not measured anew: the forms differ in their last bits, and an answer
        must not hang on how busy the machine was.
        """
        if self._settings.provider.memory == "cpu":
            return any(source.format.is_integer for source in (weights.gate, weights.up, weights.down))
        trial = replace(self._settings, graphs=set())
        try:
            shared = self._seconds(self.sharing(weights, trial))
        except DeviceError:
            return True
        finally:
            self._shared.clear()
        return shared > _SLOWER * self._seconds(self.with_own(weights, trial))

    def _seconds(self, run: Run) -> float:
        """The fastest of a few runs of one row."""
        c, memory, took = self._config, self._settings.provider.memory, []
        inputs = {"normed": Buffer((1, c.d_model), np.float32).whole(), "tokens": Buffer((1,), np.int64).whole()}
        outputs = {"hidden": Buffer((1, c.d_expert), np.float32).whole()}
        outputs["out"] = Buffer((1, c.d_model), np.float32, memory).whole()
        for _ in range(_TURNS):
            started = time.perf_counter()
            run(inputs, outputs)
            took.append(time.perf_counter() - started)
        return min(took)
