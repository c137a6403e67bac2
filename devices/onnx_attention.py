"""The attention part through ONNX Runtime: a session for each layer's first half, one for the head, a bound cache.

Keys and values never move: a graph reads the beginning of a layer's cache in place and writes the new rows there. Each
layer's graph begins by adding what the feed-forward half before it left. Where shapes are fixed, a step of fewer tokens
than the chunk is padded: what the padding leaves in the cache lies beyond the last token, and is written over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from edgert.devices.base import LayerWeights, Linear, Norm, rope_angles
from edgert.devices.onnx_builder import Size
from edgert.devices.onnx_graphs import attention_graph, copy_graph, head_graph
from edgert.devices.onnx_quantised import Ranges, Rounding
from edgert.devices.onnx_runtime import Buffer, Call, Model, Settings, View, session
from edgert.devices.onnx_weights import floats
from edgert.devices.states import WithoutStates
from edgert.errors import OptionError
from edgert.quant import reference
from edgert.quant.formats import Format
from edgert.types import Floats, ModelConfig, Routes

HEAD_ROWS = 32  # rows of logits that are computed at a time
CACHED = {"f16": np.float16, "f32": np.float32}  # types of the cache
_MASKED = np.float32(-1e30)


class OnnxCache(WithoutStates):
    """Keys (n_context, n_kv_heads, d_head) and values (..., d_value) of each layer, on the device."""

    def __init__(self, config: ModelConfig, n_context: int, kv_type: str, memory: str, n_spare: int = 0) -> None:
        """n_spare: rows behind the last position, for what padding leaves."""
        c, dtype, n = config, CACHED[kv_type], n_context + n_spare
        self.n_context, self.kv_type = n_context, kv_type
        self.layers = [
            (
                Buffer((n, c.n_kv_heads, c.d_head), dtype, memory),
                Buffer((n, c.n_kv_heads, c.d_value), dtype, memory),
            )
            for _ in range(c.n_layers)
        ]
        self.n_bytes = sum(keys.n_bytes + values.n_bytes for keys, values in self.layers)


class OnnxAttention:
    """See devices.split.AttentionPart."""

    def __init__(
        self,
        config: ModelConfig,
        n_context: int,
        settings: Settings,
        *,
        rope_divisors: Floats | None = None,
        kv_type: str,
        chunk: int,
        ranges: Ranges | None = None,
    ) -> None:
        """ranges: where graphs round to them."""
        c, memory = config, settings.provider.memory
        if kv_type not in CACHED:
            raise OptionError(f"kv_type={kv_type!r} is not there on {settings.name}; use {' or '.join(CACHED)}")
        self.name, self.chunk, self.config = settings.name, chunk, config
        self._settings, self._n_context, self._kv_type = settings, n_context, kv_type
        self.settings: Sequence[Settings] = (settings,)
        self._ranges, self._n_spare = ranges, chunk if settings.static else 0
        self._weights: list[LayerWeights] = []  # to know what graphs have
        self._head: Call | None = None
        self._calls: list[dict[int, Call]] = []  # by the rows that they take, 0 for any number
        self._routers: list[tuple[Floats, Floats] | None] = []  # norm and matrix, to look ahead on the host
        n_rows = n_context + self._n_spare
        angles = rope_angles(c, n_rows, rope_divisors)
        self._tables = {
            "cosines": Buffer.of(angles[:, :, 0], memory),
            "sines": Buffer.of(angles[:, :, 1], memory),
            "positions": Buffer.of(np.arange(n_rows, dtype=np.int64)[:, None], memory),
        }
        rows = (chunk, c.d_model)
        self._x, self._shared = ([Buffer(rows, np.float32, memory) for _ in range(2)] for _ in range(2))
        self._normed = Buffer(rows, np.float32, memory)
        self._embeddings = Buffer(rows, np.float32)
        self._total = Buffer(rows, np.float32)  # of experts that run elsewhere
        self._last = Buffer((1, c.d_model), np.float32)  # row of the stream, on the host
        self._copy: Call | None = None  # makes it
        top_k = c.router.top_k if c.router else 0
        self._ids, self._route_weights = Buffer((chunk, top_k), np.int64), Buffer((chunk, top_k), np.float32)
        self._logits = Buffer((1 if settings.static else min(chunk, HEAD_ROWS), c.n_vocab), np.float32)
        self._masks: dict[int, Buffer] = {}  # by window
        self._masked: tuple[int, int] = (-1, 0)  # start and number of the tokens that the masks are for

    def kernels(
        self, formats: Iterable[Format], kv_type: str, activations: str, config: ModelConfig | None = None
    ) -> list[tuple[Any, int]]:
        """Nothing is compiled by numba."""
        return []

    # ---- loading -----------------------------------------------------------------------------------------------------
    def add_layer(self, weights: LayerWeights) -> None:
        """Take the hot weights of the next layer: its session is made at once."""
        before = self._weights[-1] if self._weights else None
        ranges = self._ranges.attention[len(self._calls)] if self._ranges else None

        def graph(n: Size, t: Size) -> Model:
            exact, rounding = self._settings.exact, self._rounding(ranges)
            kv_dtype = CACHED[self._kv_type]
            return attention_graph(self.config, weights, before, kv_dtype, exact=exact, n=n, t=t, rounding=rounding)

        self._calls.append(self._sessions(graph))
        self._weights.append(weights)
        router = weights.router
        self._routers.append(None if router is None else (weights.feed_forward_norm.weight, floats(router.matrix)))
        window = self.config.layer(len(self._weights) - 1).window
        if window not in self._masks:
            self._masks[window] = Buffer((self.chunk, self._n_context + self._n_spare), np.float32)

    def set_head(self, norm: Norm, output: Linear) -> None:
        """Take the final norm and the output head."""
        settings, n = self._settings, 1 if self._settings.static else "n"
        rounding = self._rounding(self._ranges.head if self._ranges else None)
        graph = head_graph(self.config, norm, output, self._weights[-1], exact=settings.exact, n=n, rounding=rounding)
        self._head = Call(session(graph, settings))

    def _rounding(self, ranges: Floats | None) -> Rounding | None:
        return None if ranges is None else Rounding(ranges, self._settings.provider.inputs)

    def _sessions(self, graph: Callable[[Size, Size], Model]) -> dict[int, Call]:
        """A session for any number of rows, or one for a single row and one for a whole chunk."""
        if not self._settings.static:
            return {0: Call(session(graph("n", "t"), self._settings))}
        n_rows = self._n_context + self._n_spare
        return {n: Call(session(graph(n, n_rows), self._settings)) for n in sorted({1, self.chunk})}

    def new_cache(self, n_context: int, kv_type: str) -> OnnxCache:
        """A key/value cache for `n_context` positions."""
        if kv_type != self._kv_type:
            raise OptionError(f"kv_type={kv_type!r} is not what this device was made for, {self._kv_type}")
        return OnnxCache(self.config, n_context, kv_type, self._settings.provider.memory, self._n_spare)

    # ---- the step ----------------------------------------------------------------------------------------------------
    def begin(self, embeddings: Floats) -> None:
        """Make `embeddings` (n_tokens, d_model) the residual stream."""
        n = self._n_tokens = len(embeddings)
        self._n_rows = n if n == 1 or not self._settings.static else self.chunk
        self._stream = self._embeddings.rows(0, self._n_rows)
        self._stream.read()[:n], self._stream.read()[n:] = embeddings, 0
        self._added: dict[str, View] = {}  # of the layer before

    def attend(self, layer: int, cache: OnnxCache, start: int, n_ahead: int) -> Routes | None:
        """Run a layer up to its experts; its routes, or None if it has none."""
        n, weights, turn = self._n_rows, self._weights[layer], layer % 2
        end, self._n_ahead = self._end(start), n_ahead
        keys, values = cache.layers[layer]
        inputs = {name: table.rows(start, n) for name, table in self._tables.items()}
        inputs |= {"x": self._stream, "mask": self._mask(self.config.layer(layer).window, start), **self._added}
        inputs |= {"keys": keys.rows(0, end), "values": values.rows(0, end)}
        outputs = {"new_x": self._x[turn].rows(0, n), "normed": self._normed.rows(0, n)}
        outputs |= {"new_keys": inputs["keys"], "new_values": inputs["values"]}
        self._added = {}
        if weights.shared is not None:
            self._added["shared"] = outputs["new_shared"] = self._shared[turn].rows(0, n)
        if weights.router is not None:
            outputs |= {"ids": self._ids.rows(0, n), "weights": self._route_weights.rows(0, n)}
        self._calls[layer][n if self._settings.static else 0](inputs, outputs)
        self._stream = outputs["new_x"]
        if weights.router is None:
            return None
        ids, shares = (outputs[name].read()[: self._n_tokens] for name in ("ids", "weights"))
        return Routes(ids, shares, np.argsort(ids, axis=1))

    def _end(self, start: int) -> int:
        """Rows of the cache that a step from position `start` on is given."""
        return self._n_context + self._n_spare if self._settings.static else start + self._n_rows

    def _mask(self, window: int, start: int) -> View:
        """What is added to the scores of this chunk, (n, t): nothing where a token may look, else a lot below zero."""
        n, end = self._n_rows, self._end(start)
        if self._masked != (start, n):
            self._masked = start, n
            positions, tokens = np.arange(end), np.arange(start, start + n)[:, None]
            for width, buffer in self._masks.items():
                seen = (positions <= tokens) & (positions > tokens - (width or end + 1))
                buffer.shaped(n, end).read()[:] = np.where(seen, np.float32(0), _MASKED)
        return self._masks[window].shaped(n, end)

    def inputs(self) -> View:
        """What the experts of the last layer that ran are given."""
        return self._normed.rows(0, self._n_tokens)

    def look_ahead(self, layer: int) -> list[Floats]:
        """What the routers of the next layers make of the last token's present state, on the host."""
        routers = [router for router in self._routers[layer + 1 : layer + 1 + self._n_ahead] if router is not None]
        if not routers:
            return []
        last = self._stream.rows(self._n_tokens - 1, 1)
        x = last.read() if last.buffer.memory == "cpu" else self._copied(last)
        return [matrix @ reference.rms_norm(x, norm, self.config.eps)[0] for norm, matrix in routers]

    def _copied(self, row: View) -> Floats:
        """A row (1, d_model) on the host, by a graph that copies just this: else buffers are handed out as a whole."""
        if self._copy is None:
            self._copy = Call(session(copy_graph(self.config.d_model), self._settings))
        self._copy({"x": row}, {"y": self._last.whole()})
        return self._last.whole().read()

    def take(self, total: Any) -> None:
        """Take the weighted sum of the layer's experts; the next graph adds it."""
        if isinstance(total, View):
            self._added["total"] = total.buffer.rows(0, self._n_rows)
        else:
            self._added["total"] = self._total.rows(0, self._n_rows)
            self._added["total"].read()[: self._n_tokens] = total

    def state(self) -> Floats:
        """The residual stream with all that the last layer added so far, a copy on the host."""
        rows = self._stream.read()[: self._n_tokens].copy()
        for added in self._added.values():
            rows += np.float32(self.config.residual_scale) * added.read()[: self._n_tokens]
        return rows

    def head(self, first_row: int = 0) -> Floats:
        """Logits (rows, n_vocab) of at most HEAD_ROWS tokens from `first_row` on; valid until the next call."""
        n = min(self._n_tokens - first_row, self._logits.shape[0])
        inputs = {"x": self._stream.rows(first_row, n)}
        inputs |= {name: view.rows(first_row, n) for name, view in self._added.items()}
        logits = self._logits.rows(0, n)
        assert self._head is not None
        self._head(inputs, {"logits": logits})
        return logits.read()

    def close(self) -> None:
        """Give back memory."""
        self._calls.clear()
        self._weights.clear()
        self._routers.clear()
        self._head = self._copy = None
