"""The compiled attention half of a layer: norm, q/k/v, rotation, cache, attention, output, residual, norm, router.

One call per layer, run by all threads of a pool. Keys lie in tiles of 16 positions (column-major, as weight tiles do),
so that a score needs no sum across lanes; values lie position by position. Attention of one token and head runs over
blocks of 64 positions, each with its own maximum, combined in ascending order: no order depends on threads or chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from edgert.devices.threads import meet
from edgert.quant.functions import exp, quantise_row, rms_norm
from edgert.quant.jit import kernel
from edgert.quant.matmul import multiply, record
from edgert.quant.simd import (
    f32x16,
    first_lane,
    fma,
    fma1,
    keep_first,
    load_f16,
    load_f32,
    load_float,
    max_lanes,
    maximum,
    splat,
    store_f16,
    store_f32,
    store_float,
    store_half,
    sum_lanes,
)

BLOCK = 64  # positions whose scores share one maximum
NO_NORM, HEAD_NORM, VECTOR_NORM = 0, 1, 2  # RMS norm of q and k: none, of each head, of the whole vector

# What the kernel must know of a layer besides its matrices. Addresses are of float32 vectors, 0 where there is none.
LAYER = record(
    "n_heads n_kv_heads d_head d_value d_model n_rotated neox qk_norm"
    " attention_norm feed_forward_norm query_norm key_norm router",
    floats="eps attention_scale residual_scale",
)
QUERY, KEY, VALUE, OUTPUT, ROUTER = range(5)  # rows of a layer's table of matrices

# Work space, in rows per token: addresses and strides in floats. `scratch` holds `scratch_stride` floats a thread.
WORK = record(
    "query query_stride key key_stride value value_stride"
    " output output_stride scores scores_stride scratch scratch_stride"
)
_ZERO, _ONE, _LOWEST = np.float32(0), np.float32(1), np.float32(-np.inf)


def _is_half(cache: Any) -> bool:
    return bool(cache.dtype == types.uint16)


@intrinsic
def load_cached(typing_context: Any, cache: Any, address: Any) -> Any:
    """16 floats at an address inside `cache`, an array of uint16 (half floats) or of float32."""
    load = load_f16 if _is_half(cache) else load_f32

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        _, emit = load._defn(typing_context, types.intp)
        return emit(context, builder, None, [values[1]])

    return f32x16(cache, types.intp), generate


@intrinsic
def store_cached(typing_context: Any, cache: Any, address: Any, value: Any) -> Any:
    """One float, or 16, to an address inside `cache`, in the cache's own type."""
    if value == types.float32:
        store = store_half if _is_half(cache) else store_float
    else:
        store = store_f16 if _is_half(cache) else store_f32

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, values: list[Any]) -> Any:
        _, emit = store._defn(typing_context, types.intp, value)
        return emit(context, builder, None, [values[1], values[2]])

    return types.void(cache, types.intp, value), generate


