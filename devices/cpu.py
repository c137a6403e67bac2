"""The CPU device: packs weights into tiles, keeps the work space, and launches the compiled jobs.

All memory of a step is allocated here, once the weights are known. Jobs take the address of one record; this file is
where shapes and types are checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.devices import feed_forward, kv_cache, layers
from edgert.devices.attention import attend
from edgert.devices.base import (
    AHEAD,
    CHUNK,
    ExpertBiases,
    ExpertGroup,
    ExpertWeights,
    LayerWeights,
    Linear,
    Norm,
    Routed,
    Table,
    rope_angles,
)
from edgert.devices.buffers import Arena, Rows, aligned, round_up
from edgert.devices.cpu_mixers import Mixers, functions
from edgert.devices.feed_forward import GROUP
from edgert.devices.kv_cache import KvCache
from edgert.devices.layers import LAYER, ROUTING, STEP
from edgert.devices.routing import router_record
from edgert.devices.threads import ThreadPool
from edgert.devices.work_space import HEAD_ROWS, float_buffers, input_buffers, scratch_bytes
from edgert.errors import OptionError
from edgert.quant import matmul
from edgert.quant.formats import Format, MatrixSource, PackedPart
from edgert.quant.matmul import MATRIX
from edgert.quant.records import address_of
from edgert.quant.reference import ACTIVATIONS
from edgert.types import Floats, Ids, ModelConfig, Routes

# What a chat needs compiled beside kernels: by field of STEP, with the number of integers each takes; and jobs. The
# other jobs are compiled when they are called.
_PARTS = {
    "mixer_half": (layers.mixer_half, 5),
    "multiply": (matmul.multiply, 9),
    "gate_and_up": (feed_forward.gate_and_up, 7),
    "down": (feed_forward.down, 8),
}
_JOBS = (layers.run_layers, layers.run_head)
_STREAMED_JOBS = (layers.run_experts, layers.run_combine)  # where experts come from elsewhere


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
        chunk: int = CHUNK,
    ) -> None:
        if activations not in ("int8", "f32"):
            raise OptionError(f"activations={activations!r} is not known; use int8 or f32")
        self.config, self.n_context, self.chunk = config, n_context, chunk
        self.pool = ThreadPool(threads)
        self._quantised = activations == "int8"
        self._arena = Arena()
        self._kept: list[Any] = []  # what addresses in the records point to
        self._rows: dict[str, Rows] = {}
        self._layers: list[npt.NDArray[Any]] = []
        self._float_hidden = not self._quantised  # whether any down projection takes float rows
        self._mixers = Mixers(config, self, rope_angles(config, n_context, rope_divisors), n_context)
        self._step = np.zeros(1, STEP)
        # By the parts' id: those, kept so that it stays theirs, and MATRIX (3,) of a record at address 0
        self._templates: dict[int, tuple[tuple[PackedPart, ...], npt.NDArray[Any]]] = {}
        self._tables: Sequence[Table | None] = ()

    @staticmethod
    def kernels(
        formats: Iterable[Format], kv_type: str, activations: str, config: ModelConfig | None = None
    ) -> list[tuple[Any, int]]:
        """What a model with matrices of these formats needs compiled, with the number of integers that each takes."""
        quantised = activations == "int8"
        tiles = {kernel: 8 for format in formats for kernel in matmul.compiled_kernels(format, quantised)}
        return [
            *tiles.items(),
            *((mixer, 4) for mixer in (functions(config).values() if config else [attend])),
            *_PARTS.values(),
            *((job, 4) for job in (*_JOBS, *_STREAMED_JOBS)),
            *((kernel, 1) for kernel in kv_cache.functions(config, kv_type)),
        ]

    # ---- loading -----------------------------------------------------------------------------------------------------
    def add_layer(self, weights: LayerWeights) -> None:
        """Take the hot weights of the next layer."""
        layer, c = np.zeros(1, LAYER), self.config
        self._mixers.add(weights.mixer)
        if weights.router is not None:
            assert c.router is not None and weights.router.matrix.shape == (c.router.n_expert, c.d_model)
            layer["router"] = self.linear(weights.router)
        if weights.shared_gate is not None:
            layer["shared_gate"] = self.linear(Linear(weights.shared_gate))
        if weights.shared is not None:
            layer["shared"] = self.keep(self.pack_expert(weights.shared))
        for name, norm in (("mixer_norm", weights.mixer_norm), ("feed_forward_norm", weights.feed_forward_norm)):
            layer[name], layer[f"{name}_bias"] = self.vector(norm.weight), self.vector(norm.bias)
        layer["choice_bias"] = self.vector(weights.choice_bias)
        if weights.expert_biases is not None:
            self._add_biases(layer, weights.expert_biases)
        self._layers.append(layer)

    def _add_biases(self, layer: npt.NDArray[Any], biases: ExpertBiases) -> None:
        """Keep what experts add, in rows of a multiple of 16."""
        for name in ("gate", "up", "down"):
            rows = getattr(biases, name)
            padded = np.pad(rows, ((0, 0), (0, -rows.shape[1] % 16)))
            layer[f"{name}_biases"] = self.vector(padded.reshape(-1))

    def set_head(self, norm: Norm, output: Linear) -> None:
        """Take the final norm and the output head; the last of the weights, so the work space is made here."""
        assert output.matrix.shape == (self.config.n_vocab, self.config.d_model), output.matrix.shape
        self._step["head_norm"], self._step["head_norm_bias"] = self.vector(norm.weight), self.vector(norm.bias)
        self._step["head"] = self.linear(output)
        self._allocate()

    def new_table(self, n_expert: int) -> Table:
        """Packed matrices of each expert: MATRIX (n_expert, 3)."""
        return np.zeros((n_expert, 3), MATRIX)

    def pack_expert(self, weights: ExpertWeights) -> npt.NDArray[Any]:
        """MATRIX (3,) of one expert, its projections contiguous in memory: gate, up, down."""
        parts = (weights.gate, weights.up, weights.down)
        sizes = [round_up(part.format.matrix_bytes(*part.shape), 64) for part in parts]
        record = self._arena.take(sum(sizes))
        self._kept.append(record)
        rows = []
        for part, size in zip(parts, sizes, strict=True):
            rows.append(self._pack(part, record[:size]))
            record = record[size:]
        self._float_hidden |= bool(rows[2]["floats"][0])
        return np.concatenate(rows)

    def place_expert(
        self, table: Table, expert: int, parts: tuple[PackedPart, ...], record: npt.NDArray[np.uint8]
    ) -> None:
        """Make an expert of a table the record that lies, or will lie, in a buffer that the caller keeps."""
        found = self._templates.get(id(parts))
        if found is None:
            records = [matmul.matrix_record(part, part.offset, quantised=self._quantised) for part in parts]
            found = self._templates[id(parts)] = parts, np.concatenate(records)
            self._float_hidden |= bool(found[1]["floats"][2])
        table[expert] = found[1]
        table["address"][expert] += record.__array_interface__["data"][0]

    def linear(self, linear: Linear) -> int:
        """Address of the MATRIX of a packed matrix."""
        buffer = self._arena.take(linear.matrix.format.matrix_bytes(*linear.matrix.shape))
        self._kept.append(buffer)
        return self.keep(self._pack(linear.matrix, buffer, self.vector(linear.bias)))

    def _pack(self, matrix: MatrixSource, buffer: npt.NDArray[np.uint8], bias: int = 0) -> npt.NDArray[Any]:
        """Pack into `buffer`; the MATRIX (1,) that describes it."""
        matrix.pack(buffer[: matrix.format.matrix_bytes(*matrix.shape)])
        return matmul.matrix_record(matrix, buffer.ctypes.data, quantised=self._quantised, bias=bias)

    def vector(self, values: Floats | None) -> int:
        """Address of a copy of a float32 vector, zeros behind it; 0 for None."""
        if values is None:
            return 0
        copy = aligned(4 * round_up(len(values), 16)).view(np.float32)
        copy[: len(values)] = values
        return self.keep(copy)

    def takes_integers(self, format: Format) -> bool:
        """Whether matrices of a format take rows as int8."""
        return self._quantised and format.is_integer

    def keep(self, array: npt.NDArray[Any]) -> int:
        """The address of an array, which stays as long as the device."""
        self._kept.append(array)
        return int(array.ctypes.data)

    # ---- work space --------------------------------------------------------------------------------------------------
    def _allocate(self) -> None:
        c, step, n_threads = self.config, self._step, self.pool.n_threads
        top_k, n_expert = (c.router.top_k, c.router.n_expert) if c.router else (0, 0)
        fields = STEP.names or ()
        for name, (n_rows, width) in float_buffers(c, n_threads, self.chunk).items():
            made = self._rows[name] = Rows(n_rows, width)
            if name in fields:
                step[name], step[f"{name}_stride"] = made.address, made.stride
        for name, (n_rows, width) in input_buffers(c, n_threads, self.chunk).items():
            floats = self._float_hidden or "hidden" not in name
            made = self._rows[name] = Rows(n_rows, width, quantised=self._quantised, floats=floats)
            if name in fields:
                step[name] = made.record.ctypes.data
        size = scratch_bytes(c)
        step["scratch"], step["scratch_bytes"] = self.keep(aligned(n_threads * size)), size
        step["layers"] = self.keep(np.concatenate(self._layers))
        self._layer_records = self._kept[-1]
        step["n_layers"], step["d_model"] = c.n_layers, c.d_model
        step["eps"], step["residual_scale"], step["logit_scale"] = c.eps, c.residual_scale, c.logit_scale
        step["activation"] = ACTIVATIONS.index(c.activation)
        if c.router:
            step["n_expert"], step["top_k"], step["on_inputs"] = n_expert, top_k, c.router.on_inputs
            step["router"] = self.keep(router_record(c.router))
        self._all_experts = np.arange(n_expert, dtype=np.int64)
        step["all_experts"] = self._all_experts.ctypes.data
        self._mixers.allocate(self._layer_records, step.ctypes.data, self._rows, n_threads, self.n_context, self.chunk)
        self._make_routings(top_k, n_expert)
        for name, (part, n_arguments) in _PARTS.items():
            step[name] = address_of(part, n_arguments)
        jobs = (*_JOBS, *_STREAMED_JOBS)
        self._run_layers, self._run_head, self._run_experts, self._run_combine = (address_of(job, 4) for job in jobs)

    def _make_routings(self, top_k: int, n_expert: int) -> None:
        """Places for routes: of a chunk, and of one token for each thread; those of all layers; the threads' groups."""
        n_threads, step, chunk = self.pool.n_threads, self._step, self.chunk
        routings, groups = np.zeros(n_threads + 1, ROUTING), np.zeros((n_threads, 2), GROUP)
        all_tokens = self.keep(np.arange(chunk * (top_k + 1), dtype=np.int64))
        self._routings: list[dict[str, npt.NDArray[Any]]] = []
        for place, routing in enumerate(routings):
            n = chunk if place == 0 else 1
            sizes = {"ids": n * top_k, "order": n * top_k, "tokens": n * top_k, "slots": n * top_k}
            made = {name: np.zeros(size + 8, np.int64) for name, size in (sizes | {"first": n_expert + 1}).items()}
            for name, size in {"weights": n * top_k, "shares": n, "work": 3 * n_expert}.items():
                made[name] = aligned(4 * size + 64).view(np.float32)
            for name, array in made.items():
                routing[name] = self.keep(array)
            routing["all_tokens"] = all_tokens
            self._routings.append(made)
        groups["activation"], groups["on_inputs"][:, 0] = step["activation"], step["on_inputs"]
        groups["gate_bias_bytes"] = 4 * round_up(self.config.d_expert, 16)
        groups["down_bias_bytes"] = 4 * round_up(self.config.d_model, 16)
        groups["hidden"][:, 0], groups["hidden"][:, 1] = step["hidden"], step["shared_hidden"]
        for pair in groups:
            pair[1]["ids"], pair[1]["first"] = self.keep(np.zeros(1, np.int64)), self.keep(np.zeros(2, np.int64))
        step["routings"], step["groups"] = self.keep(routings), self.keep(groups)
        shape = self.config.n_layers, chunk * top_k
        self._chosen = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
        step["kept_ids"], step["kept_weights"] = (array.ctypes.data for array in self._chosen)
        step["kept_stride"] = shape[1]

    def new_cache(self, n_context: int, kv_type: str) -> KvCache:
        """A key/value cache for `n_context` positions, and for steps of this device's chunk."""
        return KvCache(self.config, n_context, kv_type, self.chunk)

    # ---- the step ----------------------------------------------------------------------------------------------------
    def begin(self, embeddings: Floats) -> None:
        """Make `embeddings` (n_tokens, d_model) the residual stream."""
        n_tokens, d_model = embeddings.shape
        assert 0 < n_tokens <= self.chunk and d_model == self.config.d_model, embeddings.shape
        top_k = self.config.router.top_k if self.config.router else 0
        self._step["n_tokens"], self._step["shared_slot"] = n_tokens, n_tokens * top_k
        self._rows["x"].floats[:n_tokens, :d_model] = embeddings
        self._step["n_used"] = 0
        self._n_tokens, self._n_ahead = n_tokens, 0

    def _at(self, cache: KvCache, start: int) -> None:
        """Set the jobs of attention for the tokens from position `start` on."""
        n = self._n_tokens
        assert 0 <= start and start + n <= min(cache.n_context, self.n_context), (start, n)
        assert cache.chunk is None or n <= cache.chunk, (n, cache.chunk)
        self._mixers.at(cache, start, n)

    def run_layers(
        self,
        tables: Sequence[Table | None],
        states: npt.NDArray[np.uint8] | None,
        cache: KvCache,
        start: int,
        first: int,
        *,
        every_layer: bool = False,
        n_ahead: int = 0,
    ) -> int:
        """Layers from `first` on, up to one that lacks an expert; see devices.base.Device."""
        step = self._step
        step["states"] = 0 if states is None else states.__array_interface__["data"][0]
        if first == 0:
            self._at(cache, start)
        if tables is not self._tables:
            self._tables = tables
            addresses = [0 if table is None else table.ctypes.data for table in tables]
            self._layer_records["experts"] = addresses
        self._n_ahead = min(n_ahead, AHEAD)
        step["first_layer"], step["every_layer"], step["n_ahead"] = first, every_layer, self._n_ahead
        self._run(self._run_layers)
        step["is_first"] = 1
        return int(step["stopped"][0])

    def _run(self, job: int) -> None:
        self.pool.run(job, self._step.ctypes.data)

    @property
    def n_used(self) -> int:
        """Experts that the step has used so far, each counted once a layer."""
        return int(self._step["n_used"][0])

    def routed(self, layer: int) -> Routed:
        """The routes of the layer that run_layers stopped at: views of what the job filled."""
        assert self.config.router is not None
        n, top_k, n_expert = self._n_tokens, self.config.router.top_k, self.config.router.n_expert
        made, pairs = self._routings[1 if n == 1 else 0], n * top_k
        routes = Routes(*(made[name][:pairs].reshape(n, top_k) for name in ("ids", "weights", "order")))
        return Routed(routes, made["first"][: n_expert + 1], made["tokens"][:pairs], made["slots"][:pairs])

    def chosen(self, layer: int) -> tuple[Ids, Floats]:
        """Ids and weights of a layer that the step has run through."""
        assert self.config.router is not None
        n, top_k = self._n_tokens, self.config.router.top_k
        ids, weights = self._chosen
        return ids[layer, : n * top_k].reshape(n, top_k), weights[layer, : n * top_k].reshape(n, top_k)

    def ahead(self, layer: int) -> list[Floats]:
        """What the routers of the next layers make of this layer's state."""
        assert self.config.router is not None
        if not self.config.has_experts(layer):
            return []
        scores, n_layers = self._rows["ahead_scores"].floats, self.config.n_layers
        n = min(self._n_ahead, n_layers - 1 - layer)
        without = np.flatnonzero(self._layer_records["router"][layer + 1 : layer + 1 + n] == 0)
        first, n = layer * self._n_ahead, int(without[0]) if len(without) else n
        return [scores[row, : self.config.router.n_expert] for row in range(first, first + n)]

    def inputs(self, layer: int) -> Floats:
        """What the experts of the layer that was stopped at are given, (n_tokens, d_model)."""
        return self._rows["normed"].floats[: self._n_tokens, : self.config.d_model]

    def hidden(self, layer: int) -> Floats:
        """What down takes of each pair, (n_pairs, d_expert): with int8 activations, what the integers stand for."""
        assert self.config.router is not None
        rows, n_pairs = self._rows["hidden"], self._n_tokens * self.config.router.top_k
        floats = rows.dequantised(n_pairs) if self._quantised else rows.floats[:n_pairs]
        return floats[:, : self.config.d_expert]

    def experts(self, layer: int, group: ExpertGroup) -> None:
        """Run a group of experts of the layer that was stopped at, and with the first the shared one."""
        step, ids = self._step, np.ascontiguousarray(group.ids, np.int64)
        step["layer"], step["phases"] = layer, group.phases
        step["group_ids"], step["group_size"] = ids.__array_interface__["data"][0], len(ids)
        self._run(self._run_experts)
        step["is_first"] = 0

    def combine(self, layer: int) -> None:
        """Add the weighted expert outputs and the shared one to the residual stream."""
        self._step["layer"] = layer
        self._run(self._run_combine)

    def head(self, first_row: int = 0) -> Floats:
        """Logits (rows, n_vocab) of at most HEAD_ROWS tokens from `first_row` on; valid until the next call."""
        n = min(self._n_tokens - first_row, HEAD_ROWS, self.chunk)
        self._step["first_row"], self._step["n_rows"] = first_row, n
        self._run(self._run_head)
        return self._rows["logits"].floats[:n, : self.config.n_vocab]

    def close(self) -> None:
        """Give back threads and memory."""
        self.pool.close()
        self._kept.clear()
        self._layers.clear()
        self._arena = Arena()
