"""The compiled feed-forward half of a layer: experts, shared expert or dense network, and their weighted sum.

Each expert computes all tokens routed to it, so within a chunk its weights are read once. A thread owns columns: of an
expert's hidden vector while gate, up and activation run, which it quantises at once, and of the output afterwards. It
adds the experts' outputs up in ascending id where all are there, or keeps them apart until `combine` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from edgert.quant.functions import activate, quantise_group, sigmoid
from edgert.quant.jit import inner
from edgert.quant.matmul import MATRIX, ROWS, multiply_blocks, multiply_row, put_rows, row_bytes, rows_at_once
from edgert.quant.records import at, record
from edgert.quant.simd import first_lane, fma, splat
from edgert.quant.simd_memory import load_f32, load_float, load_long, store_f32
from edgert.quant.tile_kernels import GROUP_BYTES

# Networks and the rows that they serve: the `n_experts` of `ids` (int64), of which expert e has three MATRIX (gate, up,
# down) at `matrices` and the pairs first[e] to first[e + 1] (int64). Pair p takes input row tokens[p] and, if outputs
# are kept apart, gives output row slots[p]. `weights` (float32) is indexed by slot; `hidden` is the address of ROWS, a
# row for each pair. Biases of the experts' matrices, rows of gate_bias_bytes (up's too) and down_bias_bytes, or 0.
# on_inputs: weights multiply what an expert takes, not what it gives.
GROUP = record(
    "matrices ids n_experts first tokens slots weights hidden activation on_inputs"
    " gate_biases up_biases down_biases gate_bias_bytes down_bias_bytes"
)
_MATRIX = MATRIX.itemsize
_UNIT = 2  # tiles of the hidden vector that are computed at a time: 32 columns, a group of the next activations
_ROW_UNITS = 32  # such units of a single row
_PART = 72 * 32 * 4  # bytes of 64 rows and the 8 that may be written behind them, 32 columns
PARTS_BYTES = 2 * _PART
_ZERO = np.float32(0)


@inner
def _same_rows(first: int, second: int) -> bool:
    """Whether rows put into blocks for one matrix (address of MATRIX) serve the other."""
    a, b = at(first, MATRIX), at(second, MATRIX)
    return a.floats == b.floats and a.offset == b.offset and a.has_minimum == b.has_minimum and a.halves == b.halves


@inner
def _finish_hidden(gate: int, up: int, n: int, columns: int, group: int, row: int, unit: int, floats: bool) -> None:
    """Activation of n rows of 32 columns, quantised (and as floats if asked for) into rows of a GROUP's `hidden`."""
    h, weight = at(at(group, GROUP).hidden, ROWS), splat(np.float32(1))
    activation, on_inputs = at(group, GROUP).activation, at(group, GROUP).on_inputs
    for i in range(n):
        g, u = gate + 128 * i, up + 128 * i
        if on_inputs:  # the products are those of the input, and so is their factor
            weight = splat(load_float(at(group, GROUP).weights + 4 * load_long(at(group, GROUP).slots + 8 * (row + i))))
            for k in range(0, 4 * columns, 64):
                store_f32(g + k, load_f32(g + k) * weight)
                store_f32(u + k, load_f32(u + k) * weight)
        low, high = activate(load_f32(g), load_f32(u), activation), splat(_ZERO)
        if columns > 16:
            high = activate(load_f32(g + 64), load_f32(u + 64), activation)
        if h.group_stride:
            quantise_group(low, high, h.groups + (row + i) * h.group_stride + GROUP_BYTES * unit)
        if floats:
            out = h.floats + 4 * (row + i) * h.stride + 128 * unit
            store_f32(out, low)
            store_f32(out + 64, high)