@kernel
def rotate(vector: int, angles: int, n: int, neox: int) -> None:
    """Rotate the first n of the floats at `vector` by n/2 pairs of (cos, sin): pairs (i, i + n/2), or (2i, 2i + 1)."""
    for i in range(n // 2):
        cos, sin = load_float(angles + 8 * i), load_float(angles + 8 * i + 4)
        first = vector + (4 * i if neox else 8 * i)
        second = first + (2 * n if neox else 4)
        a, b = load_float(first), load_float(second)
        store_float(first, a * cos - b * sin)
        store_float(second, a * sin + b * cos)


@kernel
def _prepare_heads(
    vector: int,
    n_heads: int,
    d_head: int,
    norm: int,
    weight: int,
    eps: float,
    n_rotated: int,
    neox: int,
    angles: int,
    scratch: int,
) -> None:
    """Norm and rotate one token's queries or keys, in place."""
    if norm == 2:
        rms_norm(vector, weight, vector, n_heads * d_head, eps)
    for head in range(n_heads):
        at = vector + 4 * head * d_head
        if norm == 1:  # through scratch: a row must end in zeros, a head is followed by the next
            for i in range((d_head + 15) // 16):
                store_f32(scratch + 64 * i, splat(_ZERO))
            for i in range(d_head):
                store_float(scratch + 4 * i, load_float(at + 4 * i))
            rms_norm(scratch, weight, scratch, d_head, eps)
            for i in range(d_head):
                store_float(at + 4 * i, load_float(scratch + 4 * i))
        if n_rotated:
            rotate(at, angles, n_rotated, neox)


@kernel
def _attend_block(
    query: int,
    keys: Any,
    key_tile: int,
    d_head: int,
    values: Any,
    value_row: int,
    d_value: int,
    n: int,
    scale: float,
    scores: int,
    out: int,
) -> Any:
    """Attention over one block of n <= 64 positions: its maximum and sum of weights; unnormalised output at `out`."""
    item = keys.itemsize
    best = splat(_LOWEST)
    for tile in range((n + 15) // 16):
        total = splat(_ZERO)
        at = key_tile + tile * 16 * d_head * item
        for d in range(d_head):
            total = fma(load_cached(keys, at + d * 16 * item), splat(load_float(query + 4 * d)), total)
        total = keep_first(total * splat(np.float32(scale)), n - 16 * tile, splat(_LOWEST))
        store_f32(scores + 64 * tile, total)
        best = maximum(best, total)
    largest = max_lanes(best)
    sums = splat(_ZERO)
    for tile in range((n + 15) // 16):
        weights = exp(load_f32(scores + 64 * tile) - splat(largest))
        store_f32(scores + 64 * tile, weights)
        sums = sums + weights
    width = (d_value + 15) // 16 * 16
    for column in range(0, width, 16):
        total = splat(_ZERO)
        at = value_row + column * item
        for position in range(n):
            total = fma(
                load_cached(values, at + position * width * item), splat(load_float(scores + 4 * position)), total
            )
        store_f32(out + 4 * column, total)
    return largest, sum_lanes(sums)


@kernel
def _attend_head(
    query: int,
    keys: Any,
    key_base: int,
    d_head: int,
    values: Any,
    value_base: int,
    d_value: int,
    n_positions: int,
    scale: float,
    scratch: int,
    out: int,
) -> None:
    """Attention of one query head over the first n_positions of its key/value head, d_value floats to `out`."""
    width = (d_value + 15) // 16 * 16
    block_out, total_out = scratch + 4 * 64, scratch + 4 * (64 + width)
    largest, total = _LOWEST, _ZERO
    for start in range(0, n_positions, 64):
        key_tile = key_base + start * d_head * keys.itemsize
        value_row = value_base + start * width * values.itemsize
        n = min(64, n_positions - start)
        block_largest, block_total = _attend_block(
            query, keys, key_tile, d_head, values, value_row, d_value, n, scale, scratch, block_out
        )
        if start == 0:
            largest, total = block_largest, block_total
            for i in range(0, 4 * width, 64):
                store_f32(total_out + i, load_f32(block_out + i))
            continue
        new = max(largest, block_largest)
        old_share = first_lane(exp(splat(largest - new)))
        block_share = first_lane(exp(splat(block_largest - new)))
        total = fma1(total, old_share, block_total * block_share)
        for i in range(0, 4 * width, 64):
            part = load_f32(block_out + i) * splat(block_share)
            store_f32(total_out + i, fma(load_f32(total_out + i), splat(old_share), part))
        largest = new
    for i in range(d_value):
        store_float(out + 4 * i, load_float(total_out + 4 * i) / total)


@kernel
def _norm_row(activations: Any, row: int, x: int, weight: int, n: int, eps: float) -> None:
    """RMS-norm the row at `x` into row `row` of the activations, as floats and (if asked for) as int8."""
    out = activations.floats + 4 * row * activations.stride
    rms_norm(x, weight, out, n, eps)
    _quantise(activations, row, n)


@kernel
def _quantise(activations: Any, row: int, n: int) -> None:
    """Quantise one row of activations if they are to be."""
    if activations.quantised:
        at = row * activations.stride
        quantise_row(
            activations.floats + 4 * at,
            n,
            activations.integers + at,
            activations.scales + at // 8,
            activations.sums + at // 8,
        )


@kernel
def attend(
    thread: int,
    n_threads: int,
    barrier: int,
    layers: Any,
    matrices: Any,
    works: Any,
    activations: Any,
    x: int,
    x_stride: int,
    n_tokens: int,
    start: int,
    angles: int,
    keys: Any,
    values: Any,
) -> None:
    """Attention half of a layer for n_tokens at positions start, start + 1, ...

    layers: LAYER (1,); matrices: MATRIX (5,); works: WORK (1,); activations: ACTIVATIONS (2,), normed input and
    attention output. x: address of the residual stream, updated in place; its norm for the feed-forward half is left in
    activations[0] and router scores in the work space. keys: (n_kv_heads, n_context / 16, d_head, 16), values:
    (n_kv_heads, n_context, d_value padded to 16), uint16 or float32. angles: address of (cos, sin) from `start` on.
    """
    layer, work, normed, attended = layers[0], works[0], activations[0], activations[1]
    scratch = work.scratch + 4 * thread * work.scratch_stride
    for t in range(thread, n_tokens, n_threads):
        _norm_row(normed, t, x + 4 * t * x_stride, layer.attention_norm, layer.d_model, layer.eps)
    meet(barrier, n_threads)
    multiply(matrices[0], normed, n_tokens, work.query, work.query_stride, thread, n_threads)
    multiply(matrices[1], normed, n_tokens, work.key, work.key_stride, thread, n_threads)
    multiply(matrices[2], normed, n_tokens, work.value, work.value_stride, thread, n_threads)
    meet(barrier, n_threads)

    head_keys = keys.shape[1] * keys.shape[2] * 16 * keys.itemsize  # bytes of one head's keys
    width = values.shape[2]
    head_values = values.shape[1] * width * values.itemsize
    key_cache, value_cache = keys.ctypes.data, values.ctypes.data
    for t in range(thread, n_tokens, n_threads):
        turn = angles + 4 * t * layer.n_rotated
        query, key = work.query + 4 * t * work.query_stride, work.key + 4 * t * work.key_stride
        _prepare_heads(
            query,
            layer.n_heads,
            layer.d_head,
            layer.qk_norm,
            layer.query_norm,
            layer.eps,
            layer.n_rotated,
            layer.neox,
            turn,
            scratch,
        )
        _prepare_heads(
            key,
            layer.n_kv_heads,
            layer.d_head,
            layer.qk_norm,
            layer.key_norm,
            layer.eps,
            layer.n_rotated,
            layer.neox,
            turn,
            scratch,
        )
        position = start + t
        for head in range(layer.n_kv_heads):
            tile = key_cache + head * head_keys + (position // 16) * layer.d_head * 16 * keys.itemsize
            for d in range(layer.d_head):
                value = load_float(key + 4 * (head * layer.d_head + d))
                store_cached(keys, tile + (d * 16 + position % 16) * keys.itemsize, value)
            row = value_cache + head * head_values + position * width * values.itemsize
            value_in = work.value + 4 * (t * work.value_stride + head * layer.d_value)
            for d in range(layer.d_value):
                store_cached(values, row + d * values.itemsize, load_float(value_in + 4 * d))
    meet(barrier, n_threads)

    per_kv = layer.n_heads // layer.n_kv_heads
    for item in range(thread, n_tokens * layer.n_heads, n_threads):
        t, head = item // layer.n_heads, item % layer.n_heads
        _attend_head(
            work.query + 4 * (t * work.query_stride + head * layer.d_head),
            keys,
            key_cache + head // per_kv * head_keys,
            layer.d_head,
            values,
            value_cache + head // per_kv * head_values,
            layer.d_value,
            start + t + 1,
            layer.attention_scale,
            scratch,
            attended.floats + 4 * (t * attended.stride + head * layer.d_value),
        )
    meet(barrier, n_threads)
    for t in range(thread, n_tokens, n_threads):
        _quantise(attended, t, layer.n_heads * layer.d_value)
    meet(barrier, n_threads)
    multiply(matrices[3], attended, n_tokens, work.output, work.output_stride, thread, n_threads)
    meet(barrier, n_threads)

    for t in range(thread, n_tokens, n_threads):
        row, output = x + 4 * t * x_stride, work.output + 4 * t * work.output_stride
        for i in range(0, 4 * layer.d_model, 64):
            store_f32(row + i, fma(load_f32(output + i), splat(layer.residual_scale), load_f32(row + i)))
        _norm_row(normed, t, row, layer.feed_forward_norm, layer.d_model, layer.eps)
    meet(barrier, n_threads)
    if layer.router:
        multiply(matrices[4], normed, n_tokens, work.scores, work.scores_stride, thread, n_threads)
        meet(barrier, n_threads)
