"""Attention of the reference device, and what it keeps of a sequence: NumPy, in the order that the kernels follow."""

from __future__ import annotations

import numpy as np

from edgert.devices.base import query_factors
from edgert.devices.kv_cache import cache_bytes
from edgert.devices.states import States, WithStates
from edgert.quant import reference
from edgert.quant.reference import fma, sum_lanes
from edgert.types import Floats, Ids, LayerConfig, ModelConfig, RopeConfig

BLOCK = 64  # positions whose scores share one maximum; attention.BLOCK is the same number


class ReferenceCache(WithStates):
    """keys (n_layers, n_kv_heads, n_context, d_head), values (..., d_value): float16, or float32 for f32 and int8.

    int8 is kept as the floats that it stands for. Layers that do not attend have none that are used, but states.
    """

    def __init__(self, config: ModelConfig, n_context: int, kv_type: str) -> None:
        self.n_context, self.kv_type, self.n_bytes = n_context, kv_type, cache_bytes(config, n_context, kv_type)
        shape, dtype = (config.n_layers, config.n_kv_heads, n_context), np.float16 if kv_type == "f16" else np.float32
        self.states = States(config)
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


def attention(
    c: ModelConfig,
    query: Floats,
    key: Floats,
    value: Floats,
    norms: tuple[Floats | None, Floats | None],
    kind: LayerConfig,
    angles: Floats,
    cache: ReferenceCache,
    layer: int,
    start: int,
    sinks: Floats | None = None,
) -> Floats:
    """Attention of a chunk, which is written to the cache: (n_tokens, n_heads d_value).

    query, key, value: (n_tokens, heads * width). norms: weights of queries' and keys' norm. angles: (n_tokens,
    n_rotated / 2, 2), cos and sin. sinks: (n_heads,).
    """
    n = len(query)
    query = _heads(c, kind, query, c.n_heads, norms[0], angles)  # (n_tokens, n_heads, d_head)
    key = _heads(c, kind, key, c.n_kv_heads, norms[1], angles)  # (n_tokens, n_kv_heads, d_head)
    if kind.tempered:
        query = query * query_factors(c, start, n)[:, None, None]
    cache.write(layer, start, key, value.reshape(n, c.n_kv_heads, c.d_value))
    ends = np.arange(start + 1, start + n + 1)
    firsts = np.maximum(0, ends - kind.window) if kind.window else np.zeros_like(ends)
    if kind.span:
        firsts = np.maximum(firsts, (ends - 1) // kind.span * kind.span)
    out = np.empty((n, c.n_heads, c.d_value), np.float32)
    for head in range(c.n_heads):
        kv_head = head // (c.n_heads // c.n_kv_heads)
        keys = cache.keys[layer, kv_head, : start + n].astype(np.float32)  # (n_positions, d_head)
        values = cache.values[layer, kv_head, : start + n].astype(np.float32)  # (n_positions, d_value)
        sink = None if sinks is None else sinks[head]
        out[:, head] = _attend(query[:, head], keys, values, firsts, ends, np.float32(c.attention_scale), sink)
    return out.reshape(n, -1)


def _heads(
    c: ModelConfig, kind: LayerConfig, rows: Floats, n_heads: int, norm: Floats | None, angles: Floats
) -> Floats:
    """Split into heads, norm and rotate: (n_tokens, n_heads, d_head)."""
    n, normed = len(rows), "none"
    if kind.normed and (norm is not None or c.qk_norm == "unit"):
        normed = c.qk_norm
    norm = np.ones(c.d_head, np.float32) if normed == "unit" else norm

    def norm_heads(heads: Floats) -> Floats:
        if normed not in ("head", "unit"):
            return heads
        assert norm is not None
        return reference.rms_norm(heads.reshape(n * n_heads, c.d_head), norm, c.eps).reshape(heads.shape)

    if normed == "vector":
        assert norm is not None
        rows = reference.rms_norm(rows, norm, c.eps)
    heads = rows.reshape(n, n_heads, c.d_head)
    if not c.norm_late:
        heads = norm_heads(heads)
    if kind.rotates:
        heads = rotate(c.rope, heads, angles)
    return norm_heads(heads) if c.norm_late else heads


def rotate(rope: RopeConfig, heads: Floats, angles: Floats) -> Floats:
    """Rotate the first dimensions of heads (n_tokens, n_heads, d_head)."""
    cos, sin = angles[:, None, :, 0], angles[:, None, :, 1]  # (n, 1, n_rotated / 2)
    half = rope.n_rotated // 2
    first = slice(0, half) if rope.kind == "neox" else slice(0, 2 * half, 2)
    second = slice(half, 2 * half) if rope.kind == "neox" else slice(1, 2 * half, 2)
    turned = heads.copy()
    turned[..., first] = heads[..., first] * cos - heads[..., second] * sin
    turned[..., second] = heads[..., first] * sin + heads[..., second] * cos
    return turned


def _attend(
    queries: Floats,
    keys: Floats,
    values: Floats,
    firsts: Ids,
    ends: Ids,
    scale: np.float32,
    sink: np.float32 | None = None,
) -> Floats:
    """Attention of queries (n, d_head), each over its positions, first to end, of keys and values (n_positions, ...).

    Blocks lie at multiples of 64. A weight stands in lane position % 16 of its block's sum. Positions outside take no
    part. The running maximum starts at the lowest float, so that the first block is combined like any other; or at the
    sink, whose weight is then 1.
    """
    largest = np.full(len(queries), np.finfo(np.float32).min if sink is None else sink, np.float32)
    total, out = np.zeros(len(queries), np.float32), np.zeros((len(queries), values.shape[1]), np.float32)
    if sink is not None:
        total[:] = 1
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
