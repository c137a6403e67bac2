"""The CPU device: packs weights into tiles, keeps the work space, and launches the compiled kernels.

All memory of a step is allocated here, once. Kernels take addresses; this file is where shapes and types are checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.devices import attention, feed_forward, layers
from edgert.devices.attention import HEAD_NORM, LAYER, NO_NORM, VECTOR_NORM, WORK
from edgert.devices.base import CHUNK, ExpertGroup, ExpertWeights, LayerWeights, Linear, Table, rope_angles
from edgert.devices.threads import ThreadPool
from edgert.errors import OptionError
from edgert.quant.formats import MatrixSource
from edgert.quant.matmul import ACTIVATIONS, MATRIX
from edgert.types import Floats, ModelConfig, Routes

_NO_PAIRS = np.zeros(0, np.int64)
_NO_FIRST = np.zeros(1, np.int64)
HEAD_ROWS = 32  # rows of logits that are computed at a time
_QK_NORM = {"none": NO_NORM, "head": HEAD_NORM, "vector": VECTOR_NORM}


def aligned(n_bytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed bytes on a 64-byte boundary, with 64 readable ones behind them."""
    buffer = np.zeros(n_bytes + 128, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + n_bytes]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


class CpuCache:
    """Keys in tiles of 16 positions and values row by row, for every layer; half floats as uint16, or float32."""

    def __init__(self, config: ModelConfig, n_context: int, kv_type: str) -> None:
        if kv_type not in ("f16", "f32"):
            raise OptionError(f"kv_type={kv_type!r} is not known; use f16 or f32")
        self.n_context = n_context
        dtype = np.uint16 if kv_type == "f16" else np.float32
        positions = _round_up(n_context, attention.BLOCK)
        heads, d_value = config.n_kv_heads, _round_up(config.d_value, 16)
        self.keys = np.zeros((config.n_layers, heads, positions // 16, config.d_head, 16), dtype)
        self.values = np.zeros((config.n_layers, heads, positions, d_value), dtype)
        self.n_bytes = self.keys.nbytes + self.values.nbytes


class _Rows:
    """Rows of activations: floats, and the same quantised."""

    def __init__(self, n_rows: int, n_columns: int, *, quantised: bool) -> None:
        stride = _round_up(n_columns, 64)
        self.floats = aligned(4 * n_rows * stride).view(np.float32).reshape(n_rows, stride)
        n = n_rows * stride if quantised else 0
        self._integers, self._scales, self._sums = aligned(n), aligned(n // 8), aligned(n // 8)
        self.record = np.array(
            [
                (
                    self.floats.ctypes.data,
                    stride,
                    self._integers.ctypes.data,
                    self._scales.ctypes.data,
                    self._sums.ctypes.data,
                    int(quantised),
                )
            ],
            ACTIVATIONS,
        )


class CpuDevice:
    """Device on the CPU through compiled kernels; see devices.base.Device."""

    name = "cpu"

    def __init__(
        self,
        config: ModelConfig,
        n_context: int,
        *,
        threads: int | None = None,
        activations: str = "int8",
        rope_divisors: Floats | None = None,
    ) -> None:
        if activations not in ("int8", "f32"):
            raise OptionError(f"activations={activations!r} is not known; use int8 or f32")
        self.config, self.n_context = config, n_context
        self.pool = ThreadPool(threads)
        self._kept: list[Any] = []  # what addresses in the tables point to
        self._layers: list[npt.NDArray[Any]] = []
        self._matrices: list[npt.NDArray[Any]] = []
        self._shared: list[npt.NDArray[Any]] = []
        self._shared_gates: list[npt.NDArray[Any]] = []
        self._stacked: tuple[npt.NDArray[Any], ...] | None = None  # all layers' tables, for run_layers
        self._n_tokens = 0
        self._angles = rope_angles(config, n_context, rope_divisors)
        self._allocate(quantised=activations == "int8")

    # ---- loading -----------------------------------------------------------------------------------------------------
    def add_layer(self, weights: LayerWeights) -> None:
        """Take the hot weights of the next layer."""
        c = self.config
        linears = [weights.query, weights.key, weights.value, weights.output]
        shapes = [
            (c.n_heads * c.d_head, c.d_model),
            (c.n_kv_heads * c.d_head, c.d_model),
            (c.n_kv_heads * c.d_value, c.d_model),
            (c.d_model, c.n_heads * c.d_value),
        ]
        for linear, shape in zip(linears, shapes, strict=True):
            assert linear.matrix.shape == shape, (linear.matrix.shape, shape)
        if weights.router is not None:
            linears.append(Linear(weights.router))
        self._matrices.append(np.concatenate([self._linear(linear) for linear in linears]))
        self._layers.append(
            np.array(
                [
                    (
                        c.n_heads,
                        c.n_kv_heads,
                        c.d_head,
                        c.d_value,
                        c.d_model,
                        c.rope.n_rotated,
                        c.rope.kind == "neox",
                        _QK_NORM[c.qk_norm],
                        self._vector(weights.attention_norm),
                        self._vector(weights.feed_forward_norm),
                        self._vector(weights.query_norm),
                        self._vector(weights.key_norm),
                        weights.router is not None,
                        c.eps,
                        c.attention_scale,
                        c.residual_scale,
                    )
                ],
                LAYER,
            )
        )
        shared = np.zeros((0, 3), MATRIX) if weights.shared is None else self.pack_expert(weights.shared)[None]
        self._shared.append(shared)
        gate = weights.shared_gate
        self._shared_gates.append(np.zeros(0, MATRIX) if gate is None else self._linear(Linear(gate)))

    def set_head(self, norm: Floats, output: Linear) -> None:
        """Take the final norm and the output head."""
        assert output.matrix.shape == (self.config.n_vocab, self.config.d_model), output.matrix.shape
        self._head_norm = self._vector(norm)
        self._head = self._linear(output)

    def new_table(self, n_expert: int) -> Table:
        """Packed matrices of each expert: MATRIX (n_expert, 3)."""
        return np.zeros((n_expert, 3), MATRIX)

    def pack_expert(self, weights: ExpertWeights) -> npt.NDArray[Any]:
        """MATRIX (3,) of one expert, its projections contiguous in memory: gate, up, down."""
        parts = (weights.gate, weights.up, weights.down)
        sizes = [_round_up(part.format.matrix_bytes(*part.shape), 64) for part in parts]
        record = aligned(sum(sizes))
        self._kept.append(record)
        rows = []
        for part, size in zip(parts, sizes, strict=True):
            rows.append(_pack(part, record[:size]))
            record = record[size:]
        return np.concatenate(rows)

    def _linear(self, linear: Linear) -> npt.NDArray[Any]:
        buffer = aligned(linear.matrix.format.matrix_bytes(*linear.matrix.shape))
        self._kept.append(buffer)
        row = _pack(linear.matrix, buffer)
        row["bias"] = self._vector(linear.bias)
        return row

    def _vector(self, values: Floats | None) -> int:
        """Address of a copy of a float32 vector, zeros behind it; 0 for None."""
        if values is None:
            return 0
        copy = aligned(4 * _round_up(len(values), 16)).view(np.float32)
        copy[: len(values)] = values
        self._kept.append(copy)
        return int(copy.ctypes.data)

    # ---- work space --------------------------------------------------------------------------------------------------
    def _allocate(self, *, quantised: bool) -> None:
        c = self.config
        top_k = c.router.top_k if c.router else 0
        n_expert = c.router.n_expert if c.router else 0
        self._x = _Rows(CHUNK, c.d_model, quantised=False)
        self._normed = _Rows(CHUNK, c.d_model, quantised=quantised)
        self._attended = _Rows(CHUNK, c.n_heads * c.d_value, quantised=quantised)
        self._hidden = _Rows(CHUNK * top_k, c.d_expert, quantised=quantised)
        self._shared_hidden = _Rows(CHUNK, c.d_shared, quantised=quantised)
        self._outputs = _Rows(CHUNK * (top_k + 1), c.d_model, quantised=False)
        self._logits = _Rows(HEAD_ROWS, c.n_vocab, quantised=False)
        self._scores = _Rows(CHUNK, n_expert, quantised=False)
        widths = [c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.n_kv_heads * c.d_value, c.d_model]
        buffers = [_Rows(CHUNK, width, quantised=False) for width in widths] + [self._scores]
        d_value = _round_up(max(c.d_value, c.d_head), 16)
        scratch = _Rows(self.pool.n_threads, attention.BLOCK + 2 * d_value, quantised=False)
        addresses = [
            number for rows in (*buffers, scratch) for number in (rows.floats.ctypes.data, rows.floats.shape[1])
        ]
        self._work = np.array([tuple(addresses)], WORK)
        self._kept += [*buffers, scratch]
        self._attention_rows = np.concatenate([self._normed.record, self._attended.record])
        self._expert_rows = np.concatenate([self._normed.record, self._hidden.record, self._shared_hidden.record])
        self._all_tokens = np.arange(CHUNK * (top_k + 1), dtype=np.int64)

    def new_cache(self, n_context: int, kv_type: str) -> CpuCache:
        """A key/value cache for `n_context` positions."""
        return CpuCache(self.config, n_context, kv_type)

    # ---- the step ----------------------------------------------------------------------------------------------------
    def begin(self, embeddings: Floats) -> None:
        """Make `embeddings` (n_tokens, d_model) the residual stream."""
        n_tokens, d_model = embeddings.shape
        assert 0 < n_tokens <= CHUNK and d_model == self.config.d_model, embeddings.shape
        self.pool.ready()
        self._n_tokens = n_tokens
        self._x.floats[:n_tokens, :d_model] = embeddings

    def run_layers(self, tables: Sequence[Table | None], cache: CpuCache, start: int) -> int:
        """All layers in one call; the number of experts used, layer by layer."""
        n, c, router = self._n_tokens, self.config, self.config.router
        assert 0 <= start and start + n <= min(cache.n_context, self.n_context), (start, n)
        if self._stacked is None:
            stacked = [table for table in tables if table is not None] or [np.zeros((0, 3), MATRIX)] * c.n_layers
            self._stacked = tuple(map(np.stack, (stacked, self._matrices, self._shared, self._shared_gates)))
        experts, matrices, shared, shared_gates = self._stacked
        shape = n, router.top_k if router else 0
        n_expert = experts.shape[1]
        n_used = np.zeros(1, np.int64)
        self.pool.run(
            layers.run_layers,
            np.concatenate(self._layers),
            matrices,
            self._work,
            self._attention_rows,
            self._x.floats.ctypes.data,
            self._x.floats.shape[1],
            n,
            start,
            self._angles[start].ctypes.data,
            cache.keys,
            cache.values,
            experts,
            self._expert_rows,
            self._outputs.floats.ctypes.data,
            self._outputs.floats.shape[1],
            shared,
            shared_gates,
            self._all_tokens,
            self._scores.floats,
            router is not None and router.gating == "softmax",
            router is not None and router.normalise,
            router.scale if router else 1.0,
            np.empty((self.pool.n_threads, n_expert), np.float32),
            np.empty(shape, np.int64),
            np.empty(shape, np.float32),
            np.empty(shape, np.int64),
            np.empty(n_expert + 1, np.int64),
            np.empty(n * shape[1], np.int64),
            np.empty(n * shape[1], np.int64),
            n_used,
        )
        return int(n_used[0])

    def attend(self, layer: int, cache: CpuCache, start: int) -> Floats | None:
        """Attention half of a layer: router scores (n_tokens, n_expert and padding), or None if it is dense."""
        n = self._n_tokens
        assert 0 <= start and start + n <= min(cache.n_context, self.n_context), (start, n)
        self.pool.run(
            attention.attend,
            self._layers[layer],
            self._matrices[layer],
            self._work,
            self._attention_rows,
            self._x.floats.ctypes.data,
            self._x.floats.shape[1],
            n,
            start,
            self._angles[start].ctypes.data,
            cache.keys[layer],
            cache.values[layer],
        )
        return self._scores.floats[:n] if self._layers[layer]["router"][0] else None

    def experts(self, layer: int, group: ExpertGroup | None, *, with_shared: bool) -> None:
        """Run a group of experts, and the shared expert along with them if asked to."""
        n = self._n_tokens
        shared = self._shared[layer] if with_shared else self._shared[layer][:0]
        tokens = self._all_tokens[: n * len(shared)]
        shared_first = np.array([0, n], np.int64) if len(shared) else _NO_FIRST
        if group is None:
            group = ExpertGroup(np.zeros((0, 3), MATRIX), _NO_FIRST, _NO_PAIRS, _NO_PAIRS)
        self.pool.run(
            feed_forward.run_experts,
            self._expert_rows,
            group.experts,
            group.first,
            group.tokens,
            group.slots,
            shared,
            shared_first,
            tokens,
            tokens + self._first_shared_slot(),
            self._outputs.floats.ctypes.data,
            self._outputs.floats.shape[1],
        )

    def _first_shared_slot(self) -> int:
        return self._n_tokens * (self.config.router.top_k if self.config.router else 0)

    def combine(self, layer: int, routes: Routes | None) -> None:
        """Add the weighted expert outputs and the shared one to the residual stream."""
        n = self._n_tokens
        order = np.zeros((n, 0), np.int64) if routes is None else routes.order
        weights = np.zeros((n, 0), np.float32) if routes is None else routes.weights
        feed_forward.combine(
            0,
            1,
            self._x.floats.ctypes.data,
            self._x.floats.shape[1],
            n,
            self.config.d_model,
            self.config.residual_scale,
            self._outputs.floats.ctypes.data,
            self._outputs.floats.shape[1],
            order,
            weights,
            self._first_shared_slot() if len(self._shared[layer]) else -1,
            self._shared_gates[layer],
            self._normed.record,
        )

    def head(self, first_row: int = 0) -> Floats:
        """Logits (rows, n_vocab) of at most HEAD_ROWS tokens from `first_row` on; valid until the next call."""
        n = min(self._n_tokens - first_row, HEAD_ROWS)
        self.pool.run(
            feed_forward.head,
            self._x.floats[first_row].ctypes.data,
            self._x.floats.shape[1],
            n,
            self._head_norm,
            self.config.eps,
            self._normed.record,
            self._head,
            self.config.logit_scale,
            self._logits.floats.ctypes.data,
            self._logits.floats.shape[1],
        )
        return self._logits.floats[:n, : self.config.n_vocab]

    def close(self) -> None:
        """Give back threads and memory."""
        self.pool.close()
        self._kept.clear()
        self._layers.clear()


def _pack(matrix: MatrixSource, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """Pack into `buffer`; the MATRIX (1,) that describes it."""
    n_out, n_in = matrix.shape
    size = matrix.format.matrix_bytes(n_out, n_in)
    matrix.pack(buffer[:size])
    return np.array([(buffer.ctypes.data, matrix.format.code, n_out, n_in, matrix.format.tile_bytes(n_in), 0)], MATRIX)
