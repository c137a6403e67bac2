"""Compiled mixers beside plain attention: gated and latent attention, short convolutions, gated delta nets.

Each is what a layer's `mix` points to (see layers.py): all threads call it after a barrier behind the products of the
layer's input, and meet again before they use what it leaves. Between its own parts it brings its own barriers. Threads
share out columns where a state passes from token to token, rows or heads elsewhere. Order of operations: see
devices.reference_mixers.
"""

from __future__ import annotations

import numpy as np

from edgert.devices.feed_forward import PARTS_BYTES
from edgert.devices.layers import STEP, project
from edgert.devices.threads import meet
from edgert.quant.functions import exp, quantise_row, rms_norm, sigmoid, silu, softplus, unit_norm
from edgert.quant.jit import inner
from edgert.quant.matmul import MATRIX, ROWS
from edgert.quant.records import at, call, record
from edgert.quant.simd import fma, splat
from edgert.quant.simd_memory import load_f32, load_float, store_f32, store_float

# Addresses of STEP and of float rows, with their strides in floats, as in layers.py. `attend` is attention's address,
# `attend_job` its job; `rows` what it leaves, `width` of them.
GATED = record("step attend attend_job gate gate_stride rows stride width")
# Latent attention. query_down: rows of the normed vector that queries are made of, and its ROWS and norm, or 0; latent:
# what the input's product left, `rank` floats and then `n_rotated`; plain: queries of all heads, d_plain floats, then
# n_rotated. key_rows and value_rows: ROWS of each head, of its plain query and of what it attended to.
LATENT = record(
    "step attend attend_job n_heads rank n_rotated d_plain d_output query_down query_down_stride query_norm query_rank"
    " query_rows query_up plain plain_stride latent latent_stride latent_norm key_up value_up key_rows value_rows"
    " query query_stride key key_stride value value_stride out out_stride",
    floats="eps",
)
# A short convolution of `width` channels: rows of three parts, taps (n_taps, channels), states (n_taps - 1, channels).
CONVOLUTION = record("step rows stride taps n_taps states channels width out out_stride")
# A gated delta net: rows of queries, keys and values, of gates, of betas and alphas; taps and states as above, and the
# memory of each value head, (d_state, d_state). decay and step_bias: of the heads, up to a multiple of 16.
DELTA = record(
    "step rows stride gate gate_stride beta beta_stride alpha alpha_stride taps n_taps states channels memory"
    " n_key_heads n_value_heads d_state in_turn decay step_bias norm out out_stride",
    floats="eps scale",
)
_ROWS = ROWS.itemsize


# ---- attention with something around it ------------------------------------------------------------------------------
@inner
def attend_gated(thread: int, n_threads: int, barrier: int, job: int) -> None:
    """Attention, times the sigmoid of gates."""
    j = at(job, GATED)
    n, n_tiles = at(j.step, STEP).n_tokens, (j.width + 15) // 16
    call(j.attend, (thread, n_threads, barrier, j.attend_job))
    meet(barrier, n_threads)
    for token in range(n):
        row, gate = j.rows + 4 * token * j.stride, j.gate + 4 * token * j.gate_stride
        for tile in range(n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads):
            store_f32(row + 64 * tile, load_f32(row + 64 * tile) * sigmoid(load_f32(gate + 64 * tile)))


@inner
def _by_head(
    thread: int, n_threads: int, step: int, matrix: int, n_heads: int, rows: int, out: int, head_bytes: int, stride: int
) -> None:
    """Rows of each head (ROWS, one a head) times the head's part of a matrix of which all have an equal share of tiles.

    out: of the first head's products, those of the others follow head_bytes apart; rows are `stride` floats apart.
    """
    s, n_tiles = at(step, STEP), at(matrix, MATRIX).n_out // 16
    scratch = s.scratch + thread * s.scratch_bytes + PARTS_BYTES
    of_head, tile, end = n_tiles // n_heads, n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads
    while tile < end:
        head = tile // of_head
        first = head * of_head
        last = min(end, first + of_head)
        to = out + head * head_bytes - 64 * first
        call(s.multiply, (matrix, rows + head * _ROWS, 0, s.n_tokens, tile, last - tile, to, stride, scratch))
        tile = last


@inner
def _quantise_head(rows: int, head: int, token: int, n: int) -> None:
    """Quantise the n floats of a head of a token, where its matrix takes integers: then n is a multiple of 32."""
    r = at(rows + head * _ROWS, ROWS)
    if r.group_stride:
        quantise_row(r.floats + 4 * token * r.stride, n, r.groups + token * r.group_stride)


