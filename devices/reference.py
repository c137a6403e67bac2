"""The reference device: the same model in NumPy, slow and obvious, equal to the CPU device bit for bit.

It keeps weights unpacked and does the arithmetic of edgert.quant.reference in the order that the kernels follow. Tests
hold every device against it; with NUMBA_DISABLE_JIT=1 it is the device that answers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from edgert.devices.base import CHUNK, ExpertGroup, ExpertWeights, LayerWeights, Linear, Table, rope_angles
from edgert.devices.kv_cache import cache_bytes
from edgert.errors import OptionError
from edgert.quant import reference
from edgert.quant.formats import Format, MatrixSource
from edgert.quant.reference import fma, sum_lanes
from edgert.types import Floats, Ids, ModelConfig, Routes

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
    ) -> None:
        if activations not in ("int8", "f32"):
            raise OptionError(f"activations={activations!r} is not known; use int8 or f32")
        self.config, self.n_context = config, n_context
        self._int8 = activations == "int8"
        self._angles = rope_angles(config, n_context, rope_divisors)
        self._layers: list[LayerWeights] = []

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

    # ---- the step ----------------------------------------------------------------------------------------------------
    def begin(self, embeddings: Floats) -> None:
        """Make `embeddings` (n_tokens, d_model) the residual stream."""
        assert 0 < len(embeddings) <= CHUNK
        self._x = embeddings.copy()

    def run_layers(self, tables: Sequence[Table | None], cache: Any, start: int) -> None:
        """Not here: layer by layer is what this device is for."""

    def attend(self, layer: int, cache: ReferenceCache, start: int) -> Floats | None:
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

    def experts(self, layer: int, group: ExpertGroup | None, *, with_shared: bool) -> None:
        """Run a group of experts, and the shared expert along with them if asked to."""
        shared = self._layers[layer].shared
        if with_shared:
            self._shared = None if shared is None else self._expert(shared, self._normed)
            top_k = self.config.router.top_k if self.config.router else 0
            self._outputs = np.zeros((len(self._x) * top_k, self.config.d_model), np.float32)
        if group is not None:
            for e, expert in enumerate(group.experts):
                pairs = slice(group.first[e], group.first[e + 1])
                self._outputs[group.slots[pairs]] = self._expert(expert, self._normed[group.tokens[pairs]])

    def combine(self, layer: int, routes: Routes | None) -> None:
        """Add the weighted expert outputs, in ascending expert id, and the shared one to the residual stream."""
        total = np.zeros_like(self._x)
        if routes is not None:
            outputs = self._outputs.reshape(*routes.ids.shape, -1)  # (n_tokens, top_k, d_model)
            for k in range(routes.ids.shape[1]):
                slot = routes.order[:, k, None]
                weight = np.take_along_axis(routes.weights, slot, axis=1)
                total = fma(weight, np.take_along_axis(outputs, slot[:, :, None], axis=1)[:, 0], total)
        if self._shared is not None:
            gate = self._layers[layer].shared_gate
            share = np.ones((1, 1), np.float32) if gate is None else reference.sigmoid(self._matmul(gate, self._normed))
            total = fma(share, self._shared, total)
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
        hidden = reference.activate(
            self._matmul(expert.gate, x), self._matmul(expert.up, x), self.config.activation
        )  # (n_tokens, d_ff)
        return self._matmul(expert.down, hidden)  # (n_tokens, d_model)


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
