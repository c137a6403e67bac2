"""The reference device: the same model in NumPy, slow and obvious, equal to the CPU device bit for bit.

It keeps weights unpacked and does the arithmetic of edgert.quant.reference in the order that the kernels follow. Tests
hold every device against it; with NUMBA_DISABLE_JIT=1 it is the device that answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgert.devices.base import CHUNK, ExpertGroup, ExpertWeights, LayerWeights, Linear, Table, rope_angles
from edgert.errors import OptionError
from edgert.quant import reference
from edgert.quant.formats import MatrixSource
from edgert.quant.reference import fma, sum_lanes
from edgert.types import Floats, ModelConfig, Routes

BLOCK = 64  # positions whose scores share one maximum; attention.BLOCK is the same number


class ReferenceCache:
    """keys (n_kv_heads, n_context, d_head), values (n_kv_heads, n_context, d_value) per layer, float16 or float32."""

    def __init__(self, config: ModelConfig, n_context: int, kv_type: str) -> None:
        if kv_type not in ("f16", "f32"):
            raise OptionError(f"kv_type={kv_type!r} is not known; use f16 or f32")
        self.n_context = n_context
        shape, dtype = (config.n_layers, config.n_kv_heads, n_context), np.float16 if kv_type == "f16" else np.float32
        self.keys, self.values = np.zeros((*shape, config.d_head), dtype), np.zeros((*shape, config.d_value), dtype)
        self.n_bytes = self.keys.nbytes + self.values.nbytes


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
        weights, c = self._layers[layer], self.config
        n = len(self._x)
        normed = reference.rms_norm(self._x, weights.attention_norm, c.eps)  # (n_tokens, d_model)
        query, key, value = (self._linear(part, normed) for part in (weights.query, weights.key, weights.value))
        query = self._heads(query, c.n_heads, weights.query_norm, start)  # (n_tokens, n_heads, d_head)
        key = self._heads(key, c.n_kv_heads, weights.key_norm, start)  # (n_tokens, n_kv_heads, d_head)
        value = value.reshape(n, c.n_kv_heads, c.d_value)
        cache.keys[layer, :, start : start + n] = key.transpose(1, 0, 2)
        cache.values[layer, :, start : start + n] = value.transpose(1, 0, 2)
        out = np.empty((n, c.n_heads, c.d_value), np.float32)
        for t in range(n):
            for head in range(c.n_heads):
                kv_head, end = head // (c.n_heads // c.n_kv_heads), start + t + 1
                keys = cache.keys[layer, kv_head, :end].astype(np.float32)  # (n_positions, d_head)
                values = cache.values[layer, kv_head, :end].astype(np.float32)  # (n_positions, d_value)
                out[t, head] = _attend(query[t, head], keys, values, np.float32(c.attention_scale))
        attended = self._linear(weights.output, out.reshape(n, -1))  # (n_tokens, d_model)
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
        hidden = reference.silu(self._matmul(expert.gate, x)) * self._matmul(expert.up, x)  # (n_tokens, d_ff)
        return self._matmul(expert.down, hidden)  # (n_tokens, d_model)

    def _heads(self, rows: Floats, n_heads: int, norm: Floats | None, start: int) -> Floats:
        """Split into heads, norm and rotate: (n_tokens, n_heads, d_head)."""
        c, n = self.config, len(rows)
        if c.qk_norm == "vector" and norm is not None:
            rows = reference.rms_norm(rows, norm, c.eps)
        if c.qk_norm == "head" and norm is not None:
            rows = reference.rms_norm(rows.reshape(n * n_heads, c.d_head), norm, c.eps)
        heads = rows.reshape(n, n_heads, c.d_head)
        angles = self._angles[start : start + n, None]  # (n, 1, n_rotated / 2, 2)
        cos, sin = angles[..., 0], angles[..., 1]
        half = c.rope.n_rotated // 2
        first = slice(0, half) if c.rope.kind == "neox" else slice(0, 2 * half, 2)
        second = slice(half, 2 * half) if c.rope.kind == "neox" else slice(1, 2 * half, 2)
        turned = heads.copy()
        turned[..., first] = heads[..., first] * cos - heads[..., second] * sin
        turned[..., second] = heads[..., first] * sin + heads[..., second] * cos
        return turned


def _whole(linear: Linear) -> Linear:
    return Linear(linear.matrix.whole(), linear.bias)


def _attend(query: Floats, keys: Floats, values: Floats, scale: np.float32) -> npt.NDArray[Any]:
    """Attention of one query (d_head,) over keys (n, d_head) and values (n, d_value), block by block."""
    largest, total, out = np.float32(0), np.float32(0), np.zeros(values.shape[1], np.float32)
    for start in range(0, len(keys), BLOCK):
        block_keys, block_values = keys[start : start + BLOCK], values[start : start + BLOCK]
        scores = np.zeros(len(block_keys), np.float32)
        for d in range(len(query)):
            scores = fma(block_keys[:, d], query[d], scores)
        scores = scores * scale
        block_largest = scores.max()
        weights = np.zeros(-(-len(scores) // 16) * 16, np.float32)
        weights[: len(scores)] = reference.exp(scores - block_largest)
        lanes = np.zeros(16, np.float32)
        for part in weights.reshape(-1, 16):
            lanes = lanes + part
        block_total, block_out = sum_lanes(lanes), np.zeros_like(out)
        for position in range(len(scores)):
            block_out = fma(block_values[position], weights[position], block_out)
        if start == 0:
            largest, total, out = block_largest, block_total, block_out
            continue
        new = max(largest, block_largest)
        old_share, block_share = reference.exp(np.array([largest - new, block_largest - new], np.float32))
        total = fma(total, old_share, block_total * block_share)
        out = fma(out, old_share, block_out * block_share)
        largest = new
    return out / total