@inner
def _copy_floats(source: int, n: int, to: int) -> None:
    for i in range(0, 4 * n, 4):
        store_float(to + i, load_float(source + i))


@inner
def _latent_rows(thread: int, n_threads: int, barrier: int, job: int) -> None:
    """Norm the latent vectors: keys and values; and what queries are made of, if that is not the layer's input."""
    j = at(job, LATENT)
    n = at(j.step, STEP).n_tokens
    for token in range(thread, n, n_threads):
        latent, value = j.latent + 4 * token * j.latent_stride, j.value + 4 * token * j.value_stride
        key = j.key + 4 * token * j.key_stride
        rms_norm(latent, j.latent_norm, value, j.rank, j.eps)
        _copy_floats(latent + 4 * j.rank, j.n_rotated, key)
        _copy_floats(value, j.rank, key + 4 * j.n_rotated)
    if j.query_down == 0:
        return
    r, single = at(j.query_rows, ROWS), n == 1
    for token in range(0 if single else thread, n, 1 if single else n_threads):
        row = thread if single else token
        out = r.floats + 4 * row * r.stride
        rms_norm(j.query_down + 4 * token * j.query_down_stride, j.query_norm, out, j.query_rank, j.eps)
        if r.group_stride:
            quantise_row(out, j.query_rank, r.groups + row * r.group_stride)
    if not single:
        meet(barrier, n_threads)
    own = thread if single else 0
    project(thread, n_threads, j.step, j.query_up, j.query_rows, own, n, j.plain, j.plain_stride)
    meet(barrier, n_threads)


