"""Setting up the CPU device's mixers: their matrices, the buffers that these fill, and the jobs that run them.

What each job is told is written here; what it does is in attention.py and mixers.py. Shapes are checked here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from edgert.devices import attention, mixers
from edgert.devices.attention import ATTEND_JOB, ATTENTION
from edgert.devices.attention_heads import HEAD_NORM, NO_NORM, VECTOR_NORM
from edgert.devices.base import (
    AttentionWeights,
    ConvolutionWeights,
    DeltaWeights,
    LatentWeights,
    Linear,
    Mixer,
    query_factors,
)
from edgert.devices.buffers import Rows, aligned
from edgert.devices.kv_cache import KvCache
from edgert.devices.layers import PROJECTION
from edgert.devices.mixers import CONVOLUTION, DELTA, GATED, LATENT
from edgert.quant.formats import Format
from edgert.quant.matmul import ROWS
from edgert.quant.records import address_of
from edgert.quant.tile_kernels import GROUP_BYTES
from edgert.types import Floats, LayerConfig, ModelConfig

_QK_NORM = {"none": NO_NORM, "head": HEAD_NORM, "unit": HEAD_NORM, "vector": VECTOR_NORM}
_Record = npt.NDArray[Any]  # (1,)


class Keeper(Protocol):
    """What keeps weights and records where compiled code finds them."""

    def linear(self, linear: Linear) -> int:
        """Address of the MATRIX of a packed matrix."""

    def vector(self, values: Floats | None) -> int:
        """Address of a copy of floats, zeros behind it; 0 for None."""

    def keep(self, array: npt.NDArray[Any]) -> int:
        """Address of an array that stays."""

    def takes_integers(self, format: Format) -> bool:
        """Whether matrices of a format take rows as int8."""


class _Made(NamedTuple):
    """A layer's mixer: matrices of its input and the buffers that they fill, its output matrix, its width and job."""

    inputs: list[tuple[int, str]]
    output: int
    width: int
    kind: str  # of the function in `functions`
    job: _Record  # of that function, or ATTENTION where that is attention alone
    attention: _Record | None = None
    by_head: tuple[bool, bool] = (False, False)  # whether the heads' own matrices take integers


def functions(config: ModelConfig) -> dict[str, Any]:
    """The compiled mixers that a model's layers call, by kind."""
    found: dict[str, Any] = {}
    for kind in config.mixers():
        if kind == "convolution":
            found[kind] = mixers.convolve
        elif kind == "delta":
            found[kind] = mixers.run_delta
        else:
            found[kind] = attention.attend
            if config.latent:
                found["latent"] = mixers.attend_latent
            if config.query_gate:
                found["gated"] = mixers.attend_gated
    return found


