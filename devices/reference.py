"""The reference device: the same model in NumPy, slow and obvious, equal to the CPU device bit for bit.

It keeps weights unpacked and does the arithmetic of edgert.quant.reference in the order that the kernels follow. Tests
hold every device against it; with NUMBA_DISABLE_JIT=1 it is the device that answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.devices.base import (
    CHUNK,
    READY,
    ExpertGroup,
    ExpertWeights,
    LayerWeights,
    Linear,
    Routed,
    Table,
    rope_angles,
)
from edgert.devices.kv_cache import cache_bytes
from edgert.devices.routing import choose_reference, pairs_reference
from edgert.errors import OptionError
from edgert.quant import reference
from edgert.quant.formats import GROUP, Format, MatrixSource, PackedPart
from edgert.quant.reference import fma, sum_lanes
from edgert.quant.unpacking import PackedMatrix
from edgert.types import Floats, Ids, ModelConfig

BLOCK = 64  # positions whose scores share one maximum; attention.BLOCK is the same number


class ReferenceCache:
    """keys (n_layers, n_kv_heads, n_context, d_head), values (..., d_value): float16, or float32 for f32 and int8.

    int8 is kept as the floats that it stands for.
    """

    def __init__(self, config: ModelConfig, n_context: int, kv_type: str) -> None:
        self.n_context, self.kv_type, self.n_bytes = n_context, kv_type, cache_bytes(config, n_context, kv_type)
        shape, dtype = (config.n_layers, config.n_kv_heads, n_context), np.float16 if kv_type == "f16" else np.float32
        self.keys, self.values = np.zeros((*shape, config.d_head), dtype), np.zeros((*shape, config.d_value), dtype)

    def write(self, layer: int, start: int, keys: Floats, values: Floats) -> None:
        """Take keys (n_tokens, n_kv_heads, d_head) and values (n_tokens, n_kv_heads, d_value)."""
        for rows, new in ((self.keys[layer], keys), (self.values[layer], values)):
            new = quantise_cached(new) if self.kv_type == "int8" else new
            with np.errstate(over="ignore"):
                rows[:, start : start + len(new)] = new.transpose(1, 0, 2)


def quantise_cached(rows: Floats) -> Floats:
    """What an int8 cache makes of keys or values: integers from -127 to 127 times a scale for 32 dimensions.

    The scale is the largest magnitude over 127, as a half float. One that is not finite makes its numbers none.
    """
    d = rows.shape[-1]
    padded = np.zeros((*rows.shape[:-1], -(-d // 32) * 32), np.float32)
    padded[..., :d] = rows
    groups = padded.reshape(*rows.shape[:-1], -1, 32)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scales = (np.abs(groups).max(axis=-1) / np.float32(127)).astype(np.float16).astype(np.float32)[..., None]
        sound = (scales > 0) & (scales < np.inf)
        scaled = groups * np.where(sound, np.float32(1) / scales, np.float32(0))
        integers = np.where(sound, np.rint(np.clip(scaled, -127, 127)), np.float32(0))
        return (integers * scales).reshape(padded.shape)[..., :d]


class ReferenceDevice:
    """Device in NumPy; see devices.base.Device."""

    name = "reference"

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
        self._int8 = activations == "int8"
        self._angles = rope_angles(config, n_context, rope_divisors)
        self._layers: list[LayerWeights] = []
        self._outputs: Floats | None = None  # (n_tokens * top_k, d_model) of the layer in hand, once an expert ran

    @staticmethod
    def kernels(formats: Iterable[Format], kv_type: str, activations: str) -> list[tuple[Any, int]]:
        """Nothing is compiled."""
        return []

    def add_layer(self, weights: LayerWeights) -> None:
        """Take the hot weights of the next layer."""
        router, shared, gate = weights.router, weights.shared, weights.shared_gate
        self._layers.append(
            replace(
                weights,
                query=_whole(weights.query),
                key=_whole(weights.key),
                value=_whole(weights.value),
                output=_whole(weights.output),
                router=router and router.whole(),
                shared=shared and self.pack_expert(shared),
                shared_gate=gate and gate.whole(),
            )
        )

    def set_head(self, norm: Floats, output: Linear) -> None:
        """Take the final norm and the output head."""
        self._norm, self._head = norm, _whole(output)

    def new_table(self, n_expert: int) -> Table:
        """One ExpertWeights per expert."""
        return np.empty(n_expert, object)

    def pack_expert(self, weights: ExpertWeights) -> ExpertWeights:
        """The expert with its matrices read, not packed."""
        return ExpertWeights(weights.gate.whole(), weights.up.whole(), weights.down.whole())

    def new_cache(self, n_context: int, kv_type: str) -> ReferenceCache:
        """A key/value cache for `n_context` positions."""
        return ReferenceCache(self.config, n_context, kv_type)

    def place_expert(
        self, table: Table, expert: int, parts: tuple[PackedPart, ...], record: npt.NDArray[np.uint8]
    ) -> None:
        """Make an expert of a table the packed record in a buffer, unpacked when it is used."""
        table[expert] = ExpertWeights(*(PackedMatrix(part, record) for part in parts))

    # ---- the step ----------------------------------------------------------------------------------------------------
    def begin(self, embeddings: Floats) -> None:
        """Make `embeddings` (n_tokens, d_model) the residual stream."""
        assert 0 < len(embeddings) <= self.chunk
        self._x = embeddings.copy()
        self._chosen: dict[int, tuple[Ids, Floats]] = {}
        self.n_used = 0

    def run_layers(
        self,
        tables: Sequence[Table | None],
        states: npt.NDArray[np.uint8] | None,
        cache: ReferenceCache,
        start: int,
        first: int,
        *,
        every_layer: bool = False,
        n_ahead: int = 0,
    ) -> int:
        """Layers from `first` on, up to one that lacks an expert; see devices.base.Device."""
        for layer in range(first, self.config.n_layers):
            scores, self._outputs = self._attend(layer, cache, start), None
            if scores is None:
                self.combine(layer)
                continue
            routed = self.routed(layer, scores)
            table, used = tables[layer], np.flatnonzero(routed.first[1:] > routed.first[:-1])
            assert table is not None
            self.n_used += len(used)
            self._ahead = [s for i in range(1, n_ahead + 1) if (s := self._scores(layer + i)) is not None]
            self._table = table
            if every_layer or (states is not None and (states[used + layer * len(table)] != READY).any()):
                return layer
            self.experts(layer, ExpertGroup(used))
            self.combine(layer)
        return self.config.n_layers

    def routed(self, layer: int, scores: Floats | None = None) -> Routed:
        """The routes of the layer that run_layers stopped at, or of new scores (n_tokens, n_expert)."""
        if scores is not None:
            assert self.config.router is not None
            routes = choose_reference(scores, self.config.router)
            self._chosen[layer] = routes.ids, routes.weights
            self._routed = Routed(routes, *pairs_reference(routes.ids, scores.shape[1]))
        return self._routed

    def chosen(self, layer: int) -> tuple[Ids, Floats]:
        """Ids and weights of a layer that the step has run through."""
        return self._chosen[layer]

    def ahead(self, layer: int) -> list[Floats]:
        """What the routers of the next layers make of this layer's state."""
        return self._ahead

    def _scores(self, layer: int) -> Floats | None:
        """What a layer's router makes of the last token's present state, (n_expert,)."""
        weights = self._layers[layer] if layer < self.config.n_layers else None
        if weights is None or weights.router is None:
            return None
        normed = reference.rms_norm(self._x[-1:], weights.feed_forward_norm, self.config.eps)
        return self._matmul(weights.router, normed)[0]

    def _attend(self, layer: int, cache: ReferenceCache, start: int) -> Floats | None:
        """Attention half of a layer: router scores (n_tokens, n_expert), or None if it is dense."""
        weights, c, n = self._layers[layer], self.config, len(self._x)
        normed = reference.rms_norm(self._x, weights.attention_norm, c.eps)  # (n_tokens, d_model)
        query, key, value = (self._linear(part, normed) for part in (weights.query, weights.key, weights.value))
        norms = weights.query_norm, weights.key_norm
        out = attention(
            c, query, key, value, norms, weights.window, self._angles[start : start + n], cache, layer, start
        )
        attended = self._linear(weights.output, out)  # (n_tokens, d_model)
        self._x = fma(attended, np.float32(c.residual_scale), self._x)
        self._normed = reference.rms_norm(self._x, weights.feed_forward_norm, c.eps)
        return None if weights.router is None else self._matmul(weights.router, self._normed)

    def inputs(self, layer: int) -> Floats:
        """What the experts of the layer that was stopped at are given, (n_tokens, d_model)."""
        return self._normed

    def hidden(self, layer: int) -> Floats:
        """What down takes of each pair, (n_pairs, d_expert): with int8 activations, what the integers stand for."""
        hidden = np.concatenate([self._hidden[expert] for expert in sorted(self._hidden)])
        if not self._int8:
            return hidden
        width = hidden.shape[1]
        padded = np.pad(hidden, ((0, 0), (0, -width % GROUP)))
        integers, scales = reference.quantise_activations(padded)
        return (integers.astype(np.float32) * np.repeat(scales, GROUP, axis=1))[:, :width]

    def experts(self, layer: int, group: ExpertGroup) -> None:
        """Run a group of experts; what its first phase makes is kept."""
        assert self.config.router is not None
        if self._outputs is None:
            self._outputs = np.zeros((len(self._x) * self.config.router.top_k, self.config.d_model), np.float32)
            self._hidden: dict[int, Floats] = {}
        for i in group.ids.tolist():
            expert, pairs = self._table[i], slice(self._routed.first[i], self._routed.first[i + 1])
            if group.phases & 1:
                self._hidden[i] = self._gate_and_up(expert, self._normed[self._routed.tokens[pairs]])
            if group.phases & 2:
                self._outputs[self._routed.slots[pairs]] = self._matmul(expert.down, self._hidden[i])

    def combine(self, layer: int) -> None:
        """Add the weighted expert outputs, in ascending expert id, and the shared one to the residual stream."""
        total, weights = np.zeros_like(self._x), self._layers[layer]
        if self._outputs is not None:
            routes = self._routed.routes
            outputs = self._outputs.reshape(*routes.ids.shape, -1)  # (n_tokens, top_k, d_model)
            for k in range(routes.ids.shape[1]):
                slot = routes.order[:, k, None]
                weight = np.take_along_axis(routes.weights, slot, axis=1)
                total = fma(weight, np.take_along_axis(outputs, slot[:, :, None], axis=1)[:, 0], total)
        if weights.shared is not None:
            gate = weights.shared_gate
            share = np.ones((1, 1), np.float32) if gate is None else reference.sigmoid(self._matmul(gate, self._normed))
            total = fma(share, self._expert(weights.shared, self._normed), total)
        self._x = fma(total, np.float32(self.config.residual_scale), self._x)

    def head(self, first_row: int = 0) -> Floats:
        """Logits (rows, n_vocab) of the chunk's tokens from `first_row` on."""
        normed = reference.rms_norm(self._x[first_row:], self._norm, self.config.eps)
        return self._linear(self._head, normed) * np.float32(self.config.logit_scale)

    def close(self) -> None:
        """Give back memory."""
        self._layers.clear()

    # ---- parts -------------------------------------------------------------------------------------------------------
    def _matmul(self, matrix: MatrixSource, x: Floats) -> Floats:
        return reference.matmul(matrix.whole(), x, int8_activations=self._int8)

    def _linear(self, linear: Linear, x: Floats) -> Floats:
        product = self._matmul(linear.matrix, x)
        return product if linear.bias is None else product + linear.bias

    def _expert(self, expert: ExpertWeights, x: Floats) -> Floats:
        return self._matmul(expert.down, self._gate_and_up(expert, x))  # (n_tokens, d_model)

    def _gate_and_up(self, expert: ExpertWeights, x: Floats) -> Floats:
        """(n_tokens, d_ff)."""
        return reference.activate(self._matmul(expert.gate, x), self._matmul(expert.up, x), self.config.activation)