@inner
def attend_latent(thread: int, n_threads: int, barrier: int, job: int) -> None:
    """Latent attention: queries are brought to the latent space, and what was attended to back from it."""
    j = at(job, LATENT)
    n, d_query, d_head = at(j.step, STEP).n_tokens, j.d_plain + j.n_rotated, j.rank + j.n_rotated
    _latent_rows(thread, n_threads, barrier, job)
    for item in range(thread, n * j.n_heads, n_threads):
        token, head = item // j.n_heads, item % j.n_heads
        plain = j.plain + 4 * (token * j.plain_stride + head * d_query)
        _copy_floats(plain + 4 * j.d_plain, j.n_rotated, j.query + 4 * (token * j.query_stride + head * d_head))
        _quantise_head(j.key_rows, head, token, j.d_plain)
    meet(barrier, n_threads)
    to = j.query + 4 * j.n_rotated
    _by_head(thread, n_threads, j.step, j.key_up, j.n_heads, j.key_rows, to, 4 * d_head, j.query_stride)
    meet(barrier, n_threads)
    call(j.attend, (thread, n_threads, barrier, j.attend_job))
    meet(barrier, n_threads)
    for item in range(thread, n * j.n_heads, n_threads):
        _quantise_head(j.value_rows, item % j.n_heads, item // j.n_heads, j.rank)
    meet(barrier, n_threads)
    _by_head(thread, n_threads, j.step, j.value_up, j.n_heads, j.value_rows, j.out, 4 * j.d_output, j.out_stride)


# ---- states ----------------------------------------------------------------------------------------------------------
@inner
def _pass_on(states: int, taps: int, n_taps: int, channels: int, column: int, now: int) -> None:
    """Convolve 16 floats at `now` with those before them, which take them in: the products' sum is left at `now`."""
    inputs, total = load_f32(now), splat(np.float32(0))
    for tap in range(n_taps - 1):
        state = states + 4 * (tap * channels + column)
        total = fma(load_f32(state), load_f32(taps + 4 * (tap * channels + column)), total)
        if tap:
            store_f32(state - 4 * channels, load_f32(state))
    store_f32(states + 4 * ((n_taps - 2) * channels + column), inputs)
    store_f32(now, fma(inputs, load_f32(taps + 4 * ((n_taps - 1) * channels + column)), total))


@inner
def convolve(thread: int, n_threads: int, barrier: int, job: int) -> None:
    """A short convolution: c * convolution of b * y, where the rows are b, c and y."""
    j = at(job, CONVOLUTION)
    n, n_tiles = at(j.step, STEP).n_tokens, (j.width + 15) // 16
    for tile in range(n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads):
        for token in range(n):
            b, out = j.rows + 4 * token * j.stride + 64 * tile, j.out + 4 * token * j.out_stride + 64 * tile
            store_f32(out, load_f32(b) * load_f32(b + 8 * j.width))
            _pass_on(j.states, j.taps, j.n_taps, j.channels, 16 * tile, out)
            store_f32(out, load_f32(b + 4 * j.width) * load_f32(out))


@inner
def _prepare_delta(thread: int, n_threads: int, job: int) -> None:
    """Norm queries and keys of all heads; turn alphas to decays and betas to shares."""
    j = at(job, DELTA)
    n, n_keys = at(j.step, STEP).n_tokens, 2 * j.n_key_heads
    for item in range(thread, n * n_keys, n_threads):
        token, head = item // n_keys, item % n_keys
        scale = np.float32(j.scale) if head < j.n_key_heads else np.float32(1)
        unit_norm(j.rows + 4 * (token * j.stride + head * j.d_state), j.d_state, j.eps, scale)
    for token in range(thread, n, n_threads):
        for i in range(0, 4 * j.n_value_heads, 64):
            beta, alpha = j.beta + 4 * token * j.beta_stride + i, j.alpha + 4 * token * j.alpha_stride + i
            store_f32(beta, sigmoid(load_f32(beta)))
            step = softplus(load_f32(alpha) + load_f32(j.step_bias + i))
            store_f32(alpha, exp(step * load_f32(j.decay + i)))


@inner
def _remember(job: int, head: int, tile: int) -> None:
    """The recurrence of 16 values of a value head, over all tokens."""
    j = at(job, DELTA)
    key_head = head % j.n_key_heads if j.in_turn else head // (j.n_value_heads // j.n_key_heads)
    row_bytes = 4 * j.d_state
    memory = j.memory + head * j.d_state * row_bytes + 64 * tile
    for token in range(at(j.step, STEP).n_tokens):
        query = j.rows + 4 * (token * j.stride + key_head * j.d_state)
        key = query + j.n_key_heads * row_bytes
        value = j.rows + 4 * token * j.stride + (2 * j.n_key_heads + head) * row_bytes + 64 * tile
        decay = splat(load_float(j.alpha + 4 * (token * j.alpha_stride + head)))
        seen, got = splat(np.float32(0)), splat(np.float32(0))
        for i in range(j.d_state):
            kept = load_f32(memory + i * row_bytes) * decay
            store_f32(memory + i * row_bytes, kept)
            seen = fma(kept, splat(load_float(key + 4 * i)), seen)
        change = (load_f32(value) - seen) * splat(load_float(j.beta + 4 * (token * j.beta_stride + head)))
        for i in range(j.d_state):
            kept = fma(change, splat(load_float(key + 4 * i)), load_f32(memory + i * row_bytes))
            store_f32(memory + i * row_bytes, kept)
            got = fma(kept, splat(load_float(query + 4 * i)), got)
        store_f32(j.out + 4 * token * j.out_stride + head * row_bytes + 64 * tile, got)


@inner
def run_delta(thread: int, n_threads: int, barrier: int, job: int) -> None:
    """A gated delta net: convolution, queries and keys normed, the heads' memories, a gated norm."""
    j = at(job, DELTA)
    n, n_tiles, in_head = at(j.step, STEP).n_tokens, j.channels // 16, j.d_state // 16
    for tile in range(n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads):
        for token in range(n):
            now = j.rows + 4 * token * j.stride + 64 * tile
            _pass_on(j.states, j.taps, j.n_taps, j.channels, 16 * tile, now)
            store_f32(now, silu(load_f32(now)))
    meet(barrier, n_threads)
    _prepare_delta(thread, n_threads, job)
    meet(barrier, n_threads)
    n_items = j.n_value_heads * in_head
    for item in range(n_items * thread // n_threads, n_items * (thread + 1) // n_threads):
        _remember(job, item // in_head, item % in_head)
    meet(barrier, n_threads)
    for item in range(thread, n * j.n_value_heads, n_threads):
        token, head = item // j.n_value_heads, item % j.n_value_heads
        out = j.out + 4 * (token * j.out_stride + head * j.d_state)
        gate = j.gate + 4 * (token * j.gate_stride + head * j.d_state)
        rms_norm(out, j.norm, out, j.d_state, j.eps)
        for i in range(0, 4 * j.d_state, 64):
            store_f32(out + i, load_f32(out + i) * silu(load_f32(gate + i)))