class Mixers:
    """The mixers of all layers of a CPU device."""

    def __init__(self, config: ModelConfig, keeper: Keeper, angles: Floats, n_context: int) -> None:
        self._config, self._keeper, self._angles = config, keeper, angles
        self._made: list[_Made] = []
        self._cache: KvCache | None = None
        tempered = any(layer.tempered for layer in config.layers)
        self._factors = query_factors(config, 0, n_context) if tempered else None

    # ---- loading -----------------------------------------------------------------------------------------------------
    def add(self, weights: Mixer) -> None:
        """Pack the weights of the next layer's mixer."""
        kind = self._config.layer(len(self._made))
        if isinstance(weights, ConvolutionWeights):
            made = self._convolution(weights)
        elif isinstance(weights, DeltaWeights):
            made = self._delta(weights)
        elif isinstance(weights, LatentWeights):
            made = self._latent(weights, kind)
        else:
            made = self._attention(weights, kind)
        self._made.append(made)

    def _linear(self, linear: Linear, n_out: int, n_in: int) -> int:
        assert linear.matrix.shape == (n_out, n_in), (linear.matrix.shape, n_out, n_in)
        return self._keeper.linear(linear)

    def _describe(self, kind: LayerConfig, norm: int, query_norm: int, key_norm: int, sinks: int) -> _Record:
        c, described = self._config, np.zeros(1, ATTENTION)
        for name in ("n_heads", "n_kv_heads", "d_head", "d_value", "norm_late", "eps", "attention_scale"):
            described[name] = getattr(c, name)
        described["n_rotated"], described["neox"] = c.rope.n_rotated if kind.rotates else 0, c.rope.kind == "neox"
        described["qk_norm"], described["query_norm"], described["key_norm"] = norm, query_norm, key_norm
        described["window"], described["span"], described["sinks"] = kind.window, kind.span, sinks
        return described

    def _attention(self, weights: AttentionWeights, kind: LayerConfig) -> _Made:
        c, norms = self._config, (weights.query_norm, weights.key_norm)
        q, k, v = c.n_heads * c.d_head, c.n_kv_heads * c.d_head, c.n_kv_heads * c.d_value
        inputs = [
            (self._linear(linear, n_out, c.d_model), name)
            for linear, n_out, name in (
                (weights.query, q, "query"),
                (weights.key, k, "key"),
                (weights.value, v, "value"),
            )
        ]
        if c.qk_norm == "unit" and kind.normed:
            norms = (np.ones(c.d_head, np.float32),) * 2
        norm = _QK_NORM[c.qk_norm] if norms[0] is not None else NO_NORM
        vector = self._keeper.vector
        described = self._describe(kind, norm, vector(norms[0]), vector(norms[1]), vector(weights.sinks))
        output = self._linear(weights.output, c.d_model, c.d_attended)
        if weights.gate is None:
            return _Made(inputs, output, c.d_attended, "attention", described)
        inputs.append((self._linear(weights.gate, c.d_attended, c.d_model), "gate"))
        job = np.zeros(1, GATED)
        job["width"] = c.d_attended
        return _Made(inputs, output, c.d_attended, "gated", job, described)

    def _latent(self, weights: LatentWeights, kind: LayerConfig) -> _Made:
        c, latent = self._config, self._config.latent
        assert latent is not None
        plain, n_rotated, rank, job = latent.d_plain, c.rope.n_rotated, c.d_value, np.zeros(1, LATENT)
        inputs = [(self._linear(weights.latent, rank + n_rotated, c.d_model), "latent")]
        queries = c.n_heads * (plain + n_rotated)
        if weights.query_down is None:
            inputs.append((self._linear(weights.query, queries, c.d_model), "plain"))
        else:
            inputs.append((self._linear(weights.query_down, latent.query_rank, c.d_model), "query_down"))
            job["query_up"] = self._linear(weights.query, queries, latent.query_rank)
            job["query_norm"], job["query_rank"] = self._keeper.vector(weights.query_norm), latent.query_rank
        for name, value in (("n_heads", c.n_heads), ("rank", rank), ("n_rotated", n_rotated), ("eps", c.eps)):
            job[name] = value
        job["d_plain"], job["d_output"] = plain, latent.d_output
        job["latent_norm"] = self._keeper.vector(weights.latent_norm)
        job["key_up"] = self._linear(Linear(weights.key_up), c.n_heads * rank, plain)
        job["value_up"] = self._linear(Linear(weights.value_up), c.n_heads * latent.d_output, rank)
        output = self._linear(weights.output, c.d_model, c.d_attended)
        by_head = tuple(self._keeper.takes_integers(part.format) for part in (weights.key_up, weights.value_up))
        described = self._describe(kind, NO_NORM, 0, 0, 0)
        return _Made(inputs, output, c.d_attended, "latent", job, described, (by_head[0], by_head[1]))

    def _convolution(self, weights: ConvolutionWeights) -> _Made:
        d_model, job = self._config.d_model, np.zeros(1, CONVOLUTION)
        job["taps"], job["channels"] = self._taps(weights.taps)
        job["n_taps"], job["width"] = len(weights.taps), d_model
        inputs = [(self._linear(weights.input, 3 * d_model, d_model), "mixed")]
        return _Made(inputs, self._linear(weights.output, d_model, d_model), d_model, "convolution", job)

    def _delta(self, weights: DeltaWeights) -> _Made:
        c, d, job = self._config, self._config.delta, np.zeros(1, DELTA)
        assert d is not None
        inputs = [
            (self._linear(linear, n_out, c.d_model), name)
            for linear, n_out, name in (
                (weights.input, d.d_channels, "mixed"),
                (weights.gate, d.d_values, "gate"),
                (weights.beta, d.n_value_heads, "beta"),
                (weights.alpha, d.n_value_heads, "alpha"),
            )
        ]
        job["taps"], job["channels"] = self._taps(weights.taps)
        for name in ("n_taps", "n_key_heads", "n_value_heads", "d_state", "in_turn"):
            job[name] = getattr(d, name)
        job["decay"], job["step_bias"] = self._keeper.vector(weights.decay), self._keeper.vector(weights.step_bias)
        job["norm"], job["eps"], job["scale"] = self._keeper.vector(weights.norm), c.eps, d.d_state**-0.5
        output = self._linear(weights.output, c.d_model, d.d_values)
        return _Made(inputs, output, d.d_values, "delta", job)

    def _taps(self, taps: Floats) -> tuple[int, int]:
        """Address of taps (n_taps, channels) with rows of a multiple of 16, and that."""
        padded = np.pad(taps, ((0, 0), (0, -taps.shape[1] % 16)))
        return self._keeper.vector(padded.reshape(-1)), padded.shape[1]

    # ---- jobs --------------------------------------------------------------------------------------------------------
    def allocate(
        self, layers: npt.NDArray[Any], step: int, rows: Mapping[str, Rows], n_threads: int, n_context: int, chunk: int
    ) -> None:
        """Make the jobs, over these buffers, and tell the layers (LAYER) of them. step: address of STEP."""
        keep, c = self._keeper.keep, self._config
        used = functions(c) if self._made else {}
        addresses = {kind: address_of(function, 4) for kind, function in used.items()}
        self._attending = [i for i, made in enumerate(self._made) if made.kind in ("attention", "gated", "latent")]
        self._jobs = np.zeros(len(self._made), ATTEND_JOB)  # those of layers that do not attend are not used
        if self._attending:
            self._make_attend_jobs(rows, n_threads, n_context, chunk)
        keep(self._jobs)
        for index, made in enumerate(self._made):
            projections = np.zeros(len(made.inputs), PROJECTION)
            for projection, (matrix, name) in zip(projections, made.inputs, strict=True):
                projection["matrix"], projection["out"] = matrix, rows[name].address
                projection["stride"] = rows[name].stride
            layer = layers[index]
            layer["projections"], layer["n_projections"] = keep(projections), len(projections)
            layer["mix"], layer["output"], layer["attended_width"] = addresses[made.kind], made.output, made.width
            attend_job = self._jobs.ctypes.data + index * self._jobs.itemsize
            if made.kind == "attention":
                layer["mix_job"] = attend_job
                continue
            job = made.job
            job["step"], layer["mix_job"] = step, keep(job)
            if made.attention is not None:
                job["attend"], job["attend_job"] = addresses["attention"], attend_job
            self._place(made, rows)

    def _place(self, made: _Made, rows: Mapping[str, Rows]) -> None:
        """Tell a job where its buffers are."""
        kind, job = made.kind, made.job

        def tell(**names: str) -> None:
            for name, buffer in names.items():
                job[name] = rows[buffer].address
                job["stride" if name == "rows" else f"{name}_stride"] = rows[buffer].stride

        if kind == "gated":
            tell(gate="gate", rows="attended")
        elif kind == "convolution":
            tell(rows="mixed", out="attended")
        elif kind == "delta":
            tell(rows="mixed", gate="gate", beta="beta", alpha="alpha", out="attended")
        else:
            tell(plain="plain", latent="latent", query="query", key="key", value="value", out="attended")
            plain, n_rotated, rank = (int(job[name][0]) for name in ("d_plain", "n_rotated", "rank"))
            job["key_rows"] = self._rows_of_heads(rows["plain"], plain + n_rotated, plain, made.by_head[0])
            job["value_rows"] = self._rows_of_heads(rows["seen"], rank, rank, made.by_head[1])
            if job["query_up"]:
                tell(query_down="query_down")
                job["query_rows"] = rows["query_rank"].record.ctypes.data

    def _rows_of_heads(self, rows: Rows, width: int, n_in: int, quantised: bool) -> int:
        """Address of ROWS of each head: `n_in` of every `width` columns."""
        made, whole = np.zeros(self._config.n_heads, ROWS), rows.record[0]
        heads = np.arange(len(made))
        made["floats"], made["stride"] = whole["floats"] + 4 * width * heads, whole["stride"]
        if quantised:
            made["groups"] = whole["groups"] + n_in // 32 * GROUP_BYTES * heads
            made["group_stride"] = whole["group_stride"]
        return self._keeper.keep(made)

    def _make_attend_jobs(self, rows: Mapping[str, Rows], n_threads: int, n_context: int, chunk: int) -> None:
        """The jobs of attention, one for each layer."""
        c, keep, jobs = self._config, self._keeper.keep, self._jobs
        scratch = attention.new_scratch(c, n_threads, n_context, chunk)
        scratch["address"] = keep(aligned(attention.scratch_bytes(c, n_threads, n_context, chunk)))
        for name in ("query", "key", "value"):
            jobs[name], jobs[f"{name}_stride"] = rows[name].address, rows[name].stride
        out = rows["seen" if c.latent else "attended"]
        jobs["out"], jobs["out_stride"], jobs["scratch"] = out.address, out.stride, keep(scratch)
        for index in self._attending:
            made = self._made[index]
            jobs["attention"][index] = keep(made.job if made.attention is None else made.attention)

    def at(self, cache: KvCache, start: int, n_tokens: int) -> None:
        """Set the jobs for n_tokens from position `start` on, and for a cache."""
        jobs = self._jobs
        if cache is not self._cache:
            self._cache = cache
            records = cache.records
            jobs["cache"] = records.ctypes.data + np.arange(len(jobs), dtype=np.int64) * records.itemsize
            for index, made in enumerate(self._made):
                if made.kind in ("convolution", "delta"):
                    made.job["states"] = cache.states.address(index, "inputs")
                if made.kind == "delta":
                    made.job["memory"] = cache.states.address(index, "memory")
        jobs["n_tokens"], jobs["start"], jobs["angles"] = n_tokens, start, self._angles[start].ctypes.data
        if self._factors is not None:
            tempered = [layer.tempered for layer in self._config.layers]
            jobs["query_factors"][tempered] = self._factors[start:].ctypes.data
