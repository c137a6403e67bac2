"""The CPU device: packs weights into tiles, keeps the work space, and launches the compiled jobs.

All memory of a step is allocated here, once the weights are known. Jobs take the address of one record; this file is
where shapes and types are checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.devices import attention, feed_forward, layers
from edgert.devices.attention import ATTEND_JOB, ATTENTION
from edgert.devices.attention_blocks import ATTEND_BLOCKS
from edgert.devices.attention_heads import HEAD_NORM, NO_NORM, VECTOR_NORM, WRITE
from edgert.devices.base import CHUNK, ExpertGroup, ExpertWeights, LayerWeights, Linear, Table, rope_angles
from edgert.devices.buffers import Arena, Rows, aligned, round_up
from edgert.devices.feed_forward import GROUP, PARTS_BYTES
from edgert.devices.kv_cache import KvCache
from edgert.devices.layers import LAYER, ROUTING, STEP
from edgert.devices.threads import ThreadPool
from edgert.errors import OptionError
from edgert.quant import matmul
from edgert.quant.formats import Format, MatrixSource
from edgert.quant.matmul import MATRIX
from edgert.quant.records import address_of
from edgert.quant.reference import ACTIVATIONS
from edgert.quant.tile_kernels import GROUP_BYTES
from edgert.types import Floats, ModelConfig, Routes

HEAD_ROWS = 32  # rows of logits that are computed at a time
_QK_NORM = {"none": NO_NORM, "head": HEAD_NORM, "vector": VECTOR_NORM}
# What a chat needs compiled beside kernels: by field of STEP, with the number of integers each takes; and jobs. The
# other jobs are compiled when they are called.
_PARTS = {
    "attend": (attention.attend, 4),
    "attention_half": (layers.attention_half, 5),
    "multiply": (matmul.multiply, 9),
    "gate_and_up": (feed_forward.gate_and_up, 7),
    "down": (feed_forward.down, 8),
}
_JOBS = (layers.run_layers, layers.run_head)


def _addresses(records: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The address of each record of an array."""
    return records.ctypes.data + np.arange(len(records), dtype=np.int64) * records.itemsize


def _float_buffers(config: ModelConfig, n_threads: int) -> dict[str, tuple[int, int]]:
    """Rows and columns of the buffers of floats; with one token, each thread has a row of its own."""
    c, n_rows = config, max(CHUNK, n_threads)
    top_k, n_expert = (c.router.top_k, c.router.n_expert) if c.router else (0, 0)
    return {
        "x": (n_rows, c.d_model),
        "query": (n_rows, c.n_heads * c.d_head),
        "key": (n_rows, c.n_kv_heads * c.d_head),
        "value": (n_rows, c.n_kv_heads * c.d_value),
        "output": (n_rows, c.d_model),
        "scores": (n_rows, n_expert),
        "outputs": (CHUNK * (top_k + 1), c.d_model),
        "logits": (HEAD_ROWS, c.n_vocab),
    }


def _input_buffers(config: ModelConfig, n_threads: int) -> dict[str, tuple[int, int]]:
    """Likewise of those that are multiplied with matrices, and so quantised."""
    c, n_rows = config, max(CHUNK, n_threads)
    return {
        "normed": (n_rows, c.d_model),
        "attended": (n_rows, c.n_heads * c.d_value),
        "hidden": (CHUNK * (c.router.top_k if c.router else 0), c.d_expert),
        "shared_hidden": (CHUNK, c.d_shared),
    }


def _scratch_bytes(config: ModelConfig) -> int:
    """Bytes of one thread's work space."""
    widest = max(config.d_model, config.n_heads * config.d_value, config.d_expert, config.d_shared)
    return round_up(PARTS_BYTES + 2 * matmul.scratch_bytes(widest), 64)