def _whole(linear: Linear) -> Linear:
    return Linear(linear.matrix.whole(), linear.bias)


def attention(
    c: ModelConfig,
    query: Floats,
    key: Floats,
    value: Floats,
    norms: tuple[Floats | None, Floats | None],
    window: int,
    angles: Floats,
    cache: ReferenceCache,
    layer: int,
    start: int,
) -> Floats:
    """Attention of a chunk, which is written to the cache: (n_tokens, n_heads d_value).

    query, key, value: (n_tokens, heads * width). norms: weights of queries' and keys' norm. window: position p attends
    to p - window + 1 ... p, or to all up to p if it is 0. angles: (n_tokens, n_rotated / 2, 2), cos and sin.
    """
    n = len(query)
    query = _heads(c, query, c.n_heads, norms[0], angles)  # (n_tokens, n_heads, d_head)
    key = _heads(c, key, c.n_kv_heads, norms[1], angles)  # (n_tokens, n_kv_heads, d_head)
    cache.write(layer, start, key, value.reshape(n, c.n_kv_heads, c.d_value))
    ends = np.arange(start + 1, start + n + 1)
    firsts = np.maximum(0, ends - window) if window else np.zeros_like(ends)
    out = np.empty((n, c.n_heads, c.d_value), np.float32)
    for head in range(c.n_heads):
        kv_head = head // (c.n_heads // c.n_kv_heads)
        keys = cache.keys[layer, kv_head, : start + n].astype(np.float32)  # (n_positions, d_head)
        values = cache.values[layer, kv_head, : start + n].astype(np.float32)  # (n_positions, d_value)
        out[:, head] = _attend(query[:, head], keys, values, firsts, ends, np.float32(c.attention_scale))
    return out.reshape(n, -1)