@inner
def gate_and_up(thread: int, n_threads: int, group: int, rows: int, own: int, parts: int, scratch: int) -> None:
    """hidden[pair] = activation(gate x, up x) for every pair of a group.

    rows: address of ROWS of the input; own: added to the numbers of its rows; parts and scratch: the thread's own.
    """
    g = at(group, GROUP)
    for turn in range(g.n_experts):
        expert = load_long(g.ids + 8 * turn)
        start, end = load_long(g.first + 8 * expert), load_long(g.first + 8 * expert + 8)
        if start == end:
            continue
        gate, up = g.matrices + 3 * expert * _MATRIX, g.matrices + (3 * expert + 1) * _MATRIX
        gate_bias = g.gate_biases + expert * g.gate_bias_bytes if g.gate_biases else 0
        up_bias = g.up_biases + expert * g.gate_bias_bytes if g.up_biases else 0
        n_tiles = (at(gate, MATRIX).n_out + 15) // 16
        floats = at(up + _MATRIX, MATRIX).floats != 0
        n_units = (n_tiles + _UNIT - 1) // _UNIT
        share = (thread + turn) % n_threads  # so that no thread has the larger share of every expert
        first_unit, last_unit = n_units * share // n_threads, n_units * (share + 1) // n_threads
        if end - start == 1:
            row = load_long(g.tokens + 8 * start) + own
            for first in range(first_unit, last_unit, _ROW_UNITS):  # long reads: memory likes them
                last = min(first + _ROW_UNITS, last_unit)
                tile, n = _UNIT * first, min(_UNIT * last, n_tiles) - _UNIT * first
                multiply_row(gate, rows, row, tile, n, parts, gate_bias)
                multiply_row(up, rows, row, tile, n, parts + _PART, up_bias)
                for unit in range(first, last):
                    part = parts + 128 * (unit - first)
                    columns = 16 * min(_UNIT, n_tiles - _UNIT * unit)
                    _finish_hidden(part, part + _PART, 1, columns, group, start, unit, floats)
            continue
        step, same = min(rows_at_once(gate), rows_at_once(up)), _same_rows(gate, up)
        half = scratch if same else scratch + (step * row_bytes(gate) + 63) // 64 * 64
        for first in range(start, end, step):
            count = min(step, end - first)
            put_rows(gate, rows, g.tokens, first, count, scratch)
            if not same:
                put_rows(up, rows, g.tokens, first, count, half)
            for unit in range(first_unit, last_unit):
                n = min(_UNIT, n_tiles - _UNIT * unit)
                multiply_blocks(gate, scratch, count, _UNIT * unit, n, parts, 32, gate_bias)
                multiply_blocks(up, half, count, _UNIT * unit, n, parts + _PART, 32, up_bias)
                _finish_hidden(parts, parts + _PART, count, 16 * n, group, first, unit, floats)


@inner
def _put_out(source: int, n_bytes: int, weight: float, to: int, add: int) -> None:
    """Copy floats, or add them times a weight."""
    for i in range(0, n_bytes, 64):
        if add:
            store_f32(to + i, fma(splat(np.float32(weight)), load_f32(source + i), load_f32(to + i)))
        else:
            store_f32(to + i, load_f32(source + i))


@inner
def down(thread: int, n_threads: int, group: int, out: int, stride: int, add: int, parts: int, scratch: int) -> None:
    """Outputs of every pair of a group, in rows of `out`, `stride` floats apart.

    With `add`, they are added up, times their weights, in their tokens' rows; else each is left in its slot's row.
    """
    g = at(group, GROUP)
    for turn in range(g.n_experts):
        expert = load_long(g.ids + 8 * turn)
        start, end = load_long(g.first + 8 * expert), load_long(g.first + 8 * expert + 8)
        if start == end:
            continue
        matrix = g.matrices + (3 * expert + 2) * _MATRIX
        bias = g.down_biases + expert * g.down_bias_bytes if g.down_biases else 0
        n_tiles = (at(matrix, MATRIX).n_out + 15) // 16
        first_tile, last = n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads
        single = end - start == 1
        unit = _UNIT * _ROW_UNITS if single else _UNIT
        step = 1 if single else rows_at_once(matrix)
        for first in range(start, end, step):
            count = min(step, end - first)
            if not single:
                put_rows(matrix, g.hidden, 0, first, count, scratch)
            for tile in range(first_tile, last, unit):
                n = min(unit, last - tile)
                if single:
                    multiply_row(matrix, g.hidden, first, tile, n, parts, bias)
                else:
                    multiply_blocks(matrix, scratch, count, tile, n, parts, 32, bias)
                for i in range(count):
                    slot = load_long(g.slots + 8 * (first + i))
                    row, weight = slot, _ZERO
                    if add:
                        row, weight = load_long(g.tokens + 8 * (first + i)), load_float(g.weights + 4 * slot)
                        if g.on_inputs:
                            weight = np.float32(1)
                    _put_out(parts + 128 * i, 64 * n, weight, out + 4 * row * stride + 64 * tile, add)


@inner
def share_of(gate: int, rows: int, row: int, part: int) -> Any:
    """What the shared expert's output counts for one token: sigmoid(gate x), or 1 without a gate (its MATRIX)."""
    if gate == 0:
        return np.float32(1)
    multiply_row(gate, rows, row, 0, 1, part, 0)
    return first_lane(sigmoid(load_f32(part)))


@inner
def zero_columns(thread: int, n_threads: int, out: int, stride: int, n_rows: int, n_tiles: int) -> None:
    """Zero this thread's columns of some rows."""
    first, last = n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads
    for row in range(n_rows):
        for tile in range(first, last):
            store_f32(out + 4 * row * stride + 64 * tile, splat(_ZERO))


@inner
def add_columns(
    thread: int, n_threads: int, x: int, x_stride: int, added: int, stride: int, n_rows: int, n_tiles: int, scale: float
) -> None:
    """x += scale * added, this thread's columns of some rows."""
    first, last = n_tiles * thread // n_threads, n_tiles * (thread + 1) // n_threads
    for row in range(n_rows):
        for tile in range(first, last):
            to, source = x + 4 * row * x_stride + 64 * tile, added + 4 * row * stride + 64 * tile
            store_f32(to, fma(load_f32(source), splat(np.float32(scale)), load_f32(to)))