def work_bytes(config: ModelConfig, n_context: int, n_threads: int, *, float_hidden: bool) -> int:
    """Bytes that a device takes beside weights and key/value cache.

    float_hidden: whether a down projection takes rows of floats.
    """
    floats = sum(4 * n_rows * width for n_rows, width in _float_buffers(config, n_threads).values())
    inputs = _input_buffers(config, n_threads)
    quantised = sum(n_rows * width * GROUP_BYTES // 32 for n_rows, width in inputs.values())
    floats += sum(
        4 * n_rows * width for name, (n_rows, width) in inputs.items() if float_hidden or "hidden" not in name
    )
    angles = 4 * config.rope.n_rotated * n_context
    scratch = n_threads * _scratch_bytes(config) + attention.scratch_bytes(config, n_threads, n_context, CHUNK)
    return floats + quantised + angles + scratch


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
        self._quantised = activations == "int8"
        self._arena = Arena()
        self._kept: list[Any] = []  # what addresses in the records point to
        self._rows: dict[str, Rows] = {}
        self._layers: list[npt.NDArray[Any]] = []
        self._attention: list[npt.NDArray[Any]] = []
        self._float_hidden = not self._quantised  # whether any down projection takes float rows
        self._angles = rope_angles(config, n_context, rope_divisors)
        self._step = np.zeros(1, STEP)
        self._cache: KvCache | None = None
        self._tables: Sequence[Table | None] = ()

    @staticmethod
    def kernels(formats: Iterable[Format], kv_type: str, activations: str) -> list[tuple[Any, int]]:
        """What a model with matrices of these formats needs compiled, with the number of integers that each takes."""
        quantised = activations == "int8"
        tiles = {kernel: 8 for format in formats for kernel in matmul.compiled_kernels(format, quantised)}
        cache = ATTEND_BLOCKS[kv_type], WRITE[kv_type]
        return [*tiles.items(), *_PARTS.values(), *((job, 4) for job in _JOBS), *((kernel, 1) for kernel in cache)]

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
        layer = np.zeros(1, LAYER)
        for name, linear in zip(("query", "key", "value", "output"), linears, strict=True):
            layer[name] = self._linear(linear)
        for name in ("router", "shared_gate"):
            matrix = getattr(weights, name)
            layer[name] = 0 if matrix is None else self._linear(Linear(matrix))
        if weights.shared is not None:
            layer["shared"] = self._keep(self.pack_expert(weights.shared))
        layer["attention_norm"] = self._vector(weights.attention_norm)
        layer["feed_forward_norm"] = self._vector(weights.feed_forward_norm)
        self._layers.append(layer)
        norm = _QK_NORM[c.qk_norm]
        sizes = (c.n_heads, c.n_kv_heads, c.d_head, c.d_value, c.rope.n_rotated, c.rope.kind == "neox", norm)
        norms = self._vector(weights.query_norm), self._vector(weights.key_norm)
        self._attention.append(np.array([(*sizes, *norms, weights.window, c.eps, c.attention_scale)], ATTENTION))

    def set_head(self, norm: Floats, output: Linear) -> None:
        """Take the final norm and the output head; the last of the weights, so the work space is made here."""
        assert output.matrix.shape == (self.config.n_vocab, self.config.d_model), output.matrix.shape
        self._step["head_norm"], self._step["head"] = self._vector(norm), self._linear(output)
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

    def _linear(self, linear: Linear) -> int:
        """Address of the MATRIX of a packed matrix."""
        buffer = self._arena.take(linear.matrix.format.matrix_bytes(*linear.matrix.shape))
        self._kept.append(buffer)
        return self._keep(self._pack(linear.matrix, buffer, self._vector(linear.bias)))

    def _pack(self, matrix: MatrixSource, buffer: npt.NDArray[np.uint8], bias: int = 0) -> npt.NDArray[Any]:
        """Pack into `buffer`; the MATRIX (1,) that describes it."""
        matrix.pack(buffer[: matrix.format.matrix_bytes(*matrix.shape)])
        return matmul.matrix_record(matrix, buffer.ctypes.data, quantised=self._quantised, bias=bias)

    def _vector(self, values: Floats | None) -> int:
        """Address of a copy of a float32 vector, zeros behind it; 0 for None."""
        if values is None:
            return 0
        copy = aligned(4 * round_up(len(values), 16)).view(np.float32)
        copy[: len(values)] = values
        return self._keep(copy)

    def _keep(self, array: npt.NDArray[Any]) -> int:
        self._kept.append(array)
        return int(array.ctypes.data)

    # ---- work space --------------------------------------------------------------------------------------------------
    def _allocate(self) -> None:
        c, step, n_threads = self.config, self._step, self.pool.n_threads
        top_k, n_expert = (c.router.top_k, c.router.n_expert) if c.router else (0, 0)
        for name, (n_rows, width) in _float_buffers(c, n_threads).items():
            made = self._rows[name] = Rows(n_rows, width)
            step[name], step[f"{name}_stride"] = made.address, made.stride
        for name, (n_rows, width) in _input_buffers(c, n_threads).items():
            floats = self._float_hidden or "hidden" not in name
            made = self._rows[name] = Rows(n_rows, width, quantised=self._quantised, floats=floats)
            step[name] = made.record.ctypes.data
        size = _scratch_bytes(c)
        step["scratch"], step["scratch_bytes"] = self._keep(aligned(n_threads * size)), size
        step["layers"] = self._keep(np.concatenate(self._layers))
        self._layer_records = self._kept[-1]
        step["n_layers"], step["d_model"], step["attended_width"] = c.n_layers, c.d_model, c.n_heads * c.d_value
        step["eps"], step["residual_scale"], step["logit_scale"] = c.eps, c.residual_scale, c.logit_scale
        step["activation"] = ACTIVATIONS.index(c.activation)
        if c.router:
            step["n_expert"], step["top_k"], step["router_scale"] = n_expert, top_k, c.router.scale
            step["softmax"], step["normalise"] = c.router.gating == "softmax", c.router.normalise
        self._n_used = np.zeros(1, np.int64)
        step["n_used"] = self._n_used.ctypes.data
        self._make_attend_jobs()
        self._make_routings(top_k, n_expert)
        for name, (part, n_arguments) in _PARTS.items():
            step[name] = address_of(part, n_arguments)
        self._run_layers, self._run_head = (address_of(job, 4) for job in _JOBS)

    def _make_attend_jobs(self) -> None:
        """The jobs of attention, one for each layer."""
        c, step, n_threads = self.config, self._step, self.pool.n_threads
        scratch = attention.new_scratch(c, n_threads, self.n_context, CHUNK)
        size = attention.scratch_bytes(c, n_threads, self.n_context, CHUNK)
        scratch["address"] = self._keep(aligned(size))
        attended = self._rows["attended"]
        jobs, described = np.zeros(c.n_layers, ATTEND_JOB), np.concatenate(self._attention)
        for name in ("query", "key", "value"):
            jobs[name], jobs[f"{name}_stride"] = step[name], step[f"{name}_stride"]
        jobs["out"], jobs["out_stride"], jobs["scratch"] = attended.address, attended.stride, self._keep(scratch)
        jobs["attention"] = _addresses(described)
        self._kept.append(described)
        self._attend_jobs = jobs
        self._layer_records["attend_job"] = _addresses(jobs)

    def _make_routings(self, top_k: int, n_expert: int) -> None:
        """Places for routes: of a chunk, and of one token for each thread; and the groups that threads fill."""
        n_threads, step = self.pool.n_threads, self._step
        routings, groups = np.zeros(n_threads + 1, ROUTING), np.zeros((n_threads, 2), GROUP)
        all_tokens = self._keep(np.arange(CHUNK * (top_k + 1), dtype=np.int64))
        for place, routing in enumerate(routings):
            n = CHUNK if place == 0 else 1
            for name, size in {"ids": n * top_k, "order": n * top_k, "tokens": n * top_k, "slots": n * top_k}.items():
                routing[name] = self._keep(np.zeros(size + 8, np.int64))
            routing["first"] = self._keep(np.zeros(n_expert + 9, np.int64))
            for name, size in {"weights": n * top_k, "shares": n, "probabilities": n_expert}.items():
                routing[name] = self._keep(aligned(4 * size + 64).view(np.float32))
            routing["all_tokens"] = all_tokens
        groups["activation"] = step["activation"]
        groups["hidden"][:, 0], groups["hidden"][:, 1] = step["hidden"], step["shared_hidden"]
        for pair in groups:
            pair[1]["first"] = self._keep(np.zeros(2, np.int64))
        step["routings"], step["groups"] = self._keep(routings), self._keep(groups)

    def new_cache(self, n_context: int, kv_type: str) -> KvCache:
        """A key/value cache for `n_context` positions."""
        return KvCache(self.config, n_context, kv_type)

    # ---- the step ----------------------------------------------------------------------------------------------------
    def begin(self, embeddings: Floats) -> None:
        """Make `embeddings` (n_tokens, d_model) the residual stream."""
        n_tokens, d_model = embeddings.shape
        assert 0 < n_tokens <= CHUNK and d_model == self.config.d_model, embeddings.shape
        top_k = self.config.router.top_k if self.config.router else 0
        self._step["n_tokens"], self._step["shared_slot"] = n_tokens, n_tokens * top_k
        self._rows["x"].floats[:n_tokens, :d_model] = embeddings

    def _at(self, cache: KvCache, start: int) -> int:
        """Set the jobs of attention for the tokens from position `start` on; how many there are."""
        n = int(self._step["n_tokens"][0])
        assert 0 <= start and start + n <= min(cache.n_context, self.n_context), (start, n)
        jobs = self._attend_jobs
        if cache is not self._cache:
            jobs["cache"], self._cache = _addresses(cache.records), cache
        jobs["n_tokens"], jobs["start"], jobs["angles"] = n, start, self._angles[start].ctypes.data
        return n

    def run_layers(self, tables: Sequence[Table | None], cache: KvCache, start: int) -> int:
        """All layers in one call; the number of experts used, layer by layer."""
        self._at(cache, start)
        if tables is not self._tables:
            self._tables = tables
            addresses = [0 if table is None else table.ctypes.data for table in tables]
            self._layer_records["experts"] = addresses
        self._n_used[0] = 0
        self._run(self._run_layers)
        return int(self._n_used[0])

    def _run(self, job: int) -> None:
        self.pool.run(job, self._step.ctypes.data)

    def attend(self, layer: int, cache: KvCache, start: int) -> Floats | None:
        """Attention half of a layer: router scores (n_tokens, n_expert and padding), or None if it is dense."""
        n = self._at(cache, start)
        self._step["layer"] = layer
        self._run(address_of(layers.run_attention, 4))
        return self._rows["scores"].floats[:n] if self._layer_records["router"][layer] else None

    def experts(self, layer: int, group: ExpertGroup | None, *, with_shared: bool) -> None:
        """Run a group of experts, and the shared expert along with them if asked to."""
        step = self._step
        step["layer"], step["with_shared"], step["group_size"] = layer, with_shared, 0
        if group is not None:
            experts = np.ascontiguousarray(group.experts)
            step["group_matrices"], step["group_size"] = experts.ctypes.data, len(experts)
            for name in ("first", "tokens", "slots"):
                step[name] = getattr(group, name).ctypes.data
        self._run(address_of(layers.run_experts, 4))

    def combine(self, layer: int, routes: Routes | None) -> None:
        """Add the weighted expert outputs and the shared one to the residual stream."""
        self._step["layer"] = layer
        if routes is not None:
            self._step["order"], self._step["weights"] = routes.order.ctypes.data, routes.weights.ctypes.data
        self._run(address_of(layers.run_combine, 4))

    def head(self, first_row: int = 0) -> Floats:
        """Logits (rows, n_vocab) of at most HEAD_ROWS tokens from `first_row` on; valid until the next call."""
        n = min(int(self._step["n_tokens"][0]) - first_row, HEAD_ROWS)
        self._step["first_row"], self._step["n_rows"] = first_row, n
        self._run(self._run_head)
        return self._rows["logits"].floats[:n, : self.config.n_vocab]

    def close(self) -> None:
        """Give back threads and memory."""
        self.pool.close()
        self._kept.clear()
        self._layers.clear()
        self._arena = Arena()