def _heads(c: ModelConfig, rows: Floats, n_heads: int, norm: Floats | None, angles: Floats) -> Floats:
    """Split into heads, norm and rotate: (n_tokens, n_heads, d_head)."""
    n = len(rows)
    if c.qk_norm == "vector" and norm is not None:
        rows = reference.rms_norm(rows, norm, c.eps)
    if c.qk_norm == "head" and norm is not None:
        rows = reference.rms_norm(rows.reshape(n * n_heads, c.d_head), norm, c.eps)
    heads = rows.reshape(n, n_heads, c.d_head)
    cos, sin = angles[:, None, :, 0], angles[:, None, :, 1]  # (n, 1, n_rotated / 2)
    half = c.rope.n_rotated // 2
    first = slice(0, half) if c.rope.kind == "neox" else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if c.rope.kind == "neox" else slice(1, 2 * half, 2)
    turned = heads.copy()
    turned[..., first] = heads[..., first] * cos - heads[..., second] * sin
    turned[..., second] = heads[..., first] * sin + heads[..., second] * cos
    return turned


def _attend(queries: Floats, keys: Floats, values: Floats, firsts: Ids, ends: Ids, scale: np.float32) -> Floats:
    """Attention of queries (n, d_head), each over its positions, first to end, of keys and values (n_positions, ...).

    Blocks lie at multiples of 64. A weight stands in lane position % 16 of its block's sum. Positions outside take no
    part. The running maximum starts at the lowest float, so that the first block is combined like any other.
    """
    largest = np.full(len(queries), np.finfo(np.float32).min)
    total, out = np.zeros(len(queries), np.float32), np.zeros((len(queries), values.shape[1]), np.float32)
    for block in range(0, len(keys), BLOCK):
        positions = np.arange(block, min(len(keys), block + BLOCK))
        inside = (firsts[:, None] <= positions) & (positions < ends[:, None])  # (n, positions)
        rows = inside.any(axis=1)
        if not rows.any():
            continue
        inside, scores = inside[rows], np.zeros((rows.sum(), len(positions)), np.float32)
        for d in range(keys.shape[1]):
            scores = fma(keys[positions, d], queries[rows, d, None], scores)
        scores = np.where(inside, scores * scale, -np.inf)
        block_largest = scores.max(axis=1)
        weights = np.zeros((len(scores), BLOCK), np.float32)
        weights[:, : len(positions)] = np.where(inside, reference.exp(scores - block_largest[:, None]), 0)
        lanes = weights[:, :16]
        for lane in range(16, BLOCK, 16):
            lanes = lanes + weights[:, lane : lane + 16]
        block_total, block_out = sum_lanes(lanes), np.zeros((len(scores), values.shape[1]), np.float32)
        for i, position in enumerate(positions):
            added = fma(values[position], weights[:, i, None], block_out)
            block_out = np.where(inside[:, i, None], added, block_out)
        new = np.maximum(largest[rows], block_largest)
        old_share, block_share = reference.exp(largest[rows] - new), reference.exp(block_largest - new)
        total[rows] = fma(total[rows], old_share, block_total * block_share)
        out[rows] = fma(out[rows], old_share[:, None], block_out * block_share[:, None])
        largest[rows] = new
    return out / total[:, None]
